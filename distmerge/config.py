"""What a merge is asked to do: one frozen record, from options, variables and a YAML recipe."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from distmerge.errors import UsageError, printable, shown

DTYPES = {"auto": None, "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DEFAULT_SHARD_NBYTES = 5_000_000_000
LISTS = ("adapter", "weight")  # options that may be given several times
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoice:
    """An adapter folder and the weight that its deltas are multiplied with."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """Every choice of a merge; what it does not name is decided from the files."""

    base: Path
    """Folder of the checkpoint that is merged into."""
    adapters: tuple[AdapterChoice, ...]
    """Adapters, summed in float32 in this order."""
    output: Path
    """Folder of the merged checkpoint; it appears whole or not at all."""
    nproc: int | None = None
    """Ranks on this machine; None: one for each accelerator, or one on the CPU. Ignored under torchrun."""
    device: str = "auto"
    """`auto`, `cpu`, or an accelerator type such as `cuda`."""
    dtype: str = "auto"
    """Floats of the output: `auto` keeps each tensor's own (packed ones: the recorded one)."""
    max_shard_size: int | None = None
    """Largest output shard in bytes; None: a plain base keeps its own shards, a packed one gets 5 GB."""
    memory_budget: int = 2 << 30
    """Bytes of working memory for each rank, beside what importing torch takes."""
    lora_alpha: float | None = None
    """Replaces `lora_alpha` of every adapter's configuration."""
    allow_zero_delta: bool = False
    """Merge even if every delta is zero."""
    overwrite: bool = False
    """Replace an output folder that an earlier merge wrote."""
    timeout: float = 600.0
    """Seconds without a sign of life after which a rank counts as lost."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise UsageError("no adapter is given", hint="--adapter FOLDER")
        for adapter in self.adapters:
            if not math.isfinite(adapter.weight) or adapter.weight == 0:
                raise UsageError(f"weight {adapter.weight} of {adapter.folder} is not a finite number other than 0")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.nproc is not None and self.nproc < 1:
            raise UsageError(f"nproc {self.nproc} is not a positive number")
        if not 5 <= self.timeout < math.inf:
            raise UsageError(f"timeout {self.timeout} is not a number of seconds from 5 on")
        for name, nbytes in (("memory-budget", self.memory_budget), ("max-shard-size", self.max_shard_size)):
            if nbytes is not None and not 0 < nbytes < 1 << 63:
                raise UsageError(f"{name} {nbytes} is not a size")
        if self.lora_alpha is not None and (not math.isfinite(self.lora_alpha) or self.lora_alpha == 0):
            raise UsageError(f"lora-alpha {self.lora_alpha} is not a finite number other than 0")

    def to_argv(self) -> list[str]:
        """The options of `distmerge merge` that mean this configuration, without --nproc."""
        argv = ["--base", str(self.base), "--output", str(self.output)]
        for adapter in self.adapters:
            argv += ["--adapter", str(adapter.folder), "--weight", repr(adapter.weight)]
        argv += ["--device", self.device, "--dtype", self.dtype, "--memory-budget", str(self.memory_budget)]
        argv += ["--timeout", repr(self.timeout)]
        if self.max_shard_size is not None:
            argv += ["--max-shard-size", str(self.max_shard_size)]
        if self.lora_alpha is not None:
            argv += ["--lora-alpha", repr(self.lora_alpha)]
        argv += ["--allow-zero-delta"] * self.allow_zero_delta + ["--overwrite"] * self.overwrite
        return argv


def parse_nbytes(text: str) -> int:
    """The bytes that `text` means: `5GB` is decimal, `2GiB` binary. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    number = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0.0
    if not 1 <= number < 1 << 63:
        raise UsageError(f"{printable(str(text), 40)!r} is not a size", hint="write it as 5GB or 2GiB")
    return int(number)


def read_recipe(path: Path, known: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """The options in the YAML file at `path`, by name with underscores; those that are null are left out.

    `known` gives the types that the value of an option, or an item of its list, may have. Raises UsageError, naming
    the key, for tags, duplicate keys, unknown keys (with the nearest known one) and values of another type.
    """
    import yaml  # --help must not pay for it

    class Loader(yaml.SafeLoader):
        """YAML without tags and without duplicate keys."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
        pairs = [(loader.construct_object(k), loader.construct_object(v, deep=True)) for k, v in node.value]
        for number, (key, _) in enumerate(pairs):
            if key in [other for other, _ in pairs[:number]]:
                raise UsageError(f"key {key!r} stands twice", where=str(path))
        return dict(pairs)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read ({error})", where=str(path)) from None
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise UsageError(f"not plain YAML ({' '.join(str(error).split())[:200]})", where=str(path)) from None
    if not isinstance(values, dict):
        raise UsageError("must be a mapping of options", where=str(path))
    recipe = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            hint = f"did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise UsageError(f"unknown key {printable(str(key))!r}", where=str(path), hint=hint)
        if name in recipe:
            raise UsageError(f"key {printable(str(key))!r} stands twice, in two spellings", where=str(path))
        items = value if isinstance(value, list) and name in LISTS else [value]
        if value is not None and not all(type(item) in known[name] for item in items):
            kinds = " or ".join(_KINDS[kind] for kind in known[name])
            raise UsageError(
                f"{name.replace('_', '-')} must be {kinds}, got {shown(value)}",
                where=str(path),
                hint="put names that look like numbers or dates in quotes" if str in known[name] else "",
            )
        recipe[name] = value
    return {name: value for name, value in recipe.items() if value is not None}
