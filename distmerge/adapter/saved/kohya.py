"""Adapters of kohya's scripts and LyCORIS: module paths with underscores for dots, and alpha as a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distmerge.adapter.saved.dialect import Dialect, Source, Target, collect, read_number, scaled
from distmerge.adapter.saved.keys import PREFIX
from distmerge.adapter.views import View
from distmerge.checkpoint.header import TensorSpec
from distmerge.errors import InputError, listing, printable

_PREFIX = re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lora_prior|lora|lycoris|oft_unet)_")
_TAILS = {
    "lora_down.weight": ("LORA", "lora_A.weight"),
    "lora_up.weight": ("LORA", "lora_B.weight"),
    **{f"hada_{tail}": ("LOHA", f"hada_{tail}") for tail in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{tail}": ("LOKR", f"lokr_{tail}") for tail in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_REFUSED = {"lora_mid.weight": "a Tucker decomposition", "diff": "a full difference", "scalar": "a trained scalar"}
_MARK = re.compile(r"(?!base_model\.).*\.(lora_(down|up)\.weight|dora_scale|hada_w1_a|lokr_w1(_a)?|lokr_w2_a)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One tensor: the module as the file names it, what it is to it."""

    spec: TensorSpec
    module: str
    tail: str


def speaks(source: Source, target: Target) -> bool:
    """True if a name is kohya's: flat, or with its own tails; PEFT's LoHa and LoKr have PEFT's prefix."""
    return any(_MARK.fullmatch(spec.name) for spec in source.specs)


def read(source: Source, target: Target) -> Dialect:
    """The adapter by PEFT's keys. Raises InputError for modules that the base does not have."""
    where = source.where
    parts = _parts(source.specs)
    for part in parts:
        if part.tail not in (*_TAILS, "alpha", "dora_scale"):
            what = _REFUSED.get(part.tail, "of no known kind")
            raise InputError(f"{printable(part.spec.name)!r} is {what}, which cannot be merged", where=where)
    kinds = sorted({_TAILS[part.tail][0] for part in parts if part.tail in _TAILS})
    if len(kinds) != 1:
        raise InputError(
            f"holds adapters of several kinds: {listing(kinds)}", where=where, hint="merge them one by one"
        )
    factors = {part.module for part in parts if part.tail in _TAILS}
    if idle := sorted({part.module for part in parts} - factors):
        raise InputError(f"{len(idle)} modules have no factors: {listing(idle)}", where=where)
    paths = _resolve(factors, target, where)
    tensors = collect(_rows(parts, paths, kinds[0], where), where)
    alphas = {paths[part.module]: read_number(source.folder, part.spec) for part in parts if part.tail == "alpha"}
    ranks = _ranks(parts, paths)
    # A full matrix has no rank: its alpha was set to the rank, so that the scale is 1.
    alphas = {module: alphas.get(module, ranks[module]) if module in ranks else 1.0 for module in paths.values()}
    ranks |= dict.fromkeys(paths.values() - ranks.keys(), 1)
    return Dialect(
        tensors=tensors,
        config=_config(kinds[0], ranks, alphas, tensors),
        unused={part.spec.name: "alpha, which is in the configuration" for part in parts if part.tail == "alpha"},
        notes=(f"an adapter under kohya's names; alpha from the file, {_alpha_note(parts, paths)}",),
    )


def _alpha_note(parts: list[_Part], paths: Mapping[str, str]) -> str:
    missing = len(paths) - sum(part.tail == "alpha" for part in parts)
    return f"and equal to the rank for {missing} modules without one" if missing else "for every module"


def _parts(specs: Iterable[TensorSpec]) -> list[_Part]:
    known = sorted((*_TAILS, *_REFUSED, "alpha", "dora_scale"), key=len, reverse=True)
    parts = []
    for spec in specs:
        tail = next((tail for tail in known if spec.name.endswith(f".{tail}")), spec.name.rpartition(".")[2])
        parts.append(_Part(spec=spec, module=spec.name.removesuffix(f".{tail}"), tail=tail))
    return parts


def _rows(parts: list[_Part], paths: Mapping[str, str], kind: str, where: str) -> Iterable[tuple[str, View]]:
    for part in parts:
        if part.tail == "dora_scale":
            yield f"{PREFIX}{paths[part.module]}.lora_magnitude_vector", _magnitude(part.spec, kind, where)
        elif part.tail in _TAILS:
            yield f"{PREFIX}{paths[part.module]}.{_TAILS[part.tail][1]}", View.whole(part.spec)


def _magnitude(spec: TensorSpec, kind: str, where: str) -> View:
    """The magnitude of every output, as PEFT shapes it: (out,), or (1, out, 1, ...) for convolutions."""
    out, *rest = spec.shape or (0,)
    if kind != "LORA" or any(size != 1 for size in rest):
        raise InputError(
            f"{printable(spec.name)!r} of shape {spec.shape} is no magnitude for each output of a LoRA", where=where
        )
    size = (out,) if len(rest) <= 1 else (1, out, *rest[1:])
    return View(spec=spec, offset=0, size=size, stride=View.whole(spec).stride[: len(size)])


def _ranks(parts: list[_Part], paths: Mapping[str, str]) -> dict[str, int]:
    dims = {"lora_down.weight": 0, "hada_w1_b": 0, "lokr_w1_b": 0, "lokr_w2_b": 0}
    return {
        paths[part.module]: part.spec.shape[dims[part.tail]] for part in parts if part.tail in dims and part.spec.shape
    }


def _config(
    kind: str, ranks: Mapping[str, int], alphas: Mapping[str, float], tensors: Mapping[str, View]
) -> dict[str, object]:
    config = {"peft_type": kind, **scaled(ranks, alphas, "lora_alpha" if kind == "LORA" else "alpha")}
    if kind == "LORA":
        config["use_dora"] = any(name.endswith("lora_magnitude_vector") for name in tensors)
    return {**config, "target_modules": sorted(ranks)}


def _resolve(names: set[str], target: Target, where: str) -> dict[str, str]:
    """The base's module for every module of the file."""
    tails: dict[str, set[str]] = {}
    for module in target.modules:
        parts = module.split(".")
        for start in range(len(parts)):
            tails.setdefault("_".join(parts[start:]), set()).add(module)
    paths, lost = {}, []
    for name in sorted(names):
        flat = name.replace(".", "_")
        bare = _PREFIX.sub("", flat, count=1) if _PREFIX.match(flat) else flat
        later = name.partition(".")[2].replace(".", "_")  # behind a pipeline component's name
        modules = tails.get(flat) or tails.get(bare) or tails.get(later, set())
        exact = [module for module in modules if module.replace(".", "_") in (flat, bare, later)]
        if len(exact or modules) == 1:
            paths[name] = min(exact or modules)
        else:
            lost.append(name)
    if lost:
        raise InputError(
            f"{len(lost)} of {len(names)} modules are not, or not uniquely, in the base: {listing(lost)}",
            where=where,
            hint="is the base the component (UNet, text encoder, transformer) that the file was trained for, with the "
            "names of the same library?",
        )
    if len(set(paths.values())) < len(paths):
        twice = next(path for path in paths.values() if list(paths.values()).count(path) > 1)
        raise InputError(f"two modules of the file are {printable(twice)!r} of the base", where=where)
    return paths
