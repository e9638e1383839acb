"""Frozen dataclasses to JSON and back, so that plans and records travel as plain data."""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any


def encode(value: Any) -> str:
    """`value` (dataclasses, tuples, dicts, numbers, strings) as canonical JSON on one line."""
    return json.dumps(value, default=_as_dict, sort_keys=True, separators=(",", ":"))


def decode(kind: Any, value: Any) -> Any:
    """`value`, parsed from JSON, as an instance of the type `kind`; raises ValueError where it does not fit."""
    return _decoder(kind)(value)


def _as_dict(value: Any) -> dict[str, Any]:
    cls: Any = type(value)
    return {name: getattr(value, name) for name in _names(cls)}


@functools.cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


@functools.cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    """What turns parsed JSON into `kind`; made once for each type, since plans hold a million values."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _record_decoder(kind)
    if kind is Any:
        return lambda value: value
    if origin is tuple:
        return _tuple_decoder([_decoder(arg) for arg in args if arg is not Ellipsis], open_ended=args[-1] is Ellipsis)
    if origin is dict:
        inner = _decoder(args[1])
        return lambda value: {key: inner(item) for key, item in _expect(dict, value).items()}
    if origin in (types.UnionType, typing.Union):
        return _union_decoder(tuple(arg for arg in args if arg is not types.NoneType), optional=types.NoneType in args)
    if origin is typing.Literal:
        return lambda value: _expect_one_of(args, value)
    if kind is float:
        return lambda value: float(value) if type(value) is int else _expect(float, value)
    return lambda value: _expect(kind, value)


def _union_decoder(kinds: tuple[Any, ...], *, optional: bool) -> Callable[[Any], Any]:
    """Unions are of one type and None, of a string and a tuple, or of records with different fields."""
    if len(kinds) > 1 and all(is_dataclass(kind) for kind in kinds):
        records = {frozenset(_names(kind)): _decoder(kind) for kind in kinds}
        return lambda value: None if value is None and optional else _record_of(records, value)
    inner = _decoder(kinds[0])
    others = [_decoder(kind) for kind in kinds[1:]]

    def build(value: Any) -> Any:
        if value is None and optional:
            return None
        return others[0](value) if others and isinstance(value, list) else inner(value)

    return build


def _record_of(records: dict[frozenset[str], Callable[[Any], Any]], value: Any) -> Any:
    decoder = records.get(frozenset(value)) if isinstance(value, dict) else None
    if decoder is None:
        raise ValueError(f"not a record that is known: {str(value)[:80]}")
    return decoder(value)


def _expect(kind: Any, value: Any) -> Any:
    if type(value) is not kind:  # so that true is no integer
        raise ValueError(f"expected {kind.__name__}, got {str(value)[:80]}")
    return value


def _expect_one_of(choices: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{str(value)[:80]!r} is none of {choices}")
    return value


def _record_decoder(kind: Any) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(kind)
    inner = {name: _decoder(hints[name]) for name in _names(kind)}

    def build(value: Any) -> Any:
        if not isinstance(value, dict) or value.keys() != inner.keys():
            raise ValueError(f"not a {kind.__name__}: {str(value)[:80]}")
        return kind(**{name: inner[name](item) for name, item in value.items()})

    return build


def _tuple_decoder(inner: list[Callable[[Any], Any]], *, open_ended: bool) -> Callable[[Any], Any]:
    def build(value: Any) -> Any:
        items = _expect(list, value)
        if open_ended:
            return tuple(map(inner[0], items))
        return tuple(decode_one(item) for decode_one, item in zip(inner, items, strict=True))

    return build
