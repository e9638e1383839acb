"""Imports of a command that take seconds, as fast as they can be had."""

from __future__ import annotations

import gc
import sys
import threading
from importlib import import_module


def load(module: str) -> bool:
    """Imports `module` of distmerge, and torch with it. True if this process has done nothing yet: torch is new to it,
    and it has one thread."""
    if "torch" in sys.modules:
        import_module(module)
        return False
    gc.disable()  # what an import makes is no garbage
    try:
        import_module(module)
    finally:
        gc.freeze()  # nor will it ever be: it need not be looked through again, or taken apart at the end
        gc.enable()
    return threading.active_count() == 1
