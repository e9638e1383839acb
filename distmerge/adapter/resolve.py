"""Adapter modules to base tensors: every pair finds its one tensor, with fitting shape, or the merge is refused."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from distmerge.adapter.patterns import time_limit
from distmerge.adapter.peft_adapter import WEIGHTS, Adapter, Pair
from distmerge.checkpoint.base import CONV1D_MODELS, Base, nested_configs
from distmerge.checkpoint.formats import Stored
from distmerge.checkpoint.header import FLOATS, TensorSpec
from distmerge.errors import InputError, listing, printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one adapter adds to one base tensor: `scaling * B @ A`, `a` (r, in), `b` (out, r).

    `adapter` counts the adapters from 0; `scaling` holds the adapter's own scaling times its weight.
    """

    adapter: int
    a: TensorSpec
    b: TensorSpec
    scaling: float


def resolve(adapter: Adapter, number: int, weight: float, base: Base) -> dict[str, Delta]:
    """The delta of every base tensor that `adapter` changes, by tensor name.

    Raises InputError, naming the keys, for a module that the base lacks or whose tensor does not fit.
    """
    where = str(adapter.folder / WEIGHTS)
    if base.config.get("model_type") in CONV1D_MODELS:
        raise InputError(
            f"model_type {base.config['model_type']!r} has transposed (Conv1D) weights, "
            "which cannot be merged by this version",
            where=str(base.folder),
        )
    lost = [pair for pair in adapter.pairs if f"{pair.module}.weight" not in base.tensors]
    if lost:
        raise _not_found(lost, adapter, base)
    deltas = {}
    with time_limit(str(adapter.folder / "adapter_config.json")):
        for pair in adapter.pairs:
            stored = base.tensors[f"{pair.module}.weight"]
            _check_target(pair, stored, where)
            _check_tied(stored, base)
            scaling = adapter.config.scaling(pair.module, pair.r) * weight
            if not 1e-30 < abs(scaling) < 1e30:
                raise InputError(f"the scaling of {printable(pair.module)!r} is {scaling}, beyond float32", where=where)
            deltas[stored.name] = Delta(adapter=number, a=pair.a, b=pair.b, scaling=scaling)
    return deltas


def untouched_targets(adapter: Adapter, base: Base) -> list[str]:
    """Base tensors that the adapter's configuration targets but its file holds nothing for."""
    touched = {pair.module for pair in adapter.pairs}
    modules = (
        name.removesuffix(".weight")
        for name, stored in base.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    )
    with time_limit(str(adapter.folder / "adapter_config.json")):
        return [module for module in modules if module not in touched and adapter.config.targets(module)]


def _not_found(lost: list[Pair], adapter: Adapter, base: Base) -> InputError:
    names = [pair.a.name for pair in lost]
    wanted = f"{lost[0].module}.weight"
    modules = [name for name in base.tensors if name.rsplit(".", 2)[-2:] == wanted.rsplit(".", 2)[-2:]]
    near = get_close_matches(wanted, modules[:2000], n=2, cutoff=0.5)
    tied = " (tied embeddings cannot be changed by this version)" * (lost[0].module.split(".")[-1] == "lm_head")
    found = f"the base has {listing(near)}" if near else "is this the base that the adapter was trained on?"
    return InputError(
        f"{len(lost)} of {len(adapter.pairs)} modules are not in the base{tied}: {listing(names)}",
        where=str(adapter.folder / WEIGHTS),
        hint=f"looked for {printable(wanted)!r}; {found}",
    )


def _check_target(pair: Pair, stored: Stored, where: str) -> None:
    if stored.dtype not in FLOATS:
        raise InputError(
            f"{stored.name!r} is stored as {stored.dtype}, which cannot be merged into",
            where=where,
            hint="supported are BF16, F16, F32 and bitsandbytes NF4 and FP4",
        )
    delta = (pair.b.shape[0], pair.a.shape[1])
    if stored.shape != delta:
        raise InputError(
            f"the delta of {printable(pair.module)!r} has shape {delta}, its base tensor {stored.shape}",
            where=where,
            hint="the adapter was trained on another base",
        )


def _check_tied(stored: Stored, base: Base) -> None:
    if any(part.isdigit() for part in stored.name.split(".")):
        return  # in a layer; embeddings and heads stand outside of them
    for part in nested_configs(base.config):
        if part.get("tie_word_embeddings") is True and stored.shape[0] == part.get("vocab_size"):
            raise InputError(
                "tied embeddings cannot be changed by this version",
                where=stored.name,
                hint="config.json has tie_word_embeddings true",
            )
