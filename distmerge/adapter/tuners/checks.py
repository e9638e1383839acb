"""A module with a tuner's tensors, and checks of what its configuration and its headers say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distmerge.adapter.patterns import PatternTable, check_pattern, module_pattern
from distmerge.errors import InputError, printable, shown

CONFIG = "adapter_config.json"
ANY = -1
"""Any size but 0, where a shape is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A module with a tuner's tensors: the configuration, and the shapes of tensors and of the (out, into) weight."""

    config: Mapping[str, Any]
    module: str
    shapes: Mapping[str, tuple[int, ...]]
    out: int
    into: int

    def shape(self, name: str, *expected: int) -> tuple[int, ...]:
        """The shape of tensor `name`, which must be `expected`; -1 stands for any size but 0."""
        found = self.shapes.get(name)
        if found is None:
            raise self.error(f"tensor {name!r} is missing", "the file is incomplete")
        fits = len(found) == len(expected) and all(
            size > 0 if want == ANY else size == want for size, want in zip(found, expected, strict=True)
        )
        if not fits:
            text = ", ".join("any" if want == ANY else str(want) for want in expected)
            raise self.error(
                f"tensor {name!r} has shape {found}, expected ({text}) for a weight ({self.out}, {self.into})",
                "base and adapter do not belong together, or the file is damaged",
            )
        return found

    def error(self, what: str, hint: str = "") -> InputError:
        """An error about this module's tensors."""
        return InputError(what, where=printable(self.module), hint=hint)

    def integer(self, field: str, *, least: int = 1, most: int = 2**62) -> int:
        """An integer of the configuration."""
        value = self.config.get(field)
        if type(value) is not int or not least <= value <= most:
            raise InputError(f"{field} must be an integer from {least} to {most}, got {shown(value)}", where=CONFIG)
        return value

    def number(self, field: str) -> float:
        """A finite number of the configuration."""
        return finite(self.config.get(field), field)

    def flag(self, field: str) -> bool:
        """A truth value of the configuration."""
        value = self.config.get(field)
        if type(value) is not bool:
            raise InputError(f"{field} must be true or false, got {shown(value)}", where=CONFIG)
        return value

    def choice(self, field: str, known: tuple[str, ...]) -> str:
        """A string of the configuration that is one of `known`."""
        value = self.config.get(field)
        if not isinstance(value, str) or value not in known:
            raise InputError(f"{field} is {shown(value)}; supported are {', '.join(known)}", where=CONFIG)
        return value

    def by_pattern(self, field: str, default: float) -> float:
        """The number that a table of patterns gives this module; `default` if no pattern matches."""
        patterns = self.config.get(field) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{field} must be an object, got {shown(patterns)}", where=CONFIG)
        for pattern in patterns:
            check_pattern(pattern, field, CONFIG, as_used=module_pattern(pattern))
        found = {finite(value, field) for value in PatternTable(patterns).values(self.module)}
        if len(found) > 1:
            raise InputError(
                f"several patterns of {field} match {printable(self.module)!r}: {sorted(found)}",
                where=CONFIG,
                hint="PEFT took the first in the order of training, which the file does not keep; leave that one",
            )
        return found.pop() if found else default


def finite(value: Any, field: str) -> float:
    """`value` of `field` as a float. Raises InputError for anything but a finite number."""
    try:
        if type(value) in (int, float) and math.isfinite(float(value)):
            return float(value)
    except OverflowError:
        pass
    raise InputError(f"{field} must be a finite number, got {shown(value)}", where=CONFIG)


def pair(tuned: Tuned, a: str, b: str, *, r: int = ANY) -> int:
    """The rank of factors `a` (r, in) and `b` (out, r)."""
    rank, _ = tuned.shape(a, r, tuned.into)
    tuned.shape(b, tuned.out, rank)
    return rank
