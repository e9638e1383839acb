"""The launcher that started this process: no rank outlives it. Imports no torch, so that it can be told early."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def launched() -> bool:
    """True in a process that torchrun, or another launcher with its variables, has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel for a SIGTERM when the process that started this one dies (Linux only); sends it at once if that
    was `parent` and is gone already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def name_process(name: str) -> None:
    """Gives this process a name of up to 15 characters that `ps` and `top` show (Linux only)."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


def _prctl(option: int, value: object) -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(option, value)
