"""The law of every target: bytes are taken, or refused in words that a person can read; nothing else happens.

What is taken must be what another reader makes of the same bytes: each target says which. Time and memory are bounded
from outside: 5 s an input, 500 MB more than the imports take (`fuzz.__main__`).
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distmerge.errors import DistmergeError, InputError

LONGEST_MESSAGE = 4000
SECONDS = 5
NBYTES = 500 << 20
SCRATCH = "FUZZ_SCRATCH"  # variable: a folder that whoever gave it removes
CORPUS = Path(__file__).parent / "corpus"

T = TypeVar("T")


def taken(call: Callable[[], T], *, error: type[DistmergeError] = InputError, where: bool = True) -> T | None:
    """What `call` returns, or None if it was refused: by exactly `error`, in a short message without control
    characters, which says what and, but for parts of a file that do not know, `where`. Anything else passes through."""
    try:
        return call()
    except DistmergeError as refusal:
        assert type(refusal) is error, repr(refusal)
        assert refusal.what
        assert refusal.where or not where, f"says not where: {refusal}"
        message = str(refusal)
        assert len(message) < LONGEST_MESSAGE, len(message)
        assert all(character.isprintable() or character == "\n" for character in message), repr(message)
        return None


@functools.cache
def scratch() -> Path:
    """A folder of this process, in memory where there is such a file system, gone at its end."""
    if given := os.environ.get(SCRATCH):
        return Path(given)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="distmerge-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def corpus(target: str) -> list[Path]:
    """The seeds and the regressions of `target`, in the order of their names."""
    return sorted((CORPUS / target).iterdir())
