"""The working memory of a rank on this machine: what it was given, or what the machine leaves, whichever is less."""

from __future__ import annotations

import os

from distmerge.errors import MachineError
from distmerge.plan import Plan
from distmerge.storage.memory import memory_left


def budget_here(plan: Plan, memory_budget: int, local_size: int, *, begun: bool = False) -> int:
    """Bytes of working memory of one of `local_size` ranks of this machine: no more than `memory_budget`, and than its
    part of what the machine, control groups and the address space leave.

    Raises MachineError if that is less than one lane needs. Where the ranks have `begun`, others may have taken their
    parts before: then this one takes what one lane needs, and it is an error only if not even that is left.
    """
    # The safetensors library maps whole files, which at the end are held against it.
    mapped, needed = max(file.nbytes for file in plan.files), plan.least_nbytes
    part = memory_left(local_size, mapped_nbytes=mapped)
    sharers = 1 if begun else local_size
    limit = memory_left(sharers, mapped_nbytes=mapped)
    if limit.left < needed:
        raise MachineError(
            f"a rank needs {needed:,} bytes of memory for one block and the largest factors, {limit.name} of "
            f"{limit.nbytes:,} leaves {limit.left:,} to each of {sharers}",
            where=f"pid {os.getpid()}",
            hint="fewer ranks, or a machine or a job with more memory; the same command resumes",
        )
    return min(memory_budget, max(part.left, needed))
