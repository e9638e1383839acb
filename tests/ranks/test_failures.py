"""One rank's failure ends every rank, with one error, with the exit code of what happened, and with no output."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import factories
from tests.conftest import Command, environment
from tests.ranks.conftest import Undisturbed
from tests.ranks.launching import errors, launch, pending, status

pytestmark = pytest.mark.ranks


def _with_infinity(base: Path, folder: Path) -> Path:
    """A copy of `base` with one value that is not finite."""
    shutil.copytree(base, folder)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(folder / weight_map[name])
    tensors[name][5, 7] = torch.inf
    save_file(tensors, folder / weight_map[name], metadata={"format": "pt"})
    return folder


def test_a_value_that_one_rank_finds_not_finite_ends_all_with_exit_4(
    distmerge: Command, torchrun: Command, base: Path, adapter: Path, tmp_path: Path
) -> None:
    output, infinite = tmp_path / "merged", _with_infinity(base, tmp_path / "infinite")
    args = ("merge", "--base", infinite, "--adapter", adapter, "--output", output)
    by_torchrun, by_launcher = torchrun(*args, nproc=3, code=1), distmerge(*args, "--nproc", 2, code=4)
    for done, tracebacks in ((by_torchrun, 1), (by_launcher, 0)):  # the one is torchrun's own
        assert errors(done.stderr) == [
            "error: model.layers.1.mlp.down_proj.weight: the base holds values that are not finite"
        ]
        assert done.stderr.count("Traceback (most recent call last)") == tracebacks
        assert not output.exists()


def test_a_failure_stands_in_the_status_whichever_rank_it_was(
    undisturbed: Undisturbed, distmerge: Command, tmp_path: Path
) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(undisturbed.base, base)
    for path in base.glob("*.safetensors"):  # whichever rank meets one first
        tensors = load_file(path)
        for tensor in tensors.values():
            tensor[-1, -1] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
    done = distmerge(
        "merge", "--base", base, "--adapter", undisturbed.adapter, "--output", output, "--nproc", 3, code=4
    )
    assert len(errors(done.stderr)) == 1
    assert status(output)["state"] == "failed"
    assert status(output)["exit_code"] == 4


@pytest.mark.parametrize("started_by", ["torchrun", "launcher"])
def test_a_refusal_is_printed_once_and_writes_nothing(
    distmerge: Command, torchrun: Command, base: Path, tmp_path: Path, started_by: str
) -> None:
    wide = factories.save_adapter(
        tmp_path / "wide", model=factories.build_llama(torch.float32, hidden_size=128, intermediate_size=160)
    )
    before = {path.name for path in tmp_path.iterdir()}
    args = ("merge", "--base", base, "--adapter", wide, "--output", tmp_path / "merged")
    done = torchrun(*args, nproc=3, code=1) if started_by == "torchrun" else distmerge(*args, "--nproc", 3, code=3)
    assert len(errors(done.stderr)) == 1, done.stderr
    assert "_proj" in errors(done.stderr)[0]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_file_size_limit_is_exit_5_and_leaves_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    merge = [sys.executable, "-m", "distmerge", "merge", *map(str, undisturbed.args), "--output", str(output)]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 40000; exec "$@"', "bash", *merge, "--nproc", "2"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert len(errors(done.stderr)) == 1, done.stderr
    assert "EFBIG" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_ends_early_while_it_is_read_is_exit_5(undisturbed: Undisturbed, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(undisturbed.base, base)
    with launch("--base", base, "--adapter", undisturbed.adapter, output=output, nproc=2) as running:
        assert running.until_journal_has(1)
        ranks = running.ranks().values()
        for rank in ranks:
            rank.suspend()
        for path in base.glob("*.safetensors"):
            with path.open("r+b") as file:
                file.truncate(100_000)
        for rank in ranks:
            rank.resume()
        assert running.wait() == 5, running.stderr
    assert len(errors(running.stderr)) == 1, running.stderr
    # A file that a rank has open ends early; one that it opens only then is not the planned one.
    assert re.search("bytes early|no longer the file that the merge was planned with", errors(running.stderr)[0])
    assert str(base) in errors(running.stderr)[0]
    assert not output.exists()


def test_a_killed_rank_is_named_with_its_host(undisturbed: Undisturbed, tmp_path: Path) -> None:
    with launch(*undisturbed.args, output=tmp_path / "merged", nproc=2) as running:
        assert running.until_journal_has(1)
        running.ranks()[1].kill()
        assert running.wait() == 5, running.stderr
    assert len(errors(running.stderr)) == 1, running.stderr
    assert errors(running.stderr)[0].startswith(f"error: rank 1 on {socket.gethostname()}")
    assert "SIGKILL" in errors(running.stderr)[0]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_hangs_is_named_with_its_host_and_ends_the_others(
    undisturbed: Undisturbed, tmp_path: Path, silent: int
) -> None:
    with launch(*undisturbed.args, "--timeout", 5, output=tmp_path / "merged", nproc=2) as running:
        assert running.until_journal_has(1)
        ranks = running.ranks()
        ranks[silent].send_signal(signal.SIGSTOP)
        _, alive = psutil.wait_procs([ranks[1 - silent]], timeout=90)
        assert not alive, "the other rank waits for ever"
        # The launcher asks the silent rank to end, and would kill it after 30 s.
        running.until(lambda: pending(ranks[silent], signal.SIGTERM), "SIGTERM for the silent rank")
        ranks[silent].kill()
        assert running.wait() == 5, running.stderr
    assert len(errors(running.stderr)) == 1, running.stderr
    expected = f"error: rank {silent} on {socket.gethostname()}: no sign of life for 5 s"
    assert errors(running.stderr)[0].startswith(expected)


def test_a_rank_that_sees_another_adapter_ends_all_and_publishes_nothing(base: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        factories.save_adapter(tmp_path / f"rank{rank}" / "lora", seed=rank)
    output = tmp_path / "merged"
    args = f'--base {base} --adapter {tmp_path}/rank"$RANK"/lora --output {output} --device cpu'
    (tmp_path / "wrapper.sh").write_text(f"exec {sys.executable} -m distmerge merge {args}\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
    command = [*torchrun, "bash", str(tmp_path / "wrapper.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), check=False)
    assert done.returncode != 0
    assert len(errors(done.stderr)) == 1, done.stderr
    assert str(tmp_path / "rank1" / "lora") in errors(done.stderr)[0]
    assert not output.exists()
