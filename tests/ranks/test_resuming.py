"""Law 5: killed or stopped at any instant, the same command finishes the work and gives the same bytes."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Command, tree
from tests.ranks.conftest import Undisturbed
from tests.ranks.launching import Launch, assert_absent_or_whole, errors, finished_segments, journal, launch, status

pytestmark = pytest.mark.ranks

NUM_MOMENTS = 10
_hits: list[bool] = []


def _moments(seed: int) -> Iterator[tuple[str, int, float]]:
    """Who is killed, after how many journal lines (-1: before the plan is made), and how many seconds later."""
    draw = random.Random(seed)
    for number in range(NUM_MOMENTS):
        victim = ("rank", "launcher")[number % 2]
        if number < 2:
            yield victim, -1, draw.uniform(0.0, 2.0)
        else:
            yield victim, draw.randrange(0, 21), draw.uniform(0.0, 0.15)


def _reach(running: Launch, lines: int, delay: float) -> None:
    if lines < 0:
        running.until(lambda: len(running.ranks()) == 2, "ranks")
    else:
        running.until(running.work.joinpath("manifest.json").exists, "manifest")
        running.ranks()
        running.until_journal_has(lines)
    time.sleep(delay)


@pytest.mark.parametrize(("victim", "lines", "delay"), list(_moments(seed=20)))
def test_killed_at_any_moment_the_same_command_finishes(
    undisturbed: Undisturbed, tmp_path: Path, victim: str, lines: int, delay: float
) -> None:
    output = tmp_path / "merged"
    with launch(*undisturbed.args, output=output, nproc=2) as running:
        _reach(running, lines, delay)
        ranks = running.ranks()
        hit = running.process.poll() is None and not output.exists() and bool(ranks)
        _hits.append(hit)
        if victim == "launcher":
            running.process.kill()
        elif ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                ranks[random.Random(lines).choice(sorted(ranks))].kill()
        code = running.wait()
        started = time.monotonic()
        alive = running.survivors(20)
        print(
            f"{victim} killed after {lines} journal lines + {delay:.3f} s: {'hit' if hit else 'too late'}, "
            f"exit {code}, {len(journal(running.work))} lines left, "
            f"last rank gone after {time.monotonic() - started:.1f} s"
        )
        assert not alive, f"{[process.pid for process in alive]} outlive the {victim}\n{running.stderr}"
    if hit and victim == "rank":
        assert code == 5 or output.exists()
    assert_absent_or_whole(output, undisturbed.weights)
    with launch(*undisturbed.args, output=output, nproc=2) as again:
        assert again.wait() == 0, again.stderr
    assert tree(output) == undisturbed.files
    assert not again.work.exists()


def test_most_kills_hit_a_running_merge() -> None:
    if len(_hits) < NUM_MOMENTS:
        pytest.skip("only after all of the kills above")
    assert sum(_hits) > NUM_MOMENTS / 2, _hits


def test_a_restart_of_the_ranks_finishes_a_merge_in_which_one_was_killed(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    with launch(*undisturbed.args, output=output, nproc=2, torchrun=("--max-restarts=1",)) as running:
        assert running.until_journal_has(1)
        first = running.ranks()
        first[1].kill()
        assert running.wait() == 0, running.stderr
        assert not running.survivors(20)
    assert "resumed" in running.stderr
    assert tree(output) == undisturbed.files


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_stops_within_seconds_with_exit_75_and_says_so_once(
    undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals, nproc: int
) -> None:
    output = tmp_path / "merged"
    with launch(*undisturbed.args, output=output, nproc=nproc) as running:
        assert running.until_journal_has(1)
        running.ranks()
        running.process.send_signal(number)
        assert running.wait(20) == 75, running.stderr
        assert not running.survivors(20)
    assert errors(running.stderr) == [f"error: stopped by {number.name}"]
    assert running.stderr.count("resumes") == 1
    assert "Traceback" not in running.stderr
    assert not output.exists()
    assert finished_segments(running.work)
    assert status(output)["state"] == "failed"
    assert status(output)["exit_code"] == 75


def test_finished_segments_are_kept_and_a_changed_weight_is_refused(
    undisturbed: Undisturbed, distmerge: Command, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    with launch(*undisturbed.args, output=output, nproc=2) as running:
        assert running.until_journal_has(4)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(20) == 75, running.stderr
    kept = len(finished_segments(running.work))
    assert kept >= 4
    before = tree(running.work / "model")
    args = ("merge", *undisturbed.args, "--output", output, "--nproc", 1)
    refused = distmerge(*args, "--weight", 0.5, code=3)
    assert "adapter 1 --weight (1.0 -> 0.5)" in errors(refused.stderr)[0]
    assert tree(running.work / "model") == before
    resumed = distmerge(*args)
    found = re.search(r"resumed +(\d+) of (\d+) segments", resumed.stderr)
    assert found is not None, resumed.stderr
    assert (int(found[1]), int(found[2])) == (kept, len(undisturbed.plan.segments))
    assert tree(output) == undisturbed.files


def test_a_finished_segment_whose_bytes_have_changed_is_done_again(
    undisturbed: Undisturbed, distmerge: Command, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    with launch(*undisturbed.args, output=output, nproc=1) as running:
        assert running.until_journal_has(4)
        running.process.kill()
        running.wait(20)
    kept = finished_segments(running.work)
    piece = undisturbed.plan.segments[min(kept)].pieces[0]
    task = undisturbed.plan.tasks[piece.task]
    name = undisturbed.plan.files[task.file].name
    path = next(path for path in (running.work / "model").iterdir() if path.name in (name, f"{name}.part"))
    with path.open("r+b") as file:
        file.seek(task.begin + 2 * task.block(piece.first)[0])
        file.write(b"\xff" * 16)
    done = distmerge("merge", *undisturbed.args, "--output", output, "--nproc", 1)
    found = re.search(r"resumed +(\d+) of", done.stderr)
    assert found is not None
    assert int(found[1]) == len(kept) - 1
    assert tree(output) == undisturbed.files
