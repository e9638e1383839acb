"""The report of a merge: what it counts and draws, for every kind of receipt, and nothing in it that fetches."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from distmerge.clock import Clock, profile_of
from distmerge.errors import InputError, MachineError
from distmerge.numerics.compiled import arithmetic
from distmerge.numerics.survival import Survival
from distmerge.receipt import LedgerEntry, Receipt, TensorEntry, read_receipt
from distmerge.report.folder import Report, write_report
from distmerge.report.survey import errors, make_grid, spectra, spot
from distmerge.report.verdict import judge
from distmerge.runlog import RankLog, Span, read_run_log, write_run_log
from tests import factories
from tests.conftest import tree


def survival(kept: float = 1.0, *, cosine: float | None = None, size: float = 0.01, **changes: Any) -> Survival:
    """A change of norm `size` to weights of norm 1, of which `kept` is left."""
    cosine = kept if cosine is None else cosine
    applied = size * kept / cosine if cosine else 0.0
    found = Survival(
        base_norm=1.0,
        delta_norm=size,
        applied_norm=applied,
        cosine=cosine or None,
        unchanged=0.25,
        largest_delta=size / 10,
        quant_error=None,
        pack_error=None,
        plain_pack_error=None,
    )
    return replace(found, **changes)


def entry(
    found: Survival | None = None, *, values: tuple[float, ...] = (3.0, 2.0, 1.0), numel: int = 100
) -> TensorEntry:
    return TensorEntry(numel=numel, survival=found, singular_values=values if found else (), not_finite=0)


def llama(
    layers: int, modules: tuple[str, ...] = ("self_attn.q_proj", "mlp.up_proj"), **changes: Any
) -> dict[str, TensorEntry]:
    return {
        f"model.layers.{layer}.{module}.weight": entry(survival(1 - 0.01 * layer, **changes))
        for layer in range(layers)
        for module in modules
    }


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy of a published output, whose receipt a test may write over."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


def with_tensors(out: Path, tensors: dict[str, TensorEntry], **changes: Any) -> Receipt:
    """Writes a receipt with these tensors over that of `out`."""
    receipt = read_receipt(out)
    assert receipt is not None
    receipt = replace(receipt, tensors=tensors, **changes)
    (out / "merge_receipt.json").write_bytes(receipt.to_json())
    return receipt


class Elements(HTMLParser):
    """The tags of a page with their attributes, the text of scripts, and all other text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def rows(page: str) -> list[list[Any]]:
    """The data of the table of tensors."""
    found: list[list[Any]] = json.loads(Elements(page).scripts[0])
    return found


def pictures(made: Report) -> list[str]:
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made.figures)
    return [path.stem for path in made.figures]


def page_of(made: Report) -> str:
    return made.page.read_text(encoding="utf-8")


# -- what is in it


def test_the_report_of_a_merge_lists_every_changed_tensor_with_the_receipts_numbers(
    merged: Path, tmp_path: Path
) -> None:
    before = tree(merged)
    made = write_report(merged, tmp_path / "report")
    receipt = read_receipt(merged)
    assert receipt is not None
    table = {row[0]: row for row in rows(page_of(made))}
    assert table.keys() == receipt.tensors.keys()
    for name, found in receipt.tensors.items():
        assert found.survival is not None
        _, numel, relative, kept, cosine, noise, unchanged, largest, keys = table[name]
        assert (numel, cosine, unchanged) == (found.numel, found.survival.cosine, found.survival.unchanged)
        assert (kept, noise, largest) == (found.survival.kept, found.survival.noise, found.survival.largest_delta)
        assert relative == found.survival.delta_norm / found.survival.base_norm
        assert sorted(keys) == sorted(key for key, where in receipt.ledger.items() if name in where.tensors)
    text = Elements(page_of(made)).text
    assert judge(receipt.tensors).sentence.split(": ")[1].rstrip(".") in text
    for told in ("28", "adapter tensors, each applied exactly once", receipt.plan, receipt.adapters[0].fingerprint):
        assert told in text
    assert pictures(made) == ["change", "left", "layers", "spectrum"]
    assert tree(merged) == before


def test_every_figure_on_the_page_is_well_formed_and_takes_its_colours_from_the_page(
    merged: Path, tmp_path: Path
) -> None:
    page = page_of(write_report(merged, tmp_path / "report"))
    found = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(found) == 4
    for svg in found:
        root = ElementTree.fromstring(svg)
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib
        assert "var(--ink)" in svg
        assert "#1c2126" not in svg
    ids = re.findall(r'\bid="(figure[^"]*|p[0-9a-f]{10})"', "".join(found))
    clips = [one for one in ids if one.startswith("p")]
    assert len(clips) == len(set(clips))


