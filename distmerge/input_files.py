"""The files that a merge is made from, and their digests: computed beside the merge, each by one rank."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from distmerge.adapter.saved.folders import find_weights
from distmerge.adapter.saved.training import config_path
from distmerge.checkpoint.base import INDEX
from distmerge.claim import file_order
from distmerge.clock import Clock, during
from distmerge.config import MergeConfig
from distmerge.errors import InputError, Interrupted
from distmerge.plan import INPUT_NBYTES, Plan
from distmerge.storage.files import open_input, read_exact
from distmerge.storage.hub import hub_sha256
from distmerge.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRecord:
    """A file of an input by name (`base/...`, `adapter 1/...`) with its digest, and whether the Hub has the same."""

    name: str
    sha256: str
    nbytes: int
    on_hub: bool


def input_files(plan: Plan, config: MergeConfig) -> dict[str, Path]:
    """The files of base and adapters by name: those with weights, the base's in the order in which they are read, and
    those that say what the weights are."""
    tasks = (task for number in file_order(plan) for task in plan.tasks_of(number) if not task.origin)
    weights = dict.fromkeys([*(task.source.data.file for task in tasks), *(mark.name for mark in plan.base_files)])
    found = {f"base/{name}": config.base / name for name in (*weights, INDEX, "config.json")}
    for number, adapter in enumerate(config.all_adapters, start=1):
        saved = find_weights(adapter.folder)
        paths = {name: saved.folder / name for name in saved.files}
        if (config_file := config_path(saved.folder)) is not None:
            paths[config_file.name] = config_file
        found |= {f"adapter {number}/{name}": path for name, path in paths.items()}
    return {name: path for name, path in found.items() if path.exists()}


class InputHashes:
    """Hashes the files of `plan`'s inputs, if it asks for that, in a thread beside the merge: the next file that no
    rank has taken, until none is left. A file that the Hub has another digest of is refused by name."""

    def __init__(self, plan: Plan, config: MergeConfig, world: World) -> None:
        self._files = list(input_files(plan, config).items()) if plan.hash_inputs else []
        self._world = world
        self._leaving = threading.Event()
        self._pool = ThreadPoolExecutor(1, "inputs")
        self.clock = Clock()
        self._end: Future[list[InputRecord]] | None = self._pool.submit(self._run) if self._files else None

    def close(self) -> None:
        """Ends the thread."""
        self._leaving.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def check(self) -> None:
        """Raises the error of a file that could not be hashed, or that the Hub knows with another digest."""
        if self._end is not None and self._end.done():
            self._end.result()

    def wait(self, timeout: float) -> bool:
        """True once every file that this rank has taken is hashed; waits for that as long as told, in seconds."""
        return self._end is None or not wait([self._end], timeout=timeout).not_done

    def records(self) -> tuple[InputRecord, ...]:
        """The records of the files that this rank has hashed, once it has."""
        return () if self._end is None else tuple(self._end.result())

    def _run(self) -> list[InputRecord]:
        records = []
        with self.clock:
            while (turn := self._world.count("input") - 1) < len(self._files):
                records.append(self._hash(*self._files[turn]))
        return records

    def _hash(self, name: str, path: Path) -> InputRecord:
        digest, offset, fd = hashlib.sha256(), 0, open_input(path)
        try:
            nbytes = os.fstat(fd).st_size
            buffer = memoryview(bytearray(min(INPUT_NBYTES, nbytes)))
            with during("digest"):
                while offset < nbytes:
                    if self._leaving.is_set():
                        raise Interrupted("the rank is ending")
                    piece = buffer[: nbytes - offset]
                    read_exact(fd, piece, offset, path)
                    digest.update(piece)
                    offset += len(piece)
        finally:
            os.close(fd)
        known, found = hub_sha256(path), digest.hexdigest()
        if known is not None and known != found:
            raise InputError(
                f"sha256 is {found}, that of the file on the Hub is {known}: it is not what was downloaded",
                where=str(path),
                hint="download it again (hf download --force-download); nothing was published",
            )
        return InputRecord(name=name, sha256=found, nbytes=nbytes, on_hub=known is not None)
