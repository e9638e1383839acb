"""Ranks of this machine: who is told to end, when, and what is said of it. The ranks are small programs."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch

from distmerge import launcher
from distmerge.errors import Interrupted, MachineError
from distmerge.launcher import Ended, end, noting, rank_variables, start_ranks, watch
from distmerge.world import _exit_code, can_fork

WAITS = "import sys, time; print('up', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}"


def started(*programs: str) -> list[subprocess.Popen[str]]:
    """A process for each program, in a session of its own, that has printed its first line if it is one that waits."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)
        for program in programs
    ]
    for rank, program in zip(ranks, programs, strict=True):
        if "print" in program:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "up\n"
    return ranks


def test_ranks_that_all_end_well_are_no_failure() -> None:
    assert watch(started("", "", ""), deque()) == Ended()


def test_the_first_rank_that_fails_is_named_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_HEARING_SECONDS", 0.1)
    ranks = started(WAITS, "raise SystemExit(3)", WAITS)
    assert watch(ranks, deque()) == Ended(rank=1, pid=ranks[1].pid, exit_code=3)
    assert [rank.returncode for rank in ranks] == [-signal.SIGTERM, 3, -signal.SIGTERM]


def test_a_rank_that_failed_by_itself_leaves_the_others_time_to_speak() -> None:
    speaks = "import time; print('up', flush=True); time.sleep(0.5); raise SystemExit(3)"
    ranks = started(speaks, "raise SystemExit(3)")
    assert watch(ranks, deque()).exit_code == 3
    assert ranks[0].returncode == 3


def test_a_killed_rank_ends_the_others_and_is_named() -> None:
    ranks = started(WAITS, WAITS)
    ranks[0].kill()
    ended = watch(ranks, deque())
    assert (ended.rank, ended.exit_code, ranks[1].returncode) == (0, -signal.SIGKILL, -signal.SIGTERM)
    with pytest.raises(MachineError, match=rf"rank 0 on .* \(pid {ranks[0].pid}\): killed by SIGKILL"):
        _exit_code(ended)


def test_a_rank_that_does_not_end_when_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.2)
    ranks = started(DEAF, WAITS)
    ranks[1].kill()
    assert watch(ranks, deque()).rank == 1
    assert ranks[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_and_is_named(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    ranks = started(WAITS, WAITS)
    with noting() as noted:
        os.kill(os.getpid(), number)
        ended = watch(ranks, noted)
    assert signal.getsignal(number) is before
    assert ended.stopped_by is number
    assert {rank.returncode for rank in ranks} <= {-number, 1}  # Python itself ends SIGINT
    with pytest.raises(Interrupted, match=f"stopped by {number.name}"):
        _exit_code(ended)


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with noting() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not noted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_nobody_took_comes_once_more_to_whoever_was_there_before() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with noting() as noted:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert [*noted] == [signal.SIGUSR1]
            assert seen == []
        assert seen == [signal.SIGUSR1]
        with noting() as noted:
            os.kill(os.getpid(), signal.SIGUSR1)
            watch(started(WAITS), noted)
        assert seen == [signal.SIGUSR1], "the ranks were told"
    finally:
        signal.signal(signal.SIGUSR1, before)


FORK = """
import os, signal, sys
from distmerge.launcher import fork_ranks, noting
def ranks():
    with noting() as noted:
        if sys.argv[1] == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        found = fork_ranks([{}], noted)
        if found is None and sys.argv[1] == "at once":
            os.kill(os.getpid(), signal.SIGTERM)
        if found is not None:
            noted.clear()
        return found
found = ranks()
if found is None:
    os._exit(7)
while (code := found[0].poll()) is None:
    pass
print(code)
"""


@pytest.mark.parametrize(("when", "code"), [("before", 7), ("at once", -signal.SIGTERM)])
def test_a_forked_rank_takes_signals_from_its_first_moment_and_leaves_earlier_ones_to_the_launcher(
    when: str, code: int
) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, when], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == code, done.stderr


def test_ranks_import_nothing_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("click", "torch", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    variables = [rank_variables(0, 1, run_id="x", address="127.0.0.1", port=5)]
    assert watch(start_ranks(["inspect", "--help"], variables), deque()) == Ended()
    assert not (tmp_path / "ran").exists()


def test_a_launcher_that_was_told_to_ignore_its_children_learns_how_they_end() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with noting() as noted:
            assert watch(started("raise SystemExit(3)"), noted).exit_code == 3
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_what_ended_well_though_it_was_asked_to_stop_is_done() -> None:
    assert _exit_code(Ended(stopped_by=signal.SIGTERM)) == 0


def test_a_rank_that_was_stopped_is_an_interruption() -> None:
    with pytest.raises(Interrupted, match="rank 2 was stopped"):
        _exit_code(Ended(rank=2, pid=1, exit_code=75))


def test_ended_ranks_leave_no_process_behind() -> None:
    ranks = started(DEAF, WAITS)
    end(ranks)
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2


def test_a_rank_is_told_what_torchrun_tells() -> None:
    from torch.distributed.elastic.agent.server import local_elastic_agent

    told = rank_variables(1, 3, run_id="x", address="127.0.0.1", port=5)
    names = set(re.findall(r'^\s+"([A-Z_]+)":', inspect.getsource(local_elastic_agent), re.MULTILINE))
    assert told.keys() - {"LOCAL_RANK"} <= names
    assert {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} <= told.keys() & names
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"], told["LOCAL_WORLD_SIZE"]) == ("1", "1", "3", "3")


@pytest.mark.parametrize(
    ("built_for", "there", "wanted", "may"),
    [
        (None, False, "auto", True),
        ("cuda", False, "auto", True),
        ("cuda", True, "auto", False),
        ("cuda", True, "cuda", False),
        ("cuda", True, "cpu", True),
        ("xpu", False, "auto", False),
        ("mps", True, "auto", False),
    ],
)
def test_ranks_are_forked_where_no_accelerator_is_or_is_wanted(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, there: bool, wanted: str, may: bool
) -> None:
    def is_available() -> bool:
        assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1", "asking CUDA itself forbids a fork"
        return there

    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: built_for and torch.device(built_for))
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert can_fork(wanted) is may
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