def test_equal_receipts_give_equal_reports(merged: Path, tmp_path: Path) -> None:
    write_report(merged, tmp_path / "one")
    write_report(merged, tmp_path / "two")
    write_report(merged, tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({}, []),
        ({"lm_head.weight": entry()}, []),
        ({"a.weight": entry(survival(size=0.0), values=())}, []),
        ({"a.weight": entry(survival(), values=()), "b": entry(survival(0.0), values=())}, ["left"]),
        ({"a.weight": entry(survival()), "b": entry(survival()), "c.bias": entry(survival())}, ["left", "spectrum"]),
        (llama(2), ["change", "left", "layers", "spectrum"]),
        ({**llama(3), "lm_head.weight": entry(survival())}, ["change", "left", "layers", "spectrum"]),
        (llama(200, tuple(f"part{number}.proj" for number in range(15))), ["change", "left", "layers", "spectrum"]),
        (
            llama(2, quant_error=0.5, pack_error=0.001),
            ["change", "left", "layers", "spectrum", "quantization", "packing"],
        ),
    ],
    ids=["none", "replaced", "nothing added", "two names", "three", "layers", "head", "3000", "errors"],
)
def test_every_receipt_gives_a_page_with_the_figures_that_it_has_numbers_for(
    tensors: dict[str, TensorEntry], expected: list[str], out: Path
) -> None:
    with_tensors(out, tensors, ledger={})
    made = write_report(out)
    assert made.page == out.with_name("out-report") / "report.html"
    assert pictures(made) == expected
    assert len(page_of(made)) < 3_000_000
    assert [row[0] for row in (rows(page_of(made)) if tensors else [])] == list(tensors)


def test_a_run_log_adds_the_time_of_each_rank(merged: Path, tmp_path: Path) -> None:
    logs = [
        RankLog(
            rank=rank,
            host=f"node{rank // 8}",
            device=f"cuda:{rank % 8}",
            start=1e9 + rank,
            end=1e9 + 20 + rank,
            spans=(Span(segment=rank, start=1e9 + 1, end=1e9 + 11, nbytes=5_000_000, kept=rank == 3),),
        )
        for rank in range(64)
    ]
    write_run_log(tmp_path / "log", logs)
    made = write_report(merged, tmp_path / "report", run_log=tmp_path / "log")
    assert pictures(made)[-1] == "ranks"
    text = Elements(page_of(made)).text
    assert all(told in text for told in ("node7", "cuda:5", "50 %", "20.0 s", "5.0 MB"))


# -- what it counts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj.weight", ("model.layers", 12, "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.17.up_proj.weight", ("model.layers", 3, "mlp.experts.*.up_proj")),
        ("transformer.h.0.attn.c_attn.weight", ("transformer.h", 0, "attn.c_attn")),
        ("lm_head.weight", ("", None, "lm_head")),
        ("blocks.7.weight", ("blocks", 7, "*")),
        ("0.weight", ("", 0, "*")),
        ("a.1.2.3.b", ("a", 1, "*.*.b")),
        ("layer1x.weight", ("", None, "layer1x")),
        ("", ("", None, "")),
    ],
)
def test_a_name_says_its_layer_and_its_module(name: str, expected: tuple[str, int | None, str]) -> None:
    found = spot(name)
    assert (found.stack, found.layer, found.module) == expected


def test_experts_of_a_layer_are_one_cell_with_the_worst_of_them() -> None:
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    tensors = {name.format(layer, e): entry(survival(0.9 - 0.1 * e)) for layer in (0, 1) for e in range(4)}
    grid = make_grid(tensors)
    assert (grid.modules, grid.layers, grid.is_layered) == (("mlp.experts.*.up_proj",), (0, 1), True)
    cell = grid.cells[("mlp.experts.*.up_proj", 1)]
    assert cell.num_tensors == 4
    assert cell.worst == pytest.approx(0.6)
    assert cell.kept == pytest.approx((0.9 + 0.8 + 0.7 + 0.6) / 4)
    assert cell.relative_delta == pytest.approx(0.01)


def test_stacks_that_share_module_names_are_told_apart_and_rare_modules_are_one_row() -> None:
    both = {f"{stack}.{n}.q.weight": entry(survival()) for stack in ("vision.blocks", "model.layers") for n in (0, 1)}
    assert make_grid(both).modules == ("vision.blocks.q", "model.layers.q")
    many = llama(3) | {f"model.layers.1.odd{number}.weight": entry(survival()) for number in range(9)}
    assert make_grid(many, max_modules=4).modules[-1] == "7 more modules"
    assert sum(cell.num_tensors for cell in make_grid(many, max_modules=4).cells.values()) == len(many)


