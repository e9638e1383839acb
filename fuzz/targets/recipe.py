"""The YAML of `--config`: what is taken is what `yaml.safe_load` reads."""

from __future__ import annotations

import functools
import random

import yaml

from distmerge.cli.main import cli
from distmerge.cli.options import recipe_types
from distmerge.config import read_recipe
from distmerge.errors import UsageError
from fuzz.law import scratch, taken

PARTS = (
    b"base: b",
    b"adapter: [x, y]",
    b"&a [1]",
    b"*a",
    b"!!python/name:os.system",
    b"<<: *a",
    b"? [a]",
    b"- ",
    b"\t",
)
PARTS += (
    b"dtype: no",
    b"weight: 1e999",
    b"seed: 012",
    b"timeout: 1:30",
    b"map: {a: 1}",
    b"2001-01-01",
    b"{" * 300,
    b"'",
)


@functools.cache
def _known() -> dict[str, tuple[type, ...]]:
    return recipe_types(cli.commands["merge"])


def one(data: bytes) -> bool:
    path = scratch() / "recipe.yaml"
    path.write_bytes(data)
    recipe = taken(lambda: read_recipe(path, _known()), error=UsageError)
    if recipe is None:
        return False
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert repr(recipe) == repr({str(k).replace("-", "_"): v for k, v in told.items() if v is not None})
    return True


def changed(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\n")
    place = chance.randrange(len(lines))
    kind = chance.randrange(4)
    if kind == 0:
        lines.insert(place, chance.choice(PARTS))
    elif kind == 1:
        lines[place] += chance.choice(PARTS)
    elif kind == 2:
        lines[place] = lines[place][: chance.randint(0, len(lines[place]))]
    else:
        lines.insert(place, chance.choice(lines))
    return b"\n".join(lines)
