"""The page cache of a machine, which every process on it shares."""

from __future__ import annotations

from distmerge.plan import Plan
from distmerge.storage.memory import memory_nbytes


def outgrows_cache(plan: Plan) -> bool:
    """True if what is read and written is too much for the page cache of this machine, or of the control group of this
    process. A model that fits stays there, since it may be wanted again; a larger one would only push everything else
    out."""
    nbytes_to_read = sum(mark.nbytes for mark in plan.base_files)
    return nbytes_to_read + plan.nbytes_to_write > memory_nbytes() // 2
