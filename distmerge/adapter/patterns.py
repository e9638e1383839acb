"""Regular expressions from strangers: checked before they are used, and bounded in time."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from distmerge.errors import InputError, printable

_MAX_LENGTH = 1000
_LITERAL = re.compile(r"[\w.-]+", re.ASCII)
_SECONDS = 4.0


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


class PatternTable:
    """The values of rank_pattern or alpha_pattern by module.

    Adapters may name each of thousands of modules. A pattern of word characters and dots is looked up instead of
    matched: every dot of it stands for any character, and it must begin at a component of the module's name.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._values = list(patterns.values())
        self._regular: list[tuple[int, re.Pattern[str]]] = []
        self._literal: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for number, pattern in enumerate(patterns):
            if _LITERAL.fullmatch(pattern):
                dots = tuple(i for i, character in enumerate(pattern) if character == ".")
                self._literal.setdefault(len(pattern), {}).setdefault(dots, {})[pattern] = number
            else:
                self._regular.append((number, re.compile(module_pattern(pattern))))

    def values(self, module: str) -> list[Any]:
        """The values of all patterns that match `module`, in the order of the file."""
        if not self._values:
            return []
        found = {number for number, pattern in self._regular if pattern.match(module)}
        for tail in tails(module):
            for dots, patterns in self._literal.get(len(tail), {}).items():
                characters = list(tail)
                for dot in dots:
                    characters[dot] = "."
                if (number := patterns.get("".join(characters))) is not None:
                    found.add(number)
        return [self._values[number] for number in sorted(found)]


class ModuleNames:
    """The modules that target_modules or exclude_modules means: those that a pattern matches as a whole, or whose names
    end with one of a list, at a dot. An empty pattern or list means none."""

    def __init__(self, names: str | tuple[str, ...]) -> None:
        self._pattern = names if isinstance(names, str) else None
        self._ends = frozenset() if isinstance(names, str) else frozenset(names)
        self._dots = sorted({name.count(".") for name in self._ends})

    def __contains__(self, module: str) -> bool:
        if self._pattern is not None:
            return self._pattern == "all-linear" or bool(self._pattern and re.fullmatch(self._pattern, module))
        parts = module.split(".")
        return any(".".join(parts[-1 - dots :]) in self._ends for dots in self._dots if dots < len(parts))

    def lists(self, module: str) -> bool:
        """True if the list has the module by its whole name."""
        return module in self._ends


def tails(module: str) -> list[str]:
    """`module` and what remains of it after each dot."""
    return [module, *(module[i + 1 :] for i, character in enumerate(module) if character == ".")]


@contextlib.contextmanager
def time_limit(where: str, *, num_names: int = 0) -> Iterator[None]:
    """Raises InputError when matching in the body takes longer than a few seconds, and a millisecond for each of
    `num_names`: a pattern may take time that is exponential in a name's length. Works in the main thread, where signals
    arrive; elsewhere the body is unbounded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    seconds = _SECONDS + num_names / 1000

    def expire(number: int, frame: FrameType | None) -> Any:
        raise InputError(
            f"matching its patterns takes more than {seconds:g} s of CPU time",
            where=where,
            hint="simplify rank_pattern, alpha_pattern or target_modules",
        )

    before = signal.signal(signal.SIGPROF, expire)
    left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, left)  # of the limit around this one, if there is one
        signal.signal(signal.SIGPROF, before)
