"""Changes to JSON that keep it JSON, most of the time: what byte flips would take ages to reach."""

from __future__ import annotations

import json
import random
import re
from typing import Any

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 8, 16, 1 << 20, 1 << 31, (1 << 63) - 1, 1 << 63, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "a.b", "x" * 600, "\x1b[31m", "a\nb", "\x00", "\ud800", "e\u0301", "\u00e9", "../x", "/etc/passwd"),
    *("F32", "BF16", "U8", "I64", "F7", "nf4", "fp4", "bfloat16", "LORA", "IA3", "all-linear", "((.*)*)*z", "(", "*"),
    *([], {}, [[]], [0], [0, 16], [1] * 20, [None], {"a": 1}, {"": ""}),
]


def mutated(text: bytes, chance: random.Random) -> bytes:
    """`text` after one to four changes; noise in it if it is no JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _noise(text, chance)
    for _ in range(chance.randint(1, 4)):
        value = _changed(value, chance)
    try:
        made = json.dumps(value, ensure_ascii=chance.random() < 0.5, separators=(",", ":")).encode()
    except (UnicodeEncodeError, ValueError, RecursionError):
        made = json.dumps(HOSTILE[chance.randrange(20)]).encode()
    kind = chance.random()
    return _noise(made, chance) if kind < 0.05 else _doubled(made, chance) if kind < 0.1 else made


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in `value` with each of its keys or indices."""
    found, rest = [], [value]
    while rest:
        inner = rest.pop()
        if isinstance(inner, dict | list):
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            found += [(inner, key) for key in keys]
            rest += [inner[key] for key in keys]
    return found


def _changed(value: Any, chance: random.Random) -> Any:
    places = _places(value)
    if not places:
        return chance.choice(HOSTILE)
    holder, key = chance.choice(places)
    other, place = chance.choice(places)
    old = holder[key]
    kind = chance.randrange(8)
    if kind == 0:
        holder[key] = json.loads(json.dumps(chance.choice(HOSTILE)))
    elif kind == 1:
        del holder[key]
    elif kind == 2:
        holder[key] = json.loads(json.dumps(other[place]))
    elif kind == 3 and type(old) in (int, float):
        holder[key] = chance.choice([old + 1, old - 1, old * 2, old // 2 if abs(old) < 1e300 else 0, -old])
    elif kind == 4 and isinstance(holder, dict):
        del holder[key]
        holder[_name(key, places, chance)] = old
    elif kind == 5 and isinstance(holder, dict):
        holder[_name(key, places, chance)] = json.loads(json.dumps(old))
    elif kind == 6 and isinstance(old, list):
        old.insert(chance.randint(0, len(old)), chance.choice([*old, 0]))
    elif isinstance(old, str) and old:
        cut = chance.randrange(len(old))
        holder[key] = old[:cut] + chance.choice([".", "0", "\u0301", "\x1b", ""]) + old[cut + chance.randint(0, 1) :]
    return value


def _name(key: str, places: list[tuple[Any, Any]], chance: random.Random) -> str:
    names = [name for _, name in places if isinstance(name, str)] + [each for each in HOSTILE if isinstance(each, str)]
    return chance.choice([*names, key + ".0", key[:-1], key.upper()])


def _doubled(text: bytes, chance: random.Random) -> bytes:
    """`text` with one of its pairs twice, where they are simple."""
    pairs = list(re.finditer(rb'"[^"]*":[^,{}\[\]]+', text))
    if not pairs:
        return text
    pair = chance.choice(pairs)
    return text[: pair.end()] + b"," + pair.group() + text[pair.end() :]


def _noise(text: bytes, chance: random.Random) -> bytes:
    made = bytearray(text or b"{}")
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(made))
        made[place : place + chance.randint(0, 3)] = chance.choice([b"", b"\xff", b"{", b"[" * 200, b'"', b"\\u0000"])
        made = made or bytearray(b"{}")
    return bytes(made)
