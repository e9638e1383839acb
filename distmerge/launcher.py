"""The ranks of this machine that `--nproc` asks for: forked, or started as programs, and watched until all have ended.

Imports no torch: what a rank is told, it is told by the environment variables of torchrun.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from distmerge.parent import die_with_parent, name_process

RUN_PREFIX = "distmerge-nproc-"  # no name that people would give to a run of torchrun
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_POLL_SECONDS = 0.01
_HEARING_SECONDS = 2.0
_GRACE_SECONDS = 30.0
_BACKLOG = 2048  # as many as ranks may come at once


class Process(Protocol):
    """A rank that was started; `poll` gives its exit code, minus the signal that ended it, or None while it runs."""

    pid: int

    def poll(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How the ranks ended: the first that failed, with its exit code or minus the signal that killed it; and the last
    signal that asked this process to stop. None where there is none."""

    rank: int | None = None
    pid: int | None = None
    exit_code: int = 0
    stopped_by: signal.Signals | None = None


class _Fork:
    """A forked rank."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def listen(address: str, port: int, *, alone: bool) -> socket.socket | None:
    """A socket for the store that listens at `address` and nowhere else, as torch's own would; None where that might
    not be what other nodes see of this one, or cannot be had. `alone` says that all ranks are on this machine."""
    with contextlib.suppress(ValueError, OSError):
        if not alone:
            ipaddress.ip_address(address)  # a name may mean another interface there
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=_BACKLOG)
    return None


def rank_variables(rank: int, size: int, *, run_id: str, address: str, port: int) -> dict[str, str]:
    """The environment variables that torchrun would give to `rank`, of `size` on one machine, where this process hosts
    the store at `address` and `port`."""
    return {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")},
        **{name: str(size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")},
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"{RUN_PREFIX}{run_id}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }


def fork_ranks(variables: Sequence[dict[str, str]], noted: deque[signal.Signals]) -> list[Process] | None:
    """Forks a rank for each set of variables, in a session of its own, as torchrun starts its ranks; None in a rank.

    The process must have a single thread, and nothing in it may have run that does not survive a fork. The signals that
    are `noted` already it passes on itself: they are not for the ranks to take. Raises OSError.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parent, ranks = os.getpid(), list[Process]()
    try:
        for rank, own in enumerate(variables):
            pid = os.fork()
            if pid == 0:
                noted.clear()
                os.setsid()
                die_with_parent(parent)
                name_process(f"distmerge-{rank}")
                os.environ.update(own)
                return None
            ranks.append(_Fork(pid))
    except BaseException:
        end(ranks)
        raise
    return ranks


def start_ranks(argv: list[str], variables: Sequence[dict[str, str]]) -> list[Process]:
    """Starts `python -m distmerge ARGV` with each set of variables, in a session of its own, as torchrun does.

    Unlike there, nothing is imported from the working folder, which may be that of a base."""
    ranks = list[Process]()
    # The ranks get every choice as an option; a variable would fill in what is left at its default.
    common = {name: value for name, value in os.environ.items() if not name.startswith("DISTMERGE_")}
    common |= _importable()
    try:
        for own in variables:
            command = [sys.executable, "-P", "-m", "distmerge", *argv]
            ranks.append(subprocess.Popen(command, env={**common, **own}, start_new_session=True))  # noqa: S603 - this program
    except BaseException:
        end(ranks)
        raise
    return ranks


def _importable() -> dict[str, str]:
    """The variable by which another Python finds this very package, where it is not installed."""
    package = str(Path(__file__).parents[1])
    if package in (*site.getsitepackages(), site.getusersitepackages()):
        return {}
    return {"PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])}


def watch(ranks: Sequence[Process], noted: deque[signal.Signals]) -> Ended:
    """Waits until every rank has ended; passes on the signals that are `noted`. After one rank has failed the others
    are asked to end, where they have not heard of it by themselves, and killed where they do not."""
    left, ended, stopped_by = dict(enumerate(ranks)), Ended(), None
    ask = kill = float("inf")
    try:
        while left:
            while noted:
                stopped_by = noted.popleft()
                _tell(left.values(), stopped_by)
                kill = min(kill, time.monotonic() + _GRACE_SECONDS)
            for rank, process in list(left.items()):
                if (exit_code := process.poll()) is None:
                    continue
                del left[rank]
                if exit_code != 0 and ended.rank is None:
                    ended = Ended(rank=rank, pid=process.pid, exit_code=exit_code)
                    # One that was killed could not tell the others; otherwise they know, and one may be speaking.
                    knows = exit_code > 0 or stopped_by is not None
                    ask = time.monotonic() + (_HEARING_SECONDS if knows else 0)
                    kill = min(kill, ask + _GRACE_SECONDS)
            if time.monotonic() >= ask:
                _tell(left.values(), signal.SIGTERM)
                ask = float("inf")
            if time.monotonic() >= kill:
                _tell(left.values(), signal.SIGKILL)
            if left:
                time.sleep(_POLL_SECONDS)
    finally:
        end(left.values())
    noted.clear()  # there is nobody left to stop
    return replace(ended, stopped_by=stopped_by)


def end(ranks: Iterable[Process]) -> None:
    """Kills what still runs of `ranks`."""
    for rank in ranks:
        _tell([rank], signal.SIGKILL)
        while rank.poll() is None:
            time.sleep(_POLL_SECONDS)


def _tell(ranks: Iterable[Process], number: signal.Signals) -> None:
    """Sends a signal to ranks that were not waited for yet, and to the processes that they have started."""
    for rank in ranks:
        try:
            os.killpg(rank.pid, number)
        except ProcessLookupError:  # it has no session of its own yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)


@contextlib.contextmanager
def noting() -> Iterator[deque[signal.Signals]]:
    """In the body, the signals that came and ask to stop; those that were ignored before still are. What nobody has
    taken by the end, as in a rank that was just forked, comes once more, to whoever was there before."""
    noted: deque[signal.Signals] = deque()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(signal.Signals(number))

    before = {n: signal.signal(n, note) for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how ranks end
    try:
        yield noted
    finally:
        for number, handler in before.items():
            if handler is not None:  # not one of Python's
                signal.signal(number, handler)
        for number in tuple(noted):
            signal.raise_signal(number)
