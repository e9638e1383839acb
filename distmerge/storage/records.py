"""Frozen dataclasses to JSON and back, so that plans and records travel as plain data.

Records are objects with the names of their fields, or, where there are very many of them, rows: lists of their values
in the order of the fields, of half the length and read in half the time.
"""

from __future__ import annotations

import functools
import json
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

Decoder = Callable[[Any], Any]


def encode(value: Any) -> str:
    """`value` (dataclasses, tuples, dicts, numbers, strings) as canonical JSON on one line."""
    return json.dumps(value, default=named_values, sort_keys=True, separators=(",", ":"))


def encode_rows(value: Any) -> str:
    """`value` as canonical JSON on one line, with every dataclass as a row."""
    return json.dumps(value, default=_as_row, sort_keys=True, separators=(",", ":"))


def decode(kind: Any, value: Any) -> Any:
    """`value`, parsed from JSON, as an instance of the type `kind`; raises ValueError where it does not fit."""
    return _decoder(kind, rows=False)(value)


def decode_rows(kind: Any, value: Any) -> Any:
    """The same of what `encode_rows` made."""
    return _decoder(kind, rows=True)(value)


def decode_fields(kind: Any, value: Any) -> Any:
    """The same of an object with the names of the fields of `kind`, in which all records are rows."""
    inner = _field_decoders(kind, rows=True)
    if not isinstance(value, dict) or value.keys() != inner.keys():
        raise ValueError(f"not a {kind.__name__}: {str(value)[:80]}")
    return kind(**{name: inner[name](item) for name, item in value.items()})


def named_values(value: Any) -> dict[str, Any]:
    """The values of a dataclass by the names of its fields, as they are."""
    cls: Any = type(value)
    return {name: getattr(value, name) for name in _names(cls)}


def _as_row(value: Any) -> list[Any]:
    cls: Any = type(value)
    return [getattr(value, name) for name in _names(cls)]


@functools.cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


@functools.cache
def _decoder(kind: Any, *, rows: bool) -> Decoder:
    """What turns parsed JSON into `kind`; made once for each type, since plans hold a million values."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _row_decoder(kind) if rows else _record_decoder(kind)
    if kind is Any:
        return lambda value: value
    if origin is tuple:
        inner = [_decoder(arg, rows=rows) for arg in args if arg is not Ellipsis]
        return _tuple_decoder(inner, args, open_ended=args[-1] is Ellipsis)
    if origin is dict:
        of_values = _decoder(args[1], rows=rows)
        return lambda value: {key: of_values(item) for key, item in _expect(dict, value).items()}
    if origin in (types.UnionType, typing.Union):
        kinds = tuple(arg for arg in args if arg is not types.NoneType)
        return _union_decoder(kinds, optional=types.NoneType in args, rows=rows)
    if origin is typing.Literal:
        return lambda value: _expect_one_of(args, value)
    return {float: _number, str: _text}.get(kind) or functools.partial(_expect, kind)


def _union_decoder(kinds: tuple[Any, ...], *, optional: bool, rows: bool) -> Decoder:
    """Unions are of one type and None, of a string and a tuple, or of records with different fields, as rows with
    different numbers of fields."""
    if len(kinds) > 1 and all(is_dataclass(kind) for kind in kinds):
        made = {kind: _decoder(kind, rows=rows) for kind in kinds}
        if rows:
            by_length = {len(_names(kind)): decoder for kind, decoder in made.items()}
            if len(by_length) < len(kinds):
                raise TypeError(f"rows of {kinds} cannot be told from one another")
            return lambda value: None if value is None and optional else _record_of(by_length, list, len, value)
        by_names = {frozenset(_names(kind)): decoder for kind, decoder in made.items()}
        return lambda value: None if value is None and optional else _record_of(by_names, dict, frozenset, value)
    inner, *others = [_decoder(kind, rows=rows) for kind in kinds]

    def build(value: Any) -> Any:
        if value is None and optional:
            return None
        return others[0](value) if others and isinstance(value, list) else inner(value)

    return build


def _record_of(decoders: dict[Any, Decoder], form: type, mark: Callable[[Any], Any], value: Any) -> Any:
    """What the one of `decoders` makes of `value` that its `mark` tells."""
    decoder = decoders.get(mark(value)) if isinstance(value, form) else None
    if decoder is None:
        raise ValueError(f"not a record that is known: {str(value)[:80]}")
    return decoder(value)


def _expect(kind: Any, value: Any) -> Any:
    if type(value) is not kind:  # so that true is no integer
        raise ValueError(f"expected {kind.__name__}, got {str(value)[:80]}")
    return value


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) is int else float(_expect(float, value))
    except OverflowError:
        raise ValueError(f"a number of {value.bit_length()} bits") from None


def _text(value: Any) -> str:
    try:
        return sys.intern(value)  # names of files and dtypes recur a thousand times
    except TypeError:
        return str(_expect(str, value))


def _expect_one_of(choices: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{str(value)[:80]!r} is none of {choices}")
    return value


def _field_decoders(kind: Any, *, rows: bool) -> dict[str, Decoder]:
    hints = typing.get_type_hints(kind)
    return {name: _decoder(hints[name], rows=rows) for name in _names(kind)}


def _record_decoder(kind: Any) -> Decoder:
    inner = _field_decoders(kind, rows=False)

    def build(value: Any) -> Any:
        if not isinstance(value, dict) or value.keys() != inner.keys():
            raise ValueError(f"not a {kind.__name__}: {str(value)[:80]}")
        return kind(**{name: inner[name](item) for name, item in value.items()})

    return build


def _row_decoder(kind: Any) -> Decoder:
    inner = _field_decoders(kind, rows=True)
    names, decoders = tuple(inner), tuple(inner.values())
    hints = typing.get_type_hints(kind)
    exact = tuple(hints[name] if hints[name] in (int, bool) else None for name in names)

    def build(value: Any) -> Any:
        if type(value) is not list or len(value) != len(names):
            raise ValueError(f"not a {kind.__name__}: {str(value)[:80]}")
        columns = zip(exact, decoders, value, strict=True)
        values = [item if type(item) is known else decode_one(item) for known, decode_one, item in columns]
        return kind(**dict(zip(names, values, strict=True)))

    return build


def _tuple_decoder(inner: list[Decoder], kinds: tuple[Any, ...], *, open_ended: bool) -> Decoder:
    of_integers = {kind for kind in kinds if kind is not Ellipsis} == {int}

    def build(value: Any) -> Any:
        items = _expect(list, value)
        if of_integers and (open_ended or len(items) == len(inner)) and {*map(type, items)} <= {int}:
            return tuple(items)  # shapes and places, of which plans are full
        if open_ended:
            return tuple(map(inner[0], items))
        return tuple(decode_one(item) for decode_one, item in zip(inner, items, strict=True))

    return build
