"""Inputs at the end of a merge: still those that its plan was made from, or all work on them was in vain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distmerge.adapter.screen import weights_digest
from distmerge.config import MergeConfig
from distmerge.errors import InputError, MachineError
from distmerge.layout import used_tensors
from distmerge.plan import Plan
from distmerge.storage.files import io_errors
from distmerge.work import WorkFolder


def check_unchanged(config: MergeConfig, plan: Plan, work: WorkFolder) -> None:
    """Raises MachineError, and removes the work folder, if a file of the base has another size or time than when the
    plan was made, or an adapter another digest: what was made of them is a mixture, whatever its checksums say."""
    if (changed := next(_changes(config, plan), None)) is not None:
        work.discard()
        raise MachineError(
            f"changed during the merge, which must be begun anew: {changed[1]}",
            where=str(changed[0]),
            hint="let nothing write to it or touch it, then run the same command again",
        )


def _changes(config: MergeConfig, plan: Plan) -> Iterator[tuple[Path, str]]:
    """The inputs that are not what was planned with, and what of them is another."""
    for mark in plan.base_files:
        path = config.base / mark.name
        found = _status(path)
        if found.st_size != mark.nbytes:
            yield path, f"it had {mark.nbytes} bytes, it has {found.st_size}"
        elif found.st_mtime_ns != mark.mtime_ns:
            yield path, f"its time was {mark.mtime_ns / 1e9:.6f}, it is {found.st_mtime_ns / 1e9:.6f} (Unix seconds)"
    for number, (choice, planned) in enumerate(zip(config.all_adapters, plan.adapters, strict=True)):
        used = used_tensors(plan.tasks, number) if planned.partial else ()
        try:
            same = weights_digest(choice.home, planned.files, used) == planned.weights_sha256
        except InputError:
            same = False
        if not same:
            yield choice.folder, "its weights have another digest"


def _status(path: Path) -> os.stat_result:
    with io_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # then a network file system asks its server
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)
