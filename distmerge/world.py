"""The ranks of a run and what they tell each other: the only door to torch.distributed.

The control plane is a client of the launcher's own store, under keys of this run and attempt: counters, small JSON
values, nothing else. No process group: it could not be set up again after an elastic restart, and tensors never
cross ranks. What the store says is checked against the manifest on disk by those who act on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import DistError

from distmerge.errors import DistmergeError, Interrupted, MachineError, PeerFailed, UsageError
from distmerge.launcher import RUN_PREFIX, Ended, end, fork_ranks, listen, noting, rank_variables, start_ranks, watch
from distmerge.parent import die_with_parent, launched
from distmerge.redaction import redacted

_VALUE_NBYTES = 4 << 20  # the store drops a client that sends more than 8 MiB at once
_POLL_SECONDS = (0.002, 0.05)  # for each rank, since one store answers all; and at most
_CHECK_SECONDS = 0.2
_BEAT_SECONDS = 1.0
_GOODBYE_SECONDS = 30.0
_PARTING_SECONDS = 2.0  # after a failure: enough for the others to notice it and end without words
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands, as the launcher's environment says."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def num_nodes(self) -> int:
        return -(-self.size // self.local_size)

    @property
    def node(self) -> int:
        """The rank of the first process of this rank's node, whose ranks launchers number one after another."""
        return self.rank - self.local_rank % self.local_size


