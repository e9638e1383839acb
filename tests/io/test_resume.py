"""Interrupted merges: what is finished is kept, what is damaged is done again, the bytes are the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distmerge.config import AdapterChoice, MergeConfig
from distmerge.errors import InputError, Interrupted, MachineError
from distmerge.journal import ShardRecord
from distmerge.numerics.precision import full_precision
from distmerge.plan import Plan, make_plan
from distmerge.storage.files import replacing
from distmerge.storage.records import encode
from distmerge.stream import Stream
from distmerge.unchanged import check_unchanged
from distmerge.work import WorkFolder
from tests.conftest import Command, tree
from tests.factories import edit_json, merge


class Halfway:
    """A merge of `adapter` into `base` that stopped after its first `count` segments, as a killed process leaves it."""

    def __init__(self, base: Path, adapter: Path, output: Path, *, count: int) -> None:
        self.output, self.work = output, WorkFolder(output)
        config = MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=output, device="cpu")
        self.plan = make_plan(config, "cpu")
        self.work.open(self.plan)
        with stream_of(self.plan, base, adapter, self.work) as stream:
            for number in range(count):
                self.work.note(self.plan, segment=stream.run(number, lambda: None))
        self.work.release()

    def part(self, segment: int) -> Path:
        return self.work.model / f"{self.plan.files[self.plan.segments[segment].file].name}.part"


@contextmanager
def stream_of(plan: Plan, base: Path, adapter: Path, work: WorkFolder) -> Iterator[Stream]:
    opener = lambda number: work.open_file(plan, number)  # noqa: E731
    stream = Stream(plan, base, (adapter,), opener, device=torch.device("cpu"), num_lanes=2)
    with full_precision(num_threads=1), closing(stream):
        yield stream


@pytest.fixture(params=["base", "packed_base"])
def halfway(request: pytest.FixtureRequest, adapter: Path, tmp_path: Path) -> tuple[Halfway, Path, Path]:
    base = request.getfixturevalue(request.param)
    expected = request.getfixturevalue({"base": "merged", "packed_base": "merged_nf4"}[request.param])
    return Halfway(base, adapter, tmp_path / "out", count=1), base, expected


def test_the_journal_gives_back_what_was_noted(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=3)
    segments = half.work.done(half.plan).segments
    crcs = tuple(segments[number].crc32 for number in half.plan.segments_of(0))
    shard = ShardRecord(file=0, nbytes=half.plan.files[0].nbytes, digest="ab" * 32, segment_crc32s=crcs)
    lies = [{"segment_crc32s": (7, *crcs[1:])}, {"segment_crc32s": crcs[1:]}, {"nbytes": 5}, {"file": -1}, {"file": 99}]
    for record in (replace(shard, **lies[0]), shard, *(replace(shard, **lie) for lie in lies)):
        half.work.note(half.plan, shard=record)
    done = WorkFolder(half.output).done(half.plan)
    assert sorted(done.segments) == [0, 1, 2]
    assert done.shards == {0: shard}, "what its segments' records contradict is no whole file"
    with stream_of(half.plan, base, adapter, half.work) as stream:
        again = [stream.run(number, lambda: None) for number in range(3)]
        assert [done.segments[number] for number in range(3)] == again, "a segment's record depends on it alone"
        assert all(stream.check(record, lambda: None) for record in again)


def test_torn_and_foreign_lines_of_a_journal_count_for_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=2)
    journal = next((half.work.path / "done").glob("*.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    foreign = json.dumps({**json.loads(lines[1]), "plan": "0" * 64}).encode() + b"\n"
    strange = b'[1]\n{"plan": 3}\n\xff\xfe\nnull\n{"plan": "x", "segment": []}\n' + b"[" * 100_000 + b"\n"
    wrong = [{"segment": {"segment": 0}}, {"segment": {**json.loads(lines[0])["segment"], "pieces": 5}}, {"shard": []}]
    odd = b"".join(json.dumps({"plan": half.plan.digest, **entry}).encode() + b"\n" for entry in wrong)
    journal.write_bytes(lines[0] + foreign + strange + odd + lines[1][: len(lines[1]) // 2])
    assert sorted(half.work.done(half.plan).segments) == [0]


def test_a_resumed_merge_keeps_what_is_finished_and_gives_equal_bytes(
    halfway: tuple[Halfway, Path, Path], adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half, base, expected = halfway
    written = half.part(0).stat().st_ino
    merge(base, adapter, half.output)
    assert tree(half.output) == tree(expected)
    assert f"resumed  1 of {len(half.plan.segments)} segments" in capfd.readouterr().err
    assert (half.output / half.part(0).name.removesuffix(".part")).stat().st_ino == written
    assert not half.work.path.exists()


def test_a_staged_segment_with_a_flipped_bit_is_done_again(
    halfway: tuple[Halfway, Path, Path], adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half, base, expected = halfway
    content = bytearray(half.part(0).read_bytes())
    content[half.plan.files[0].data_begin + 77] ^= 4
    half.part(0).write_bytes(content)
    merge(base, adapter, half.output)
    assert tree(half.output) == tree(expected)
    assert "resumed" not in capfd.readouterr().err


@pytest.mark.parametrize("harm", ["header", "shorter", "longer", "gone", "no manifest"])
def test_a_damaged_work_folder_is_repaired(harm: str, base: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=2)
    part, content = half.part(0), half.part(0).read_bytes()
    if harm == "gone":
        part.unlink()
    elif harm == "no manifest":
        (half.work.path / "manifest.json").unlink()
    else:
        part.write_bytes({"header": b"\0" * 64 + content[64:], "shorter": content[:500], "longer": content * 2}[harm])
    merge(base, adapter, half.output)
    assert tree(half.output) == tree(merged)


def test_a_merge_that_was_killed_while_it_wrote_the_manifest_is_begun_again(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=0)
    manifest = half.work.path / "manifest.json"
    killed = replacing(manifest)  # its body never ends
    os.write(killed.__enter__(), b"{")
    manifest.unlink()
    assert len([path for path in half.work.path.iterdir() if path.suffix == ".tmp"]) == 1
    merge(base, adapter, half.output)
    assert tree(half.output) == tree(merged)
    assert not half.work.path.exists()


def test_a_merge_that_stopped_at_any_segment_is_finished(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    total = len(Halfway(base, adapter, tmp_path / "0", count=0).plan.segments)
    assert total > 3
    for count in range(total + 1):
        half = Halfway(base, adapter, tmp_path / f"out{count}", count=count)
        merge(base, adapter, half.output)
        assert tree(half.output) == tree(merged), count


def test_a_stop_inside_a_segment_leaves_no_record_of_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=1)

    def stop() -> None:
        raise Interrupted("stopped by a signal")

    with stream_of(half.plan, base, adapter, half.work) as stream, pytest.raises(Interrupted):
        half.work.note(half.plan, segment=stream.run(1, stop))
    assert sorted(half.work.done(half.plan).segments) == [0]


@pytest.mark.parametrize("option", [("dtype", "float32"), ("max_shard_size", 1000), ("lora_alpha", 1.0)], ids=str)
def test_other_options_are_refused_by_name_and_the_work_is_kept(
    option: tuple[str, object], base: Path, adapter: Path, tmp_path: Path
) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=2)
    with pytest.raises(InputError, match="--" + option[0].replace("_", "-")):
        merge(base, adapter, half.output, **dict([option]))
    assert sorted(half.work.done(half.plan).segments) == [0, 1]


def test_after_a_refusal_the_right_command_resumes_in_the_same_process(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=2)
    with pytest.raises(InputError, match="--dtype"):
        merge(base, adapter, half.output, dtype="float32")
    merge(base, adapter, half.output)
    assert tree(half.output) == tree(merged)


@pytest.mark.parametrize("changed", ["base", "adapter", "weight", "side file"])
def test_other_inputs_are_refused(changed: str, base: Path, adapter: Path, other_adapter: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(base, tmp_path / "base"))
    half = Halfway(copied, adapter, tmp_path / "out", count=1)
    weighted = [(other_adapter if changed == "adapter" else adapter, 0.5 if changed == "weight" else 1.0)]
    if changed == "base":
        path = max(copied.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    if changed == "side file":
        edit_json(copied / "generation_config.json", temperature=0.5)
    with pytest.raises(InputError, match="holds an unfinished merge of other inputs or options"):
        merge(copied, weighted, half.output)
    assert not half.output.exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: os.utime(path, ns=(5, 5)), r"its time was [\d.]+, it is 0\.000"),
        (lambda path: path.write_bytes(b"\0" * 7), r"it had \d+ bytes, it has 7"),
    ],
    ids=["touched", "cut"],
)
def test_a_base_that_changed_during_the_merge_is_named_with_what_changed_and_the_work_is_thrown_away(
    harm: Callable[[Path], None], words: str, *, base: Path, adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(base, tmp_path / "base"))
    config = MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=tmp_path / "out", device="cpu")
    plan, work = make_plan(config, "cpu"), WorkFolder(tmp_path / "out")
    work.open(plan)
    check_unchanged(config, plan, work)
    path = max(base.glob("*.safetensors"))
    harm(path)
    with pytest.raises(MachineError, match=words) as caught:
        check_unchanged(config, plan, work)
    assert caught.value.where == str(path)
    assert not work.path.exists()


def test_what_an_nfs_client_keeps_of_open_files_that_are_gone_is_nobodys(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=1)
    (half.work.path / ".nfs000000000001").touch()  # of status.json, which somebody watches
    assert tree(merge(base, adapter, half.output)) == tree(merged)
    assert os.listdir(half.work.path) == [".nfs000000000001"]


def test_an_unfinished_merge_of_another_layout_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("distmerge.layout._data_begin", lambda tensors: 1 << 20)
        half = Halfway(base, adapter, tmp_path / "out", count=1)
    with pytest.raises(InputError, match="changed: the layout"):
        merge(base, adapter, half.output)


@pytest.mark.parametrize("plan", [{}, [], None, {"tasks": 5}, {"fingerprint": []}, {"files": [{}]}], ids=str)
def test_a_manifest_that_is_damaged_is_refused_and_not_a_crash(
    plan: object, base: Path, adapter: Path, tmp_path: Path
) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=1)
    path = half.work.path / "manifest.json"
    whole = json.loads(path.read_text())
    plan = {**whole["plan"], **plan} if isinstance(plan, dict) and plan else plan
    path.write_text(json.dumps({**whole, "plan": plan}))
    with pytest.raises(InputError, match="holds an unfinished merge"):
        merge(base, adapter, half.output)


def test_a_manifest_of_another_version_is_refused_as_that(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=1)
    (half.work.path / "manifest.json").write_text(encode({"version": 1, "plan": half.plan}))
    with pytest.raises(InputError, match="whose manifest is damaged, or of another version of distmerge"):
        merge(base, adapter, half.output)


def test_a_merge_that_another_one_overtakes_is_refused_and_leaves_its_output_alone(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, opened, published = tmp_path / "out", WorkFolder.open, {}

    def overtaken(self: WorkFolder, plan: Plan) -> str:
        monkeypatch.setattr(WorkFolder, "open", opened)
        published.update(tree(merge(base, adapter, out, dtype="float32")))
        return self.open(plan)

    monkeypatch.setattr(WorkFolder, "open", overtaken)
    with pytest.raises(InputError, match="holds the result of another merge"):
        merge(base, adapter, out)
    assert tree(tmp_path) == {f"out/{name}": digest for name, digest in published.items()}


def test_a_merge_that_its_equal_overtakes_is_done(
    base: Path, adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, opened = tmp_path / "out", WorkFolder.open

    def overtaken(self: WorkFolder, plan: Plan) -> str:
        monkeypatch.setattr(WorkFolder, "open", opened)
        merge(base, adapter, out)
        return self.open(plan)

    monkeypatch.setattr(WorkFolder, "open", overtaken)
    merge(base, adapter, out)
    assert tree(out) == tree(merged)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_refused_merge_leaves_the_whole_work_folder_of_the_other_as_it_was(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=2)
    half.work.write_status({"state": "merging", "exit_code": None})
    before = tree(half.work.path)
    with pytest.raises(InputError, match="holds an unfinished merge"):
        merge(base, adapter, half.output, dtype="float32")
    assert tree(half.work.path) == before
    assert json.loads((half.work.path / "status.json").read_text())["state"] == "merging"


def test_plan_refuses_what_merge_refuses_for_an_unfinished_merge(
    base: Path, adapter: Path, tmp_path: Path, distmerge: Command
) -> None:
    half = Halfway(base, adapter, tmp_path / "out", count=2)
    before = tree(tmp_path)
    args = ("--base", base, "--adapter", adapter, "--output", half.output, "--device", "cpu")
    told = [distmerge(verb, *args, "--dtype", "float32", code=3).stderr for verb in ("plan", "merge")]
    assert told[0].split("error: ")[1] == told[1].split("error: ")[1]
    assert "holds an unfinished merge" in told[0]
    distmerge("plan", *args)
    assert tree(tmp_path) == before