def test_spectra_and_errors_are_medians_over_the_tensors_of_a_module() -> None:
    tensors = {f"l.{n}.q.weight": entry(survival(quant_error=0.01 * n), values=(10.0, 1.0 + n, 0.5)) for n in range(5)}
    tensors["l.0.k.weight"] = entry(survival(), values=(0.0, 0.0))
    assert spectra(tensors) == {"q": (1.0, pytest.approx(0.3), pytest.approx(0.05))}
    assert errors(tensors, lambda found: found.quant_error) == {"q": pytest.approx(2.0)}


@pytest.mark.parametrize(
    ("kept", "level", "said"),
    [
        ([1.0] * 20, "kept", "100.0 % of the change is left"),
        ([0.8] * 20, "weakened", "80.0 %"),
        ([1.0] * 19 + [0.2], "kept", "96.0 %"),
        ([1.0] * 18 + [0.2] * 2, "lost", "2 of 20 tensors keep less than half"),
        ([0.0] * 20, "lost", "20 of 20"),
    ],
)
def test_the_verdict_is_by_the_tensors_that_keep_less_than_half(kept: list[float], level: str, said: str) -> None:
    verdict = judge({f"t{n:02}": entry(survival(one, cosine=min(1.0, one + 0.01))) for n, one in enumerate(kept)})
    assert verdict.level == level
    assert said in verdict.sentence
    assert bool(verdict.warning) == (level == "lost")
    if level == "lost":
        assert f"least t{kept.index(min(kept)):02} ({100 * min(kept):.0f} % left)" in verdict.warning


def test_a_change_that_is_left_in_size_but_not_in_direction_is_told_by_its_cosine() -> None:
    verdict = judge({"a": entry(survival(1.52, cosine=0.21)), "b": entry(survival(0.4, cosine=0.9))})
    assert "2 keep less than half of their change in size or direction, least a (cosine 0.21)" in verdict.warning
    assert "152" not in verdict.warning


def test_what_packing_costs_is_told_beside_what_plain_scales_would() -> None:
    found = {
        "a": entry(survival(pack_error=0.03, plain_pack_error=0.04)),
        "b": entry(survival(pack_error=0.04, plain_pack_error=0.03)),
        "c": entry(survival(pack_error=0.0, plain_pack_error=0.12)),
        "dense": entry(survival()),
    }
    verdict = judge(found)
    assert verdict.pack_error == pytest.approx(0.05 / 3**0.5)
    assert verdict.plain_pack_error == pytest.approx(0.13 / 3**0.5)
    assert "by 2.89 % of their norm, with plain scales it would be 7.51 %" in verdict.packing
    same = judge({"a": entry(survival(pack_error=0.03, plain_pack_error=0.03))}).packing
    assert same.endswith("by 3 % of their norm")
    assert judge({"a": entry(survival())}).packing == ""
    assert "--quantize-mode" not in verdict.remedy + verdict.warning