def launched_here() -> bool:
    """True in a rank that `launch` has started, which speaks for it about signals."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_PREFIX)


class World:
    """One rank's view of the run. Every waiting step has a name, notices failed and lost ranks, and ends."""

    def __init__(self, place: Place, store: Store, *, timeout: float) -> None:
        self.place = place
        self._store = store
        self._timeout = timeout
        each, most = _POLL_SECONDS
        self._poll = min(each * place.size, most)
        self._checked = 0.0
        self._watched = place.rank
        self._signal: int | None = None
        self._beats: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()
        self._set("host", {"host": socket.gethostname(), "pid": os.getpid()}, rank=place.rank)
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    @classmethod
    def join(cls, *, timeout: float) -> World:
        """The world that the environment describes: torchrun's, or this process alone."""
        if not launched():
            place = Place(rank=0, size=1, local_rank=0, local_size=1)
            return cls(place, HashStore(), timeout=timeout)
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", rank))
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # not told: every rank may be on its own node
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"the launcher's environment is incomplete ({error})", hint="start it with torchrun"
            ) from None
        die_with_parent()
        # torchrun's agent hosts the store; other launchers leave that to rank 0.
        host_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
        listener = listen(address, port, alone=size == local_size) if host_store else None
        try:
            store = TCPStore(
                address,
                port,
                size,
                is_master=host_store,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout),
                master_listen_fd=None if listener is None else listener.detach(),
            )
        except (DistError, RuntimeError) as error:
            raise MachineError(
                f"the store at {address}:{port} does not answer ({str(error).splitlines()[0][:120]})",
                where=f"rank {rank} on {socket.gethostname()}",
            ) from None
        run = os.environ.get("TORCHELASTIC_RUN_ID", "run")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        place = Place(rank=rank, size=size, local_rank=local_rank, local_size=local_size)
        return cls(place, PrefixStore(f"distmerge/{run}/{attempt}", store), timeout=timeout)

    # -- the verbs of a run

    def first(self, step: str, work: Callable[[], Any]) -> Any:
        """The JSON value that `work` returns on rank 0, on every rank."""
        if self.place.rank == 0:
            value = work()
            self._set(step, value)
            return value
        return self._get(step, ranks=(0,))

    def collect(self, step: str, value: Any) -> list[Any]:
        """Every rank's JSON value in the order of ranks, on rank 0; an empty list on the others."""
        self._set(step, value, rank=self.place.rank)
        if self.place.rank != 0:
            return []
        return [self._get(step, rank=rank, ranks=(rank,)) for rank in range(self.place.size)]

    def count(self, name: str) -> int:
        """Adds one to the counter `name` of the run and returns it: 1, 2, 3, ... each to exactly one caller."""
        with self._alive():
            return int(self._store.add(name, 1))

    def counted(self, name: str) -> int:
        """The counter `name` of the run."""
        with self._alive():
            return int(self._store.add(name, 0))

    def report(self, state: dict[str, Any]) -> None:
        """Leaves this rank's progress for whoever shows it."""
        self._set("report", state, rank=self.place.rank)

    def reports(self) -> list[dict[str, Any]]:
        """The last report of every rank, empty where there is none."""
        return [self._peek("report", rank) or {} for rank in range(self.place.size)]

    def watch(self, step: str) -> None:
        """Looks at one other rank, the next at each call. Raises MachineError where it has given no sign of life."""
        self._watched = (self._watched + 1) % self.place.size
        self._check_beats((self._watched,), step)

    def check(self) -> None:
        """Raises Interrupted after a signal and PeerFailed after another rank's failure; cheap to call often."""
        if self._signal is not None:
            raise Interrupted(
                f"stopped by {signal.Signals(self._signal).name}", hint="the same command resumes where it stopped"
            )
        if time.monotonic() - self._checked < _CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        with self._alive():
            failed = self._store.check(["failure"])
        if failed:
            failure = json.loads(self._store.get("failure"))
            if failure["rank"] != self.place.rank:
                raise PeerFailed(f"rank {failure['rank']} failed", exit_code=int(failure["exit_code"]))

    def fail(self, error: BaseException) -> bool:
        """Tells every rank that this one has failed. True if it is the first, and so the one to speak."""
        exit_code = error.exit_code if isinstance(error, DistmergeError) else 1
        what = redacted(str(error))[:2000]
        words = json.dumps({"rank": self.place.rank, "exit_code": exit_code, "what": what})
        try:
            won: bytes = self._store.compare_set("failure", "", words)
        except (DistError, RuntimeError):
            return True
        return bool(json.loads(won)["rank"] == self.place.rank)

    def failure(self) -> str:
        """What the first rank to fail has said; empty if the store does not tell."""
        with contextlib.suppress(DistError, RuntimeError, ValueError):
            if self._store.check(["failure"]):
                return str(json.loads(self._store.get("failure"))["what"])
        return ""

    def leave(self) -> None:
        """Ends this rank's part. Ranks wait for each other, since the store dies with its host."""
        self._over.set()
        self._heart.join()
        with contextlib.suppress(DistError, RuntimeError):
            self._store.set(f"bye/{self.place.rank}", "1")
            byes = [f"bye/{rank}" for rank in range(self.place.size)]
            patience = _PARTING_SECONDS if self._store.check(["failure"]) else _GOODBYE_SECONDS
            deadline = time.monotonic() + patience
            while not self._store.check(byes) and time.monotonic() < deadline:
                time.sleep(self._poll)

    # -- devices and signals

    def device(self, wanted: str) -> torch.device:
        """This rank's device: its LOCAL_RANKth accelerator, or the CPU. Raises UsageError if `wanted` is not there."""
        kind = device_type(wanted)
        if kind == "cpu":
            return torch.device("cpu")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits on every stream
        index = self.place.local_rank % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        return torch.device(kind, index)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """In the body, signals that ask to stop are noticed by `check`, but for those that were ignored before, as by
        nohup; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- the store

    def _beat(self) -> None:
        beats = 0
        while not self._over.wait(_BEAT_SECONDS):
            beats += 1
            try:
                self._store.set(f"beat/{self.place.rank}", str(beats))
            except (DistError, RuntimeError):
                return

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (DistError, RuntimeError) as error:
            if self._signal is not None:
                self.check()
            raise MachineError(
                f"the launcher's store is gone ({str(error).splitlines()[0][:120]})",
                where=f"rank {self.place.rank} on {socket.gethostname()}",
                hint="the launcher or its node was lost; the same command resumes",
            ) from None

    def _set(self, step: str, value: Any, *, rank: int | None = None) -> None:
        data = json.dumps(value).encode()
        parts = [data[i : i + _VALUE_NBYTES] for i in range(0, len(data), _VALUE_NBYTES)] or [b""]
        key = step if rank is None else f"{step}/{rank}"
        with self._alive():
            for number, part in enumerate(parts[1:], start=1):
                self._store.set(f"{key}#{number}", part.decode())
            self._store.set(key, f"{len(parts)}\n{parts[0].decode()}")

    def _get(self, step: str, *, ranks: tuple[int, ...], rank: int | None = None) -> Any:
        key = step if rank is None else f"{step}/{rank}"
        while True:
            self.check()
            with self._alive():
                if self._store.check([key]):
                    return self._parts(key)
            self._check_beats(ranks, step)
            time.sleep(self._poll)

    def _peek(self, step: str, rank: int) -> Any:
        with self._alive():
            return self._parts(f"{step}/{rank}") if self._store.check([f"{step}/{rank}"]) else None

    def _parts(self, key: str) -> Any:
        count, _, data = self._store.get(key).partition(b"\n")
        return json.loads(data + b"".join(self._store.get(f"{key}#{i}") for i in range(1, int(count))))

    def _check_beats(self, ranks: tuple[int, ...], step: str) -> None:
        now = time.monotonic()
        for rank in ranks:
            beat = ""
            with self._alive():
                if self._store.check([f"beat/{rank}"]):
                    beat = self._store.get(f"beat/{rank}").decode()
            last, since = self._beats.setdefault(rank, (beat, now))
            if beat != last:
                self._beats[rank] = (beat, now)
            elif rank != self.place.rank and now - since > self._timeout:
                host = (self._peek("host", rank) or {}).get("host", "an unknown host")
                raise MachineError(
                    f"no sign of life for {self._timeout:g} s (waiting for {step!r})",
                    where=f"rank {rank} on {host}",
                    hint="the same command resumes; --timeout sets how long to wait",
                )


def device_type(wanted: str) -> str:
    """The device type that `wanted` (`auto`, `cpu`, `cuda`, ...) means here. Raises UsageError if it is not there."""
    if wanted == "cpu":
        return "cpu"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None and found.type == "mps":  # it has neither float64 nor pinned memory
        found = None
    if wanted == "auto" and found is None:
        return "cpu"
    if found is None or wanted not in ("auto", found.type):
        raise UsageError(f"device {wanted!r} is not on this machine", hint="--device auto takes what is there")
    return found.type


def default_nproc(device: str) -> int:
    """The ranks that `--nproc auto` means: one for each accelerator, one on the CPU."""
    return 1 if device_type(device) == "cpu" else torch.accelerator.device_count()


def can_fork(device: str) -> bool:
    """True if a process that has imported torch and done nothing with it may fork ranks for `device`: on Linux, where
    there is no accelerator, or none is wanted. No accelerator is initialised, for that could not be forked."""
    if sys.platform != "linux" or device == "cpu":
        return sys.platform == "linux"
    built_for = torch.accelerator.current_accelerator()  # asks no driver
    if built_for is None or built_for.type != "cuda":
        return built_for is None
    before = os.environ.get(_NVML_CHECK)
    os.environ[_NVML_CHECK] = "1"  # the only way of torch to ask without initialising CUDA
    try:
        return not torch.cuda.is_available()
    finally:
        del os.environ[_NVML_CHECK]
        if before is not None:
            os.environ[_NVML_CHECK] = before


def launch(nproc: int, argv: list[str], *, fork: bool) -> int | None:
    """Runs `python -m distmerge ARGV` as `nproc` ranks of this machine, with the environment of torchrun and a store
    that this process hosts; with `fork` they are forks of it, which need not import torch again.

    Returns 0, or the exit code of the first rank that failed; None in a rank that was forked, whose work is still to be
    done. The ranks speak for themselves; only a rank that was killed is named here.
    """
    address, run_id = "127.0.0.1", uuid.uuid4().hex
    with noting() as noted, socket.create_server((address, 0), backlog=max(nproc, 128)) as listener:
        port, own_threads = listener.getsockname()[1], bool(os.environ.get("OMP_NUM_THREADS"))
        variables = [rank_variables(r, nproc, run_id=run_id, address=address, port=port) for r in range(nproc)]
        if not own_threads:  # as torchrun does: the ranks are the threads
            variables = [{**own, "OMP_NUM_THREADS": "1"} for own in variables]
        try:
            ranks = fork_ranks(variables, noted) if fork else start_ranks(argv, variables)
        except OSError as error:
            raise MachineError(f"ranks cannot be started ({error.strerror})", where=socket.gethostname()) from None
        if ranks is None:
            if not own_threads:
                torch.set_num_threads(1)
            return None
        try:  # a thread serves the store, and a process with threads must not be forked: only now
            store = TCPStore(address, port, nproc, True, wait_for_workers=False, master_listen_fd=listener.detach())
        except BaseException:
            end(ranks)
            raise
        ended = watch(ranks, noted)
        del store  # the ranks were its clients until now
    return _exit_code(ended)


def _exit_code(ended: Ended) -> int:
    if ended.rank is None:
        return 0
    if ended.stopped_by is not None:
        raise Interrupted(f"stopped by {ended.stopped_by.name}", hint="the same command resumes where it stopped")
    if ended.exit_code == Interrupted.exit_code:
        raise Interrupted(f"rank {ended.rank} was stopped", hint="the same command resumes where it stopped")
    if ended.exit_code < 0:
        name = signal.Signals(-ended.exit_code).name
        raise MachineError(
            f"killed by {name}",
            where=f"rank {ended.rank} on {socket.gethostname()} (pid {ended.pid})",
            hint="out of memory? the same command resumes" if name == "SIGKILL" else "the same command resumes",
        )
    return ended.exit_code
