"""Frozen dataclasses to JSON and back, so that plans and records travel as plain data."""

from __future__ import annotations

import functools
import json
import types
import typing
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def encode(value: Any) -> str:
    """`value` (dataclasses, tuples, dicts, numbers, strings) as canonical JSON on one line."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def decode(kind: Any, value: Any) -> Any:
    """`value`, parsed from JSON, as an instance of the type `kind`; raises ValueError where it does not fit."""
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict) or value.keys() != {field.name for field in fields(kind)}:
            raise ValueError(f"not a {kind.__name__}: {str(value)[:80]}")
        return kind(**{name: decode(hint, value[name]) for name, hint in _hints(kind).items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        inner = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(decode(hint, item) for hint, item in zip(inner, value, strict=True))
    if origin is dict:
        return {key: decode(args[1], item) for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        return None if value is None else decode(next(arg for arg in args if arg is not type(None)), value)
    if kind is float and isinstance(value, int):
        return float(value)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{value!r} is none of {args}")
    elif isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ValueError(f"expected {kind.__name__}, got {str(value)[:80]}")
    return value
