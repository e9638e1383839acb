"""How a merge is started and ended: on which processes, with which signals, and who speaks when it fails."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distmerge.clock import process_start
from distmerge.config import MergeConfig
from distmerge.errors import InputError, Interrupted, MachineError, PeerFailed, VerifyError, printable
from distmerge.lanes import memory_errors
from distmerge.merge import merge
from distmerge.parent import launched
from distmerge.progress import Display
from distmerge.receipt import read_receipt
from distmerge.storage.files import machine_error
from distmerge.work import WorkFolder
from distmerge.world import World, can_fork, default_nproc, launch, launched_here


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """A published merge: its folder, the adapter tensors in its ledger, its files and their bytes, and the seconds
    that this call took."""

    output: Path
    num_adapter_tensors: int
    num_files: int
    nbytes: int
    seconds: float


def run(config: MergeConfig, *, fresh: bool = False) -> MergeResult:
    """Merges as `config` says: as one rank under torchrun, on `config.nproc` new ranks of this machine, or in this
    process alone. Raises the errors of `merge`; of several ranks only the first to fail raises it with words.

    A `fresh` process, which has imported torch and done nothing with it, may be forked; it then returns in every rank.
    """
    started, since = time.monotonic(), process_start() if fresh else time.time()
    with _machine_errors(config):
        _run(config, since, fresh=fresh)
        receipt = read_receipt(config.output)
    if receipt is None:
        raise VerifyError("the output is gone", where=str(config.output))
    return MergeResult(
        output=config.output,
        num_adapter_tensors=len(receipt.ledger),
        num_files=len(receipt.files),
        nbytes=sum(file.bytes for file in receipt.files.values()),
        seconds=time.monotonic() - started,
    )


def _run(config: MergeConfig, since: float, *, fresh: bool) -> None:
    if not launched() and (nproc := config.nproc or default_nproc(config.device)) > 1:
        fork = fresh and config.nproc is not None and can_fork(config.device)  # default_nproc asks the accelerators
        exit_code = launch(nproc, ["merge", *config.to_argv()], fork=fork)
        if exit_code is None:
            _run_rank(config, since)
        elif exit_code:
            raise PeerFailed("a rank has failed", exit_code=exit_code)
    else:
        _run_rank(config, since)


def _run_rank(config: MergeConfig, since: float) -> None:
    world = World.join(timeout=config.timeout)
    with WorkFolder(config.output) as work:
        try:
            with world.interruptible(), _machine_errors(config):
                merge(config, work, world, Display(quiet=world.place.rank != 0), since)
            if world.place.rank == 0:
                work.drop_scratch(refused=False)
        except BaseException as error:
            if world.place.rank == 0 and isinstance(error, InputError):
                work.drop_scratch(refused=True)
            speaks, exit_code = world.fail(error), getattr(error, "exit_code", 1)
            # Every rank writes it: rank 0 showed progress there until it noticed.
            work.write_status({"state": "failed", "exit_code": exit_code, "error": world.failure() or str(error)})
            if not speaks or (isinstance(error, Interrupted) and launched_here()):
                raise PeerFailed("another rank has failed", exit_code=exit_code) from error
            raise
        finally:
            world.leave()


@contextlib.contextmanager
def _machine_errors(config: MergeConfig) -> Iterator[None]:
    """Turns what the system refused in the body, and no one nearer has put into words, into a MachineError."""
    try:
        with memory_errors():
            yield
    except OSError as error:
        raise machine_error(error, printable(str(error.filename or config.output))) from error
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        hint = "memory or processes are limited (ulimit -v, ulimit -u)"
        raise MachineError("no thread can be started", where=f"pid {os.getpid()}", hint=hint) from error
