"""The launcher that started this process: no rank outlives it. Imports no torch, so that it can be told early."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """True in a process that torchrun, or another launcher with its variables, has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def die_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the process that started this one dies (Linux only)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
