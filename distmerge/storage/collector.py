"""Python's cycle collector, kept still while millions of objects are made of which none is in a cycle."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the collector still in the body. It looks at all living objects again whenever their number has grown by a
    quarter, which for the plan of a large model takes longer than making it; what is no longer used goes all the same,
    by its reference count."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # else they are the caller's, and stay frozen
                gc.freeze()
                gc.unfreeze()  # all is old now, and need not be looked at first
            gc.enable()