def test_the_report_of_a_packed_output_shows_both_errors_of_every_tensor(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = factories.merge(base, adapter, tmp_path / "out", quantize="nf4", quantize_mode="fitted")
    receipt = read_receipt(out)
    assert receipt is not None
    verdict = judge(receipt.tensors)
    assert f"packed   {verdict.packing}\n" in capsys.readouterr().err
    assert "plain scales" in verdict.packing
    page = page_of(write_report(out))
    for row in rows(page):
        found = receipt.tensors[row[0]].survival
        assert found is not None
        errors_told = [error / found.base_norm for error in (found.pack_error, found.plain_pack_error) if error]
        assert row[8:10] == errors_told
        assert row[8] <= row[9]
        assert row[10]
    text = Elements(page).text
    assert "|packing error|/|W|" in text
    assert f"{100 * (verdict.pack_error or 0):.3g} %" in text
    assert f"with plain scales {100 * (verdict.plain_pack_error or 0):.3g} %" in text


def test_the_cosine_of_the_whole_is_that_of_all_tensors_as_one_vector() -> None:
    verdict = judge({"a": entry(survival(0.5, cosine=0.8, size=3.0)), "b": entry(survival(1.2, cosine=0.9, size=1.0))})
    left = [3.0 * 0.5 / 0.8, 1.2 / 0.9]
    product = 0.5 * 9 + 1.2
    assert verdict.cosine == pytest.approx(product / (10**0.5) / (left[0] ** 2 + left[1] ** 2) ** 0.5)
    assert verdict.kept == pytest.approx(product / 10)
    assert verdict.relative_delta == pytest.approx((10 / 2) ** 0.5)


def test_a_packed_output_has_another_remedy() -> None:
    dense, packed = ({"a": entry(survival(0.1, pack_error=error))} for error in (None, 0.5))
    assert "--dtype float32" in judge(dense).warning
    assert "--quantize" in judge(packed).warning


# -- names from strangers

HOSTILE = [
    "model.layers.0.<script>alert(1)</script>.weight",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>.weight',
    "<!--<script>",
    "$\\frac{1}{0}$ & {x} %s \u2028 \x00\x1b[31m",
    "層.0.重み.weight",
]


def test_names_from_inputs_are_text_wherever_they_stand(out: Path) -> None:
    receipt = read_receipt(out)
    assert receipt is not None
    adapter = replace(receipt.adapters[0], name=HOSTILE[0], tuner=HOSTILE[1], fingerprint=HOSTILE[2])
    with_tensors(
        out,
        {f"{n}.{name}": entry(survival()) for n, name in enumerate(HOSTILE)},
        ledger={name: LedgerEntry(tensor=f"0.{HOSTILE[0]}", delta_norm=1.0, applied_norm=1.0) for name in HOSTILE},
        adapters=(adapter,),
        base=replace(receipt.base, name=HOSTILE[2]),
        environment={HOSTILE[1]: HOSTILE[0], "torch": HOSTILE[2]},
        options=replace(receipt.options, map=(HOSTILE[1],)),
    )
    page = page_of(write_report(out))
    found = Elements(page)
    assert len(found.scripts) == 2
    assert "alert" not in found.scripts[1]
    assert not [tag for tag, _ in found.tags if tag in ("img", "iframe", "link", "object", "embed", "form", "base")]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "\x1b" not in page
    assert "\x00" not in page
    assert "\u2028" not in page
    assert rows(page)[0][0] == f"0.{HOSTILE[0]}"
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_page_asks_nobody_for_anything(merged: Path, tmp_path: Path) -> None:
    page = page_of(write_report(merged, tmp_path / "report"))
    found = Elements(page)
    addresses = [v for _, attributes in found.tags for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
    assert all(address is not None and address.startswith(("#", "data:image/png")) for address in addresses)
    policy = [a.get("content") for tag, a in found.tags if tag == "meta" and "http-equiv" in a]
    assert policy
    assert "default-src 'none'" in str(policy[0])
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert "@import" not in page


# -- what is refused


def test_a_folder_without_a_receipt_has_no_report(base: Path, tmp_path: Path) -> None:
    for folder in (base, tmp_path / "nothing"):
        with pytest.raises(InputError, match="holds no merge_receipt"):
            write_report(folder)
    assert not (tmp_path / "nothing-report").exists()


@pytest.mark.parametrize("where", [".", "report", "../out/report", "model.safetensors/x"])
def test_a_report_never_lies_in_the_output(where: str, out: Path) -> None:
    before = tree(out)
    with pytest.raises(InputError, match="lies in the output"):
        write_report(out, out / where)
    assert tree(out) == before


def test_a_report_needs_a_place(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "no" / "report"):
        with pytest.raises(InputError):
            write_report(out, folder)


RANK = '{"rank": 0, "host": "h", "device": "cpu", "start": %s, "end": 2.0, "spans": [%s]}\n'
SPAN = '{"segment": 0, "start": 1.0, "end": %s, "nbytes": 1, "kept": false}'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}\n", "[1]\n", "not JSON\n", '{"rank": "0"}\n', "\xff", "[" * 100_000),
        *(RANK % (start, "") for start in ("NaN", "Infinity", "3.0", "-1e300", "null", '"1"')),
        *(RANK % ("1.0", SPAN % end) for end in ("NaN", "0.5", "1e300")),
        RANK % ("1.0", SPAN % "1.5") + "{}",
    ],
    ids=lambda text: text[:60],
)
def test_what_is_no_run_log_is_refused(text: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="log"):
        write_report(out, run_log=tmp_path / "log")
    assert not (tmp_path / "out-report").exists()


