"""A command run to its end while the memory of it and of everything it starts is watched."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_SAMPLE_SECONDS = 0.05
_SCAN_SECONDS = 0.5  # looking for new processes takes milliseconds of a core that the command could use
_KILO = 1024
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # each tool chooses its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A command that ended well: its seconds, what it printed, and peaks of resident memory in bytes, of all its
    processes at one instant, where pages that several of them share count once, and of the largest one. Pages of mapped
    files count where a process has touched them."""

    seconds: float
    stdout: str
    peak_nbytes: int
    process_peak_nbytes: int


@dataclass(slots=True)
class _Memory:
    """What is seen of a tree of processes, from now and then a look at it."""

    pid: int
    peak: int = 0
    largest: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        pids, scanned = [self.pid], time.monotonic()
        while not self.done.wait(_SAMPLE_SECONDS):
            if time.monotonic() - scanned > _SCAN_SECONDS:
                with contextlib.suppress(psutil.Error):
                    pids = [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]
                scanned = time.monotonic()
                self.peak = max(self.peak, sum(_field(pid, "smaps_rollup", "Pss:") for pid in pids))
            self.largest = max([self.largest, *(_field(pid, "status", "VmHWM:") for pid in pids)])


def watch(words: list[str], *, cwd: Path, env: dict[str, str] | None = None, cpus: set[int] | None = None) -> Finished:
    """Runs `words` in `cwd` with `env` added to the environment, on the cores `cpus` alone if they are given.

    Raises CalledProcessError, with the end of what it said on stderr printed, if it fails.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _THREADS}
    environment = {**inherited, "PYTHONPATH": str(Path(__file__).parents[1]), **(env or {})}
    if cpus is not None:
        words = [sys.executable, "-c", _PINNED, ",".join(map(str, sorted(cpus))), *words]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        child = subprocess.Popen(words, cwd=cwd, env=environment, stdout=out, stderr=err)
        memory = _Memory(child.pid)
        thread = threading.Thread(target=memory.watch)
        thread.start()
        try:
            code = child.wait()
            seconds = time.monotonic() - started
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            memory.done.set()
            thread.join()
        out.seek(0)
        err.seek(0)
        if code:
            print(err.read().decode(errors="replace")[-4000:], file=sys.stderr)
            raise subprocess.CalledProcessError(code, words)
        return Finished(
            seconds=seconds,
            stdout=out.read().decode(errors="replace"),
            peak_nbytes=max(memory.peak, memory.largest),
            process_peak_nbytes=memory.largest,
        )


_PINNED = (
    "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); os.execvp(sys.argv[2], sys.argv[2:])"
)


def _field(pid: int, file: str, name: str) -> int:
    """A field of a process in /proc, in bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * _KILO for line in lines if line.startswith(name)), 0)
