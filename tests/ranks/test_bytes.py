"""Law 1: the bytes of the output do not depend on the number of ranks, on the budget, or on who starts the ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distmerge.config import parse_nbytes
from distmerge.errors import InputError
from distmerge.runlog import read_run_log
from tests import factories
from tests.conftest import Command, environment, tree
from tests.ranks.conftest import Undisturbed
from tests.ranks.launching import launch

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("nproc", "torchrun", "budget"),
    [(4, None, "128MiB"), (3, (), "2GiB"), (5, (), "128MiB")],
    ids=["launcher-4-small-budget", "torchrun-3", "torchrun-5-small-budget"],
)
def test_every_file_is_the_same_for_every_number_of_ranks_and_every_budget(
    undisturbed: Undisturbed, tmp_path: Path, nproc: int, torchrun: tuple[str, ...] | None, budget: str
) -> None:
    output = tmp_path / "merged"
    with launch(*undisturbed.args, "--memory-budget", budget, output=output, nproc=nproc, torchrun=torchrun) as running:
        assert running.wait() == 0, running.stderr
    assert tree(output) == undisturbed.files
    assert not running.work.exists()


def test_one_process_with_the_smallest_budget_gives_the_same_bytes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    folders = (undisturbed.base, undisturbed.adapter, tmp_path / "merged")
    with pytest.raises(InputError) as refused:
        factories.merge(*folders, memory_budget=1 << 20)
    smallest = parse_nbytes(refused.value.hint.removeprefix("--memory-budget "))
    assert tree(factories.merge(*folders, memory_budget=smallest)) == undisturbed.files


@pytest.mark.parametrize(("shard", "digest"), [("50GB", "none"), ("20KB", "crc32")])
def test_more_ranks_than_segments_or_many_tiny_shards(
    distmerge: Command, adapter: Path, tmp_path: Path, *, shard: str, digest: str
) -> None:
    base, largest = factories.save_packed_base(tmp_path / "nf4", shard=shard), shard.replace("20KB", "60KB")
    factories.merge(base, adapter, tmp_path / "one", max_shard_size=parse_nbytes(largest), digest=digest)
    args = ("merge", "--base", base, "--adapter", adapter, "--max-shard-size", largest, "--digest", digest)
    distmerge(*args, "--output", tmp_path / "three", "--nproc", 3)
    one = tree(tmp_path / "one")
    assert tree(tmp_path / "three") == one
    assert (sum(name.endswith(".safetensors") for name in one) == 1) == (shard == "50GB")


def test_a_packed_output_of_a_simulated_base_is_the_same_on_three_ranks(
    distmerge: Command, base: Path, adapter: Path, tmp_path: Path
) -> None:
    args = ("merge", "--base", base, "--adapter", adapter, "--simulate-quant", "nf4", "--quantize", "nf4")
    args += ("--quantize-mode", "fitted", "--max-shard-size", "60KB", "--output")
    packed = {"simulate_quant": "nf4", "quantize": "nf4", "quantize_mode": "fitted", "max_shard_size": 60_000}
    factories.merge(base, adapter, tmp_path / "one", **packed)
    distmerge(*args, tmp_path / "three", "--memory-budget", "128MiB", "--nproc", 3)
    assert tree(tmp_path / "three") == tree(tmp_path / "one")


def test_a_second_run_of_the_same_command_leaves_the_output_alone(
    torchrun: Command, base: Path, adapter: Path, tmp_path: Path
) -> None:
    output = factories.merge(base, adapter, tmp_path / "merged")
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    again = torchrun("merge", "--base", base, "--adapter", adapter, "--output", output, nproc=2)
    assert again.stderr.count("holds the result of this merge already") == 1
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_variables_do_not_change_what_a_call_from_python_writes(base: Path, adapter: Path, tmp_path: Path) -> None:
    expected = factories.merge(base, adapter, tmp_path / "out1")
    call = (
        "import sys; from pathlib import Path; from distmerge import AdapterChoice, MergeConfig, merge; "
        "base, lora, out = map(Path, sys.argv[1:]); "
        "merge(MergeConfig(base=base, adapters=(AdapterChoice(folder=lora),), output=out, nproc=2, device='cpu'))"
    )
    variables = environment(DISTMERGE_MAX_SHARD_SIZE="30KB", DISTMERGE_DTYPE="float32", DISTMERGE_OVERWRITE="1")
    command = [sys.executable, "-c", call, str(base), str(adapter), str(tmp_path / "out2")]
    subprocess.run(command, check=True, timeout=240, env=variables)
    assert tree(tmp_path / "out2") == tree(expected)


def test_a_run_log_tells_of_every_rank_and_segment_and_leaves_the_output_as_it_is(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output, log = tmp_path / "merged", tmp_path / "run.jsonl"
    with launch(*undisturbed.args, "--run-log", log, output=output, nproc=2, torchrun=None) as running:
        assert running.wait() == 0, running.stderr
    assert tree(output) == undisturbed.files
    ranks = read_run_log(log)
    assert [rank.rank for rank in ranks] == [0, 1]
    spans = [span for rank in ranks for span in rank.spans]
    assert sorted(span.segment for span in spans) == list(range(len(undisturbed.plan.segments)))
    assert all(span.nbytes == undisturbed.plan.segments[span.segment].nbytes for span in spans)
    busy = [rank for rank in ranks if rank.spans]  # on a machine that is loaded one of them may do everything
    assert all(rank.profile is not None and rank.profile.compute > 0 for rank in busy)
    assert [rank.profile.publish > 0 for rank in ranks if rank.profile] == [True, False]
    assert all(rank.start <= rank.spans[0].start < rank.spans[-1].end <= rank.end for rank in busy)
