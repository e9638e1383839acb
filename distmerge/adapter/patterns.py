"""Regular expressions from strangers: checked before they are used, and bounded in time."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Literal

from distmerge.errors import InputError, printable

_MAX_LENGTH = 1000
_LITERAL = re.compile(r"[\w.-]+", re.ASCII)
_SECONDS = 2.0
_LIMITS = threading.local()
_MATCHING = """
import functools, json, re, resource, sys
compiled = functools.cache(re.compile)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]),) * 2)
for line in sys.stdin:
    way, pattern, text = json.loads(line)
    found = getattr(compiled(pattern), way)(text)
    print(json.dumps(None if found is None else found.groupdict()), flush=True)
"""


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
        self._regular: list[tuple[int, str]] = []
        self._literal: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for number, pattern in enumerate(patterns):
            if _LITERAL.fullmatch(pattern):
                dots = tuple(i for i, character in enumerate(pattern) if character == ".")
                self._literal.setdefault(len(pattern), {}).setdefault(dots, {})[pattern] = number
            else:
                self._regular.append((number, module_pattern(pattern)))

    def values(self, module: str) -> list[Any]:
        """The values of all patterns that match `module`, in the order of the file."""
        if not self._values:
            return []
        found = {number for number, pattern in self._regular if matched("match", pattern, module) is not None}
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
            pattern = self._pattern
            return pattern == "all-linear" or bool(pattern and matched("fullmatch", pattern, module) is not None)
        parts = module.split(".")
        return any(".".join(parts[-1 - dots :]) in self._ends for dots in self._dots if dots < len(parts))

    def lists(self, module: str) -> bool:
        """True if the list has the module by its whole name."""
        return module in self._ends


def tails(module: str) -> list[str]:
    """`module` and what remains of it after each dot."""
    return [module, *(module[i + 1 :] for i, character in enumerate(module) if character == ".")]


def matched(way: Literal["match", "fullmatch"], pattern: str, text: str) -> dict[str, str | None] | None:
    """The named groups of the match of `pattern` at the start of `text`, or with all of it; None if there is none.
    Under a `time_limit` outside of the main thread a process of its own does the matching."""
    matcher: _Matcher | None = getattr(_LIMITS, "matcher", None)
    if matcher is not None:
        return matcher.matched(way, pattern, text)
    found = getattr(_compiled(pattern), way)(text)
    return None if found is None else found.groupdict()


_compiled = functools.lru_cache(1 << 14)(re.compile)  # an adapter may have more patterns than re itself remembers


@contextlib.contextmanager
def time_limit(where: str, *, num_names: int = 0) -> Iterator[None]:
    """Raises InputError when matching in the body takes longer than a few seconds of CPU time, and a millisecond for
    each of `num_names`: a pattern may take time that is exponential in a name's length.

    In the main thread a signal ends it. Signals reach no other thread, and a match lets no other run: there, and where
    the signal has a handler that Python cannot give back, what `matched` is asked goes to a process that has the limit,
    and the rest of the body is unbounded.
    """
    seconds = _SECONDS + num_names / 1000
    in_main = threading.current_thread() is threading.main_thread()
    with (_signalled if in_main and signal.getsignal(signal.SIGPROF) is not None else _sent)(where, seconds):
        yield


def _too_long(where: str, seconds: float) -> InputError:
    return InputError(
        f"matching its patterns takes more than {seconds:g} s of CPU time",
        where=where,
        hint="simplify rank_pattern, alpha_pattern or target_modules",
    )


@contextlib.contextmanager
def _signalled(where: str, seconds: float) -> Iterator[None]:
    end = time.thread_time() + seconds

    def expire(number: int, frame: FrameType | None) -> Any:
        if (left := end - time.thread_time()) <= 0:
            raise _too_long(where, seconds)
        signal.setitimer(signal.ITIMER_PROF, left)  # it counts what other threads take, too

    before = signal.signal(signal.SIGPROF, expire)
    timer = signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, *timer)  # of the limit around this one, or of a profiler
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _sent(where: str, seconds: float) -> Iterator[None]:
    before = getattr(_LIMITS, "matcher", None)
    _LIMITS.matcher = matcher = _Matcher(where, seconds)
    try:
        yield
    finally:
        _LIMITS.matcher = before
        matcher.close()


class _Matcher:
    """A process that matches, a line of JSON for each question and each answer, until its CPU time is up."""

    def __init__(self, where: str, seconds: float) -> None:
        self._where, self._seconds = where, seconds
        self._process: subprocess.Popen[str] | None = None

    def matched(self, way: str, pattern: str, text: str) -> dict[str, str | None] | None:
        if self._process is None:
            command = [sys.executable, "-I", "-S", "-c", _MATCHING, str(math.ceil(self._seconds))]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)  # noqa: S603 - our own lines
        questions, answers = self._process.stdin, self._process.stdout
        if questions is None or answers is None:
            raise TypeError("a process without pipes")
        line = ""
        with contextlib.suppress(OSError):  # it is gone
            questions.write(json.dumps([way, pattern, text]) + "\n")
            questions.flush()
            line = answers.readline()
        if not line:
            raise _too_long(self._where, self._seconds)
        found: dict[str, str | None] | None = json.loads(line)
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()