def test_without_matplotlib_it_says_what_to_install(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmerge.report.figures", None, raising=False)
    monkeypatch.delattr("distmerge.report.figures")
    monkeypatch.delitem(sys.modules, "distmerge.report.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MachineError, match="matplotlib is not installed") as caught:
        write_report(merged, tmp_path / "report")
    assert caught.value.hint == "pip install 'distmerge[report]'"
    assert not (tmp_path / "report").exists()


# -- the run log of a merge


def test_a_run_log_says_what_the_rank_did_and_changes_no_byte_of_the_output(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    out = factories.merge(base, adapter, tmp_path / "out", run_log=path)
    assert tree(out) == tree(merged)
    (line,) = [json.loads(text) for text in path.read_text().splitlines()]
    assert (line["rank"], line["device"], line["host"]) == (0, "cpu", os.uname().nodename)
    assert line["nbytes"] == sum(span["nbytes"] for span in line["spans"]) > 0
    assert line["segments"] == len({span["segment"] for span in line["spans"]}) == len(line["spans"])
    assert line["start"] <= line["spans"][0]["start"] <= line["spans"][-1]["end"] <= line["end"]
    assert 0 < line["busy_seconds"] <= line["seconds"] + 0.001
    assert not any(span["kept"] for span in line["spans"])


def test_the_profile_of_a_rank_accounts_for_all_time_of_its_lanes(base: Path, adapter: Path, tmp_path: Path) -> None:
    factories.merge(base, adapter, tmp_path / "out", run_log=tmp_path / "log")
    (log,) = read_run_log(tmp_path / "log")
    assert log.profile is not None
    seconds = asdict(log.profile)
    lanes = [seconds.pop(step) for step in ("read", "load", "compute", "hash", "write", "wait")]
    measured = seconds.pop("measure")
    assert sum(lanes) + measured == pytest.approx(seconds.pop("lanes") * log.seconds, rel=0.05)
    assert min(lanes) > 0
    assert (measured > 0) == (arithmetic("cpu") == "torch"), "compiled code measures while it computes"
    assert seconds.pop("start") > 0
    assert min(seconds.values()) > 0, seconds  # digest, fsync, publish


def test_a_run_log_from_before_there_were_profiles_is_read(out: Path, tmp_path: Path) -> None:
    log = RankLog(rank=0, host="old", device="cpu", start=1e9, end=1e9 + 2, spans=())
    write_run_log(tmp_path / "log", [log])
    values = json.loads((tmp_path / "log").read_text())
    del values["profile"]
    (tmp_path / "log").write_text(json.dumps(values))
    assert read_run_log(tmp_path / "log") == (log,)
    page = page_of(write_report(out, tmp_path / "report", run_log=tmp_path / "log"))
    assert "old" in page
    assert "Seconds of each step" not in page


def test_the_report_shows_where_the_time_of_each_rank_went(out: Path, tmp_path: Path) -> None:
    clock = Clock()
    clock.seconds = {"read": 12.25, "write": 1.0}
    profile = profile_of([clock], [], start=3.21, seconds=20.0)
    logs = [
        RankLog(rank=rank, host="h", device="cpu", start=1e9, end=1e9 + 20, spans=(), profile=profile)
        for rank in range(3)
    ]
    write_run_log(tmp_path / "log", logs)
    text = Elements(page_of(write_report(out, tmp_path / "report", run_log=tmp_path / "log"))).text
    assert all(told in text for told in ("Seconds of each step", "12.25", "36.75", "3.21", "fsync"))


@pytest.mark.parametrize("change", [{"read": -1.0}, {"read": "1"}, {"wait": 1e300}, {"lanes": 1.5}, {"more": 1.0}])
def test_a_profile_that_no_clock_shows_is_refused(change: dict[str, Any], out: Path, tmp_path: Path) -> None:
    profile = profile_of([Clock()], [], start=1.0, seconds=1.0)
    log = RankLog(rank=0, host="h", device="cpu", start=1e9, end=1e9 + 2, spans=(), profile=profile)
    write_run_log(tmp_path / "log", [log])
    values = json.loads((tmp_path / "log").read_text())
    values["profile"] |= change
    (tmp_path / "log").write_text(json.dumps(values))
    with pytest.raises(InputError, match="line 1 is no rank"):
        write_report(out, run_log=tmp_path / "log")


@pytest.mark.parametrize("where", ["base/log", "adapter/log", "out/log", "nowhere/log", "."])
def test_a_run_log_has_a_place_beside_inputs_and_output(where: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    folders = {"base": base, "adapter": adapter, "out": tmp_path / "out", "nowhere": tmp_path / "nowhere"}
    head, _, tail = where.partition("/")
    path = folders[head] / tail if tail else tmp_path
    with pytest.raises(InputError, match=r"folder|lies in"):
        factories.merge(base, adapter, tmp_path / "out", run_log=path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.distmerge").exists()
