"""What a base's configuration says of its packing: the method, its block sizes, and the modules that it skips."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmerge.errors import InputError, shown
from distmerge.storage.strict_json import read_object

SECTIONS = ("quantization_config", "compression_config")
# What tools lay beside config.json; nothing of it is true once nothing is packed.
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
KINDS = {
    "bitsandbytes": ("nf4", "fp4", "int8"),
    "fp8": ("fp8", "fp4_e2m1"),
    "mxfp8": ("fp8",),
    "fbgemm_fp8": ("fp8",),
    "compressed-tensors": ("fp8", "int8_scaled"),
    "mxfp4": ("mxfp4",),
}
SKIP_LISTS = {
    "bitsandbytes": ("llm_int8_skip_modules",),
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "mxfp8": ("modules_to_not_convert", "ignored_layers"),
    "fbgemm_fp8": ("modules_to_not_convert",),
    "mxfp4": ("modules_to_not_convert",),
    "compressed-tensors": ("ignore",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A quantization method as the configuration names it, empty if that is no text; `shown`, safely, for people, and
    `where` it says so. `kinds` are the packings of it that can be dequantized, none for a method that is not known;
    `blocks` the (rows, cols) that its scales may stand for."""

    method: str
    shown: str
    where: str
    kinds: tuple[str, ...]
    blocks: tuple[tuple[int, int], ...]

    @property
    def is_known(self) -> bool:
        return bool(self.kinds)


def nested_configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """`config` and every configuration inside it (`text_config` and the like), outermost first."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    return [config, *(found for value in inner for found in nested_configs(value))]


def sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The quantization sections of a configuration, outermost first; they are those of `config` itself, to be read
    or changed."""
    found = []
    for part in nested_configs({key: value for key, value in config.items() if key not in SECTIONS}):
        found += [part[key] for key in SECTIONS if isinstance(part.get(key), dict)]
    return [config[key] for key in SECTIONS if isinstance(config.get(key), dict)] + found


def drop_sections(config: dict[str, Any]) -> bool:
    """Takes the quantization sections out of `config`, at every level; True if there were any."""
    found = [part.pop(key) for part in nested_configs(config) for key in SECTIONS if part.get(key) is not None]
    return bool(found)


def read_quantization(folder: Path, config: dict[str, Any]) -> Quantization | None:
    """How the base in `folder` says that it is packed; None if it says nothing.

    Raises InputError for sections that contradict one another, and for block sizes that are none.
    """
    where = str(folder / "config.json")
    found = sections(config)
    methods = {shown(_method(section)) for section in found}
    if len(methods) > 1:
        raise InputError(f"names several quantizations: {', '.join(sorted(methods))}", where=where)
    if not found:
        beside = folder / FILES[0]
        if not beside.is_file():
            return None
        read_object(beside)
        return Quantization(method="modelopt", shown="'modelopt'", where=str(beside), kinds=(), blocks=())
    told = _method(found[0])
    method = told if isinstance(told, str) else ""
    kinds = KINDS.get(method, ())
    if method == "bitsandbytes":
        int8 = any(section.get("load_in_8bit") is True for section in found)
        kinds = ("int8",) if int8 else ("nf4", "fp4")
    blocks = dict.fromkeys(block for section in found for block in _blocks(section, where))
    name = "bitsandbytes int8" if kinds == ("int8",) else shown(told)
    return Quantization(method=method, shown=name, where=where, kinds=kinds, blocks=tuple(blocks))


def _method(section: dict[str, Any]) -> Any:
    told = section.get("quant_method")
    if told is not None:
        return told
    return "bitsandbytes" if "load_in_4bit" in section else "compressed-tensors" if "config_groups" in section else None


def _blocks(section: dict[str, Any], where: str) -> list[tuple[int, int]]:
    """The blocks that a section names: `weight_block_size`, and those of compressed-tensors' groups."""
    found = [section["weight_block_size"]] if section.get("weight_block_size") is not None else []
    if _method(section) in ("fp8", "mxfp8") and "weight_block_size" not in section:
        found.append([128, 128] if _method(section) == "fp8" else [1, 32])  # what transformers takes it for
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        if weights.get("block_structure") is not None:
            block = weights["block_structure"]
            if isinstance(block, str) and re.fullmatch(r"[0-9]{1,9}x[0-9]{1,9}", block):  # how it was written once
                block = [int(part) for part in block.split("x")]
            found.append(block)
        if weights.get("group_size") not in (None, -1):
            found.append([1, weights["group_size"]])
    for block in found:
        sizes = block if isinstance(block, list) else []
        if len(sizes) != 2 or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
            raise InputError(f"block size {shown(block)} is none", where=where)
    return [(block[0], block[1]) for block in found]


def add_skipped(config: dict[str, Any], modules: Iterable[str], defaults: Iterable[str] = ()) -> None:
    """Makes the skip lists of `config` true: `modules` have plain weights. A section without a list skips what the
    loader does by default; once there is a list it must name these `defaults` too."""
    modules = list(modules)
    for section in sections(config):
        keys = SKIP_LISTS.get(method, ()) if isinstance(method := _method(section), str) else ()
        present = [key for key in keys if isinstance(section.get(key), list)]
        lists = {key: [name for name in section[key] if isinstance(name, str)] for key in present}
        for key in present or keys[:1]:
            known = lists.get(key, [])
            added = [name for name in modules if not _is_skipped(name, known, whole=key == "ignore")]
            if added:
                told = section[key] if key in lists else sorted(defaults)
                section[key] = list(dict.fromkeys([*told, *added]))


def _is_skipped(module: str, patterns: list[str], *, whole: bool) -> bool:
    """True if loaders skip `module` by one of `patterns`, taken literally: `whole` names, as compressed-tensors means
    them, or also beginnings and ends (transformers.quantizers.quantizers_utils.should_convert_module)."""
    if module in patterns or whole:
        return module in patterns
    return any(f".{module}.".startswith(f".{part}.") or f".{module}.".endswith(f".{part}.") for part in patterns)


_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def told_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that a configuration gives to the model's floats, the outermost first; None if it gives none."""
    for part in nested_configs(config):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key)
            if isinstance(name, str) and (dtype := _DTYPES.get(re.sub(r"^torch\.", "", name))):
                return dtype
    return None
