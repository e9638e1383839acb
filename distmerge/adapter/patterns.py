"""Regular expressions from strangers: checked before they are used, and bounded in time."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from distmerge.errors import InputError, printable

_MAX_LENGTH = 1000
_SECONDS = 2.0


def module_pattern(pattern: str) -> str:
    """How PEFT applies a key of rank_pattern or alpha_pattern to a module's name (`get_pattern_key`)."""
    return rf"(.*\.)?({pattern})$"


def layer_pattern(pattern: str) -> str:
    """How PEFT finds a module's layer with layers_pattern; the group `layer` is its number."""
    return rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\."


def check_pattern(pattern: str, field: str, where: str, *, as_used: str = "") -> None:
    """Raises InputError if `pattern`, or the form in which it is used, is no regular expression or too long."""
    if len(pattern) > _MAX_LENGTH:
        raise InputError(f"a pattern of {field} has {len(pattern)} characters", where=where)
    try:
        re.compile(pattern)
        re.compile(as_used)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{field} holds {printable(pattern)!r}, no regular expression: {error}", where=where) from None


@contextlib.contextmanager
def time_limit(where: str) -> Iterator[None]:
    """Raises InputError when matching in the body takes longer than a few seconds: a pattern may take time that is
    exponential in a name's length. Works in the main thread, where signals arrive; elsewhere the body is unbounded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: FrameType | None) -> Any:
        raise InputError(
            f"matching its patterns takes longer than {_SECONDS:g} s",
            where=where,
            hint="simplify rank_pattern, alpha_pattern or target_modules",
        )

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
