"""Inputs at the end of a merge: still those that its plan was made from, or all work on them was in vain."""

from __future__ import annotations

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
    changed = None
    for mark in plan.base_files:
        path = config.base / mark.name
        with io_errors(path):
            found = path.stat()
        if (found.st_size, found.st_mtime_ns) != (mark.nbytes, mark.mtime_ns):
            changed = path
    for number, (choice, planned) in enumerate(zip(config.all_adapters, plan.adapters, strict=True)):
        used = used_tensors(plan.tasks, number) if planned.partial else ()
        try:
            same = weights_digest(choice.home, planned.files, used) == planned.weights_sha256
        except InputError:
            same = False
        if not same:
            changed = choice.folder
    if changed is not None:
        work.discard()
        raise MachineError(
            "changed during the merge, which must be begun anew", where=str(changed), hint="run the same command again"
        )
