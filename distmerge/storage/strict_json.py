"""JSON from strangers: duplicate keys, depth and size are refused instead of resolved in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distmerge.errors import InputError, printable
from distmerge.storage.collector import uncollected
from distmerge.storage.files import read_input

MAX_DEPTH = 100
MAX_NBYTES = 512 << 20  # an index of half a million tensors is about 100 MB
MAX_VALUES = 6_000_000  # a header of half a million tensors has five million; they take some 300 MB


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {printable(twice)!r} stands twice in one object")
    return result


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises InputError for anything else, naming `where`, and before it is parsed for one
    of more values than any checkpoint has. NaN and Infinity pass: configurations of models do hold them."""
    if (count := sum(map(data.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise InputError(f"holds some {count} values, at most {MAX_VALUES} are read", where=where)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=where) from None
    except RecursionError:
        raise InputError("JSON is nested too deeply", where=where) from None
    except ValueError as error:  # JSONDecodeError is one too
        raise InputError(f"not valid JSON ({error})", where=where, hint="is the file cut off? fetch it again") from None
    except OverflowError as error:
        raise InputError(f"holds a number that is too large ({error})", where=where) from None
    if not isinstance(value, dict):
        raise InputError(f"must be a JSON object, not {type(value).__name__}", where=where)
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises InputError when it is missing or malformed."""
    with uncollected():
        value = parse_object(read_input(path, MAX_NBYTES), str(path))
        deep = _is_deep(value)
    if deep:
        raise InputError(f"JSON is nested more than {MAX_DEPTH} deep", where=str(path))
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    return list(outer.values()) if isinstance(outer, dict) else outer
