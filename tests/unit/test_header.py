"""The header: what is written is what is read, by distmerge and by the safetensors library."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from distmerge.checkpoint.header import ITEMSIZE, METADATA, build_header, parse_header, read_header
from distmerge.errors import InputError

NAMES = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")), min_size=1)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.lists(
    st.tuples(NAMES.filter(lambda name: name != "__metadata__"), st.sampled_from(sorted(ITEMSIZE)), SHAPES),
    max_size=6,
    unique_by=lambda tensor: tensor[0],
)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}


def nbytes_of(tensors: list[tuple[str, str, tuple[int, ...]]]) -> int:
    return sum(torch.Size(shape).numel() * ITEMSIZE[dtype] for _, dtype, shape in tensors)


@given(TENSORS)
def test_a_header_that_was_built_reads_as_the_same_tensors_one_after_another(
    tensors: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    raw = build_header(tensors)
    header = parse_header(raw[8:], nbytes_of(tensors), where="w", file="f")
    assert sorted((t.name, t.dtype, t.shape) for t in header.tensors) == sorted(tensors)
    assert header.metadata == METADATA
    ends = [spec.begin + spec.nbytes for spec in header.tensors]
    assert [spec.begin for spec in header.tensors] == [len(raw), *ends][: len(ends)]


@given(TENSORS)
def test_data_begins_at_a_multiple_of_eight_right_after_the_length_and_the_json(
    tensors: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    raw = build_header(tensors)
    assert len(raw) % 8 == 0
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8
    assert raw[8:9] == b"{"


@given(TENSORS, st.integers(-9, 5000))
def test_data_begins_where_it_is_wanted_or_not_at_all(
    tensors: list[tuple[str, str, tuple[int, ...]]], more: int
) -> None:
    shortest = build_header(tensors)
    json = len(shortest[8:].rstrip(b" "))
    if 8 + json > len(shortest) + more:
        with pytest.raises(ValueError, match="does not fit"):
            build_header(tensors, len(shortest) + more)
        return
    raw = build_header(tensors, len(shortest) + more)
    assert len(raw) == len(shortest) + more == 8 + int.from_bytes(raw[:8], "little")
    assert parse_header(raw[8:], nbytes_of(tensors), where="w", file="f").metadata == METADATA


@given(TENSORS.filter(bool), st.integers(-3, 3).filter(bool))
def test_a_file_that_is_longer_or_shorter_than_its_header_says_is_refused(
    tensors: list[tuple[str, str, tuple[int, ...]]], off: int
) -> None:
    raw = build_header(tensors)
    with pytest.raises(InputError, match="the header promises"):
        parse_header(raw[8:], nbytes_of(tensors) + off, where="w", file="f")


def test_the_bytes_of_a_header_are_these() -> None:
    json = (
        b'{"__metadata__":{"format":"pt"},'
        b'"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"\xc3\xa9.b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}'
    )
    padded = json + b" " * (-len(json) % 8)
    built = build_header([("w", "BF16", (2, 3)), ("é.b", "F32", ())])
    assert built == len(padded).to_bytes(8, "little") + padded


@given(st.lists(st.tuples(NAMES, st.sampled_from(sorted(TORCH)), SHAPES), max_size=5, unique_by=lambda t: t[0]))
def test_the_safetensors_library_reads_what_a_header_lays_out(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    # The library refuses data that is not aligned, so wide dtypes come first, as in a merge.
    tensors = sorted((t for t in tensors if t[0] != "__metadata__"), key=lambda t: -ITEMSIZE[t[1]])
    path = tmp_path_factory.mktemp("header") / "f.safetensors"
    path.write_bytes(build_header(tensors) + bytes(nbytes_of(tensors)))
    with safe_open(path, framework="pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
        assert opened.metadata() == METADATA
    dtypes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    assert dtypes == {name: (TORCH[dtype], shape) for name, dtype, shape in tensors}
    assert len(read_header(path).tensors) == len(tensors)
