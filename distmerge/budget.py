"""The working memory of a rank on this machine: what it was given, or what the machine leaves, whichever is less."""

from __future__ import annotations

import os

from distmerge.errors import MachineError
from distmerge.plan import Plan
from distmerge.storage.memory import memory_left


def budget_here(plan: Plan, memory_budget: int, local_size: int) -> int:
    """Bytes of working memory of one of `local_size` ranks of this machine: no more than `memory_budget`, and than its
    part of what the machine, control groups and the address space leave.

    Raises MachineError if that is less than one lane needs.
    """
    # The safetensors library maps whole files, which at the end are held against it.
    limit = memory_left(local_size, mapped_nbytes=max(file.nbytes for file in plan.files))
    needed = plan.least_nbytes
    if limit.left < needed:
        raise MachineError(
            f"a rank needs {needed:,} bytes of memory for one block and the largest factors, {limit.name} of "
            f"{limit.nbytes:,} leaves {limit.left:,} to each of {local_size}",
            where=f"pid {os.getpid()}",
            hint="fewer ranks, or a machine or a job with more memory; the same command resumes",
        )
    return min(memory_budget, limit.left)
