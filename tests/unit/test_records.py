"""Records as JSON: what goes in comes out equal, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.config import AdapterChoice, MergeConfig
from distmerge.journal import ShardRecord
from distmerge.numerics.survival import Sums
from distmerge.plan import Plan, make_plan
from distmerge.runlog import RankLog, Span
from distmerge.share import Records
from distmerge.storage.records import decode, decode_rows, encode, encode_rows
from distmerge.stream import PieceRecord, SegmentRecord

COUNT = st.integers(0, 1 << 62)
NUMBER = st.floats(min_value=0, allow_infinity=False)
SUMS = st.builds(
    Sums,
    numel=COUNT,
    unchanged=COUNT,
    largest_delta=NUMBER,
    base_squared=NUMBER,
    delta_squared=NUMBER,
    applied_squared=NUMBER,
    product=st.floats(allow_nan=False, allow_infinity=False),
    quant_squared=st.none() | NUMBER,
    pack_squared=st.none() | NUMBER,
    plain_pack_squared=st.none() | NUMBER,
)
PIECE = st.builds(
    PieceRecord,
    task=COUNT,
    numel=COUNT,
    changed=st.lists(COUNT, max_size=3).map(tuple),
    delta_squared=st.lists(NUMBER, max_size=3).map(tuple),
    sums=st.none() | SUMS,
    singular=st.lists(NUMBER, max_size=3).map(tuple),
    not_finite=COUNT,
)
SEGMENT = st.builds(
    SegmentRecord, segment=COUNT, crc32=st.none() | COUNT, pieces=st.lists(PIECE, max_size=4).map(tuple)
)
SHARD = st.builds(ShardRecord, file=COUNT, nbytes=COUNT, digest=st.text())
BEGIN, END = st.floats(0, 1e9), st.floats(1e9, 1e10)
SPAN = st.builds(Span, segment=COUNT, start=BEGIN, end=END, nbytes=COUNT, kept=st.booleans())
LOG = st.builds(
    RankLog,
    rank=COUNT,
    host=st.text(),
    device=st.text(),
    start=BEGIN,
    end=END,
    spans=st.lists(SPAN, max_size=3).map(tuple),
)
RECORDS = st.builds(
    Records,
    segments=st.lists(SEGMENT, max_size=3).map(tuple),
    shards=st.lists(SHARD, max_size=3).map(tuple),
    log=LOG,
)
SUMS_JSON: dict[str, Any] = {"numel": 2, "unchanged": 1, "largest_delta": 1.0, "base_squared": 4.0}
SUMS_JSON |= {"delta_squared": 1.0, "applied_squared": 0.5, "product": 0.5, "quant_squared": None, "pack_squared": None}
SUMS_JSON |= {"plain_pack_squared": None}
PIECE_JSON: dict[str, Any] = {"task": 1, "numel": 2, "changed": [2], "delta_squared": [1.0]}
PIECE_JSON |= {"sums": SUMS_JSON, "singular": [1.0], "not_finite": 0}


@given(RECORDS)
def test_the_records_of_a_rank_come_back_equal(records: Records) -> None:
    assert Records.from_json(records.to_json()) == records


@pytest.mark.parametrize("which", ["base", "packed_base"])
def test_a_plan_comes_back_equal_with_the_same_digest(
    which: str, adapter: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    config = MergeConfig(base=folder, adapters=(AdapterChoice(folder=adapter),), output=tmp_path / "out")
    plan = make_plan(config, "cpu")
    again = decode(Plan, json.loads(encode(plan)))
    assert again == plan
    assert again.digest == plan.digest


def test_equal_values_have_equal_text_whatever_the_order_of_their_keys() -> None:
    assert encode({"b": 1, "a": (2, 3)}) == encode({"a": [2, 3], "b": 1}) == '{"a":[2,3],"b":1}'


@pytest.mark.parametrize(
    "change",
    [
        {"task": "1"},
        {"task": True},
        {"task": 1.0},
        {"task": None},
        {"not_finite": None},
        {"singular": None},
        {"sums": {}},
        {"sums": {**SUMS_JSON, "applied_squared": "0.5"}},
        {"sums": {**SUMS_JSON, "applied_squared": None}},
        {"delta_squared": [None]},
        {"delta_squared": ["x"]},
        {"delta_squared": 5},
        {"delta_squared": None},
        {"delta_squared": {}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_record_with_a_field_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    decode(PieceRecord, PIECE_JSON)
    with pytest.raises(ValueError):  # noqa: PT011 - what matters is the type that journals and manifests expect
        decode(PieceRecord, {**PIECE_JSON, **change})


def test_a_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="a number of 1329 bits"):
        decode(PieceRecord, {**PIECE_JSON, "delta_squared": [10**400]})


@pytest.mark.parametrize("field", sorted(PIECE_JSON))
def test_a_record_that_lacks_a_field_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="not a PieceRecord"):
        decode(PieceRecord, {key: value for key, value in PIECE_JSON.items() if key != field})


@pytest.mark.parametrize("value", [None, 3, "text", [], [1]])
def test_what_is_no_object_is_no_record(value: object) -> None:
    with pytest.raises(ValueError, match="not a SegmentRecord"):
        decode(SegmentRecord, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Every kind of field that a plan may have."""

    names: tuple[str, ...]
    pair: tuple[int, str]
    marks: dict[str, str]
    maybe: ShardRecord | None
    kind: Literal["copy", "merge"]
    either: str | tuple[str, ...]
    free: dict[str, Any]


SAMPLE = {"names": ["a"], "pair": [1, "x"], "marks": {"k": "v"}, "maybe": None, "kind": "copy"}
SAMPLE |= {"either": "a", "free": {"scaling": 1.5, "rows": [1, 2]}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    """A union of records that rows cannot tell from one another."""

    either: Named | Marked


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A record of one field."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """Another one."""

    mark: str


def test_rows_are_only_of_records_that_can_be_told_from_one_another() -> None:
    assert decode(Alike, json.loads(encode(Alike(either=Marked(mark="m"))))) == Alike(either=Marked(mark="m"))
    with pytest.raises(TypeError, match="cannot be told from one another"):
        decode_rows(Alike, json.loads(encode_rows(Alike(either=Marked(mark="m")))))


def test_every_kind_of_field_comes_back_equal() -> None:
    shard = ShardRecord(file=1, nbytes=2, digest="ab", segment_crc32s=(1, 2))
    for maybe in (None, shard):
        for either in ("one", ("one", "two")):
            sample = Sample(
                names=("a", "b"),
                pair=(1, "x"),
                marks={"k": "v"},
                maybe=maybe,
                kind="merge",
                either=either,
                free={"scaling": 1.5, "rows": [1, 2], "told": None},
            )
            assert decode(Sample, json.loads(encode(sample))) == sample


@pytest.mark.parametrize(
    "change",
    [
        {"names": "ab"},
        {"names": {"a": 1}},
        {"names": 5},
        {"pair": [1]},
        {"pair": [1, "x", "y"]},
        {"marks": []},
        {"marks": {"k": 1}},
        {"marks": None},
        {"maybe": 1},
        {"maybe": {"file": 1}},
        {"kind": "move"},
        {"kind": []},
        {"either": 1},
        {"either": [1]},
        {"either": None},
        {"free": []},
    ],
    ids=str,
)
def test_a_value_of_another_shape_is_refused(change: dict[str, Any]) -> None:
    decode(Sample, SAMPLE)
    with pytest.raises(ValueError):  # noqa: PT011 - see above
        decode(Sample, {**SAMPLE, **change})
