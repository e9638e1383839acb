"""Launches that a test interferes with: who runs, how far the work folder is, and nothing left behind afterwards."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from tests.conftest import digests, environment

PATIENCE = 120.0  # a launch takes seconds; a loaded machine takes longer


class Launch:
    """A merge that runs beside the test, by `--nproc` or by torchrun; its words are in `stderr` once it has ended."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str], output: Path) -> None:
        self.process = process
        self.output = output
        self.work = output.with_name(f"{output.name}.distmerge")
        self._log = log
        self._words = ""
        self._seen: dict[int, psutil.Process] = {}

    @property
    def stderr(self) -> str:
        if not self._log.closed:
            self._log.seek(0)
            self._words = self._log.read()
        return self._words

    def ranks(self) -> dict[int, psutil.Process]:
        """The live processes of this launch that have a RANK, or a name with one, by rank."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    # The environment that a forked rank was given is not to be seen from outside; its name is.
                    rank = child.environ().get("RANK", child.name().partition("distmerge-")[2] or None)
                    if rank is not None and child.status() != psutil.STATUS_ZOMBIE:
                        found[int(rank)] = self._seen[child.pid] = child
        return found

    def survivors(self, seconds: float) -> list[psutil.Process]:
        """The ranks that were ever seen and still live after `seconds`, or none as soon as there are none."""
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=seconds)
        return alive

    def wait(self, seconds: float = PATIENCE) -> int:
        return self.process.wait(timeout=seconds)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits for `condition` and returns what it gave; None if the launch ended before."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if value := condition():
                return value
            if self.process.poll() is not None:
                return condition() or None
            time.sleep(0.002)
        raise TimeoutError(f"no {what} after {PATIENCE} s\n{self.stderr}")

    def until_journal_has(self, count: int) -> bool:
        return bool(self.until(lambda: len(journal(self.work)) >= count, f"{count} journal lines"))

    def end(self) -> None:
        """Ends whatever of this launch still runs."""
        self.ranks()
        for process in (self.process, *self._seen.values()):
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        self.process.wait(timeout=30)
        self.survivors(30)
        _ = self.stderr


@contextlib.contextmanager
def launch(
    *args: object, output: Path, nproc: int, torchrun: tuple[str, ...] | None = None, **variables: str
) -> Iterator[Launch]:
    """`distmerge merge ARGS --output OUTPUT` on `nproc` ranks: by `--nproc`, or by torchrun with the given options."""
    merge = ["-m", "distmerge", "merge", *map(str, args), "--output", str(output)]
    if torchrun is None:
        command = [sys.executable, *merge, "--nproc", str(nproc)]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", *torchrun, *merge]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log, text=True, env=environment(**variables)
        )
        started = Launch(process, log, output)
        try:
            yield started
        finally:
            started.end()


def journal(work: Path) -> list[dict[str, Any]]:
    """Every whole line of every journal in the work folder."""
    lines = []
    for path in work.glob("done/*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            lines += path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def finished_segments(work: Path) -> set[int]:
    return {line["segment"]["segment"] for line in journal(work) if "segment" in line}


def errors(stderr: str) -> list[str]:
    """The lines that begin an error of ours."""
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def status(output: Path) -> dict[str, Any]:
    path = output.with_name(f"{output.name}.distmerge") / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def assert_absent_or_whole(output: Path, expected: dict[str, str]) -> None:
    """The output is not there or complete, and in the work folder only whole files have a weight file's name."""
    if output.exists():
        assert digests(output) == expected
    for name, digest in digests(output.with_name(f"{output.name}.distmerge") / "model").items():
        assert digest == expected[name], f"{name} has its final name and not its final bytes"


def pending(process: psutil.Process, number: signal.Signals) -> bool:
    """True if the signal waits for a stopped process, or the process is gone."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
