"""What a file of adapter tensors says once its names are understood; the same for every producer."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distmerge.adapter.views import View
from distmerge.checkpoint.header import TensorSpec
from distmerge.errors import InputError, printable
from distmerge.storage.files import read_range

_NUMBERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Tensors by the key that PEFT would have given them, and what the file tells of its configuration.

    `unused` says of every other tensor, by its name in the file, why nothing of it is merged. `copies` and `mirrors`
    are what the file holds of the base, dense and packed, by the base's name.
    """

    tensors: dict[str, View]
    config: dict[str, Any]
    unused: dict[str, str] = field(default_factory=dict)
    copies: dict[str, View] = field(default_factory=dict)
    mirrors: dict[str, TensorSpec] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The base as far as dialects need it: the paths of its modules and its config.json."""

    modules: frozenset[str]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files of an adapter: their tensors and metadata, and the adapter_config.json that belongs to them."""

    folder: Path
    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None

    @property
    def where(self) -> str:
        """The file that messages name."""
        return str(self.folder / self.specs[0].file)


def collect(rows: Iterable[tuple[str, View]], where: str) -> dict[str, View]:
    """The views by name. Raises InputError if a name stands for two tensors."""
    found: dict[str, View] = {}
    for name, view in rows:
        if name in found:
            raise InputError(
                f"{printable(name)!r} is there twice: {printable(found[name].spec.name)!r} "
                f"and {printable(view.spec.name)!r}",
                where=where,
            )
        found[name] = view
    return found


def scaled(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha_field: str = "lora_alpha") -> dict[str, Any]:
    """The fields of a configuration that give every module its rank and alpha: the most frequent, and patterns that
    match one module each for the others."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": r,
        alpha_field: alpha,
        "rank_pattern": {pattern(module): value for module, value in ranks.items() if value != r},
        "alpha_pattern": {pattern(module): value for module, value in alphas.items() if value != alpha},
    }


def pattern(module: str) -> str:
    """A key of rank_pattern or alpha_pattern that matches `module` and nothing else."""
    return f"^{re.escape(module)}"


def read_number(folder: Path, spec: TensorSpec) -> float:
    """The one number in a tensor. Raises InputError if it holds more than one or no number."""
    where = f"{folder / spec.file}: tensor {printable(spec.name)!r}"
    if spec.numel != 1 or spec.dtype not in (*_NUMBERS, "BF16"):
        raise InputError(f"must be one number, got {spec.dtype} of shape {spec.shape}", where=where)
    raw = read_range(folder / spec.file, spec.begin, spec.nbytes)
    if spec.dtype == "BF16":
        raw = b"\0\0" + raw
    return float(struct.unpack("<" + _NUMBERS.get(spec.dtype, "f"), raw)[0])
