"""A PEFT adapter folder: its LoRA pairs by module, from the header of adapter_model.safetensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from distmerge.adapter.patterns import time_limit
from distmerge.adapter.peft_config import LoraConfig, read_config
from distmerge.checkpoint.header import TensorSpec, read_header
from distmerge.errors import InputError, listing, printable

WEIGHTS = "adapter_model.safetensors"
_FACTOR_DTYPES = ("BF16", "F16", "F32")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
# Training checkpoints that hold adapter tensors but are not what save_pretrained writes.
_STRANGERS = {
    "adapter_model.bin": "the weights are a pickle; load the adapter with PEFT and save_pretrained it as safetensors",
    "pytorch_model_fsdp_0": "this is a sharded FSDP checkpoint; gather it with `accelerate merge-weights` first",
    "zero_to_fp32.py": "this is a DeepSpeed checkpoint; gather it with its zero_to_fp32.py first",
    "adapters.safetensors": "this is an MLX adapter; convert it to PEFT's format first",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two factors of one module's LoRA: `a` (r, in) and `b` (out, r)."""

    module: str
    a: TensorSpec
    b: TensorSpec

    @property
    def r(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter folder, as its configuration and header describe it; pairs in the order of the module names."""

    folder: Path
    config: LoraConfig
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]


def read_adapter(folder: Path, *, lora_alpha: float | None = None) -> Adapter:
    """The adapter in `folder`. Raises InputError, naming the keys, for everything that is not a whole LoRA pair."""
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), hint="--adapter takes a folder that PEFT saved")
    if not (folder / WEIGHTS).exists():
        hint = next((text for name, text in _STRANGERS.items() if (folder / name).exists()), "")
        raise InputError(f"{WEIGHTS} is missing", where=str(folder), hint=hint or _nested_hint(folder))
    if extra := [
        name for name in ("non_lora_trainables.bin", "new_embeddings.safetensors") if (folder / name).exists()
    ]:
        raise InputError(f"{extra[0]} holds trained weights that would be lost", where=str(folder))
    config = read_config(folder, lora_alpha=lora_alpha)
    header = read_header(folder / WEIGHTS)
    if not header.tensors:
        raise InputError("holds no tensors", where=str(folder / WEIGHTS))
    pairs = _pairs(header.tensors, where=str(folder / WEIGHTS))
    with time_limit(str(folder / "adapter_config.json")):
        warnings = [text for pair in pairs for text in _check_rank(pair, config, folder)]
        outside = [pair.module for pair in pairs if not config.targets(pair.module)]
    if outside and config.target_modules:
        warnings.append(
            f"{folder.name}: target_modules does not name {len(outside)} modules that the file holds, "
            f"and which are merged: {listing(outside)}"
        )
    return Adapter(folder=folder, config=config, pairs=pairs, warnings=tuple(warnings))


def _nested_hint(folder: Path) -> str:
    inner = sorted(path.parent.name for path in folder.glob(f"*/{WEIGHTS}"))
    return f"adapters are in its sub-folders {listing(inner)}; name one of them" if inner else ""


def _pairs(tensors: tuple[TensorSpec, ...], where: str) -> tuple[Pair, ...]:
    factors: dict[str, dict[str, TensorSpec]] = {}
    adapters: set[str | None] = set()
    strange = []
    for spec in tensors:
        match = _KEY.fullmatch(spec.name)
        if match is None:
            strange.append(spec.name)
            continue
        adapters.add(match["adapter"])
        found = factors.setdefault(match["module"], {})
        if match["factor"] in found:
            raise InputError(
                f"lora_{match['factor']} of {match['module']!r} is there twice: "
                f"{found[match['factor']].name!r} and {spec.name!r}",
                where=where,
            )
        found[match["factor"]] = spec
    if strange:
        raise InputError(
            f"{len(strange)} of {len(tensors)} tensors are not LoRA factors of linear layers: {listing(strange)}",
            where=where,
            hint="nothing is skipped; only base_model.model.<module>.lora_A/lora_B.weight can be merged",
        )
    if len(adapters) > 1:
        names = sorted(name or "(none)" for name in adapters)
        raise InputError(f"holds several adapters: {listing(names)}", where=where, hint="save them one by one")
    pairs = []
    for module in sorted(factors):
        missing = {"A", "B"} - factors[module].keys()
        if missing:
            present = next(iter(factors[module].values())).name
            raise InputError(f"{present!r} has no lora_{missing.pop()}", where=where, hint="the file is incomplete")
        pair = Pair(module=module, a=factors[module]["A"], b=factors[module]["B"])
        _check_pair(pair, where)
        pairs.append(pair)
    return tuple(pairs)


def _check_pair(pair: Pair, where: str) -> None:
    for spec in (pair.a, pair.b):
        if 0 in spec.shape:
            raise InputError(
                f"{printable(spec.name)!r} is empty, shape {spec.shape}",
                where=where,
                hint="ZeRO-3 or FSDP shards were not gathered when it was saved; gather them and save again",
            )
        if len(spec.shape) != 2:
            raise InputError(
                f"{printable(spec.name)!r} has shape {spec.shape}; only linear layers (2-D) can be merged", where=where
            )
        if spec.dtype not in _FACTOR_DTYPES:
            raise InputError(
                f"{printable(spec.name)!r} has dtype {spec.dtype}, need one of {_FACTOR_DTYPES}", where=where
            )
    if pair.a.shape[0] != pair.b.shape[1]:
        raise InputError(
            f"the factors of {pair.module!r} do not fit: lora_A {pair.a.shape}, lora_B {pair.b.shape}", where=where
        )


def _check_rank(pair: Pair, config: LoraConfig, folder: Path) -> list[str]:
    ranks, alphas = config.matching_ranks(pair.module), config.matching_alphas(pair.module)
    if pair.r not in ranks:
        raise InputError(
            f"{printable(pair.a.name)!r} has r {pair.r}, adapter_config.json says {ranks[0]}",
            where=str(folder),
            hint="configuration and weights are of different adapters",
        )
    if len(set(alphas)) > 1:
        # PEFT writes the patterns sorted, so the order of training is lost: the first match may not be training's.
        return [f"{folder.name}: several alpha patterns match {pair.module}: {alphas}; the first is used"]
    return []
