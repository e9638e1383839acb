"""LoRA on linear layers, embeddings and convolutions, in all its variants, as effects on parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distmerge.adapter.changes import ADD, LORA, Effect
from distmerge.adapter.peft_adapter import Adapter
from distmerge.adapter.peft_config import PeftConfig
from distmerge.adapter.views import View
from distmerge.errors import InputError, listing, printable, shown

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A tuned layer: its weight's path and shape, whether that is stored as (in, out), and how many times the trained
    function adds the delta."""

    module: str
    path: str
    shape: tuple[int, ...]
    holds_transposed: bool
    times: float


def lora_effects(adapter: Adapter, layer: Linear, roles: Mapping[str, View]) -> list[Effect]:
    """What the LoRA in `roles` does to `layer`: to its weight, and to its bias if one was trained with it.

    Raises InputError, naming keys, for factors that are incomplete or do not fit.
    """
    embedding = bool(roles.keys() & set(_EMBEDDING))
    pair = _EMBEDDING if embedding else _LINEAR
    wrong = _LINEAR if embedding else _EMBEDDING
    if roles.keys() & set(wrong):
        names = sorted(view.spec.name for role, view in roles.items() if role in (*pair, *wrong))
        raise InputError(
            f"{printable(layer.module)!r} has factors of a linear layer and of an embedding: {listing(names)}",
            where=adapter.where,
        )
    if missing := [role for role in pair if role not in roles]:
        raise InputError(
            f"{printable(next(iter(roles.values())).spec.name)!r} has no {missing[0].split('.')[0]}",
            where=adapter.where,
            hint="the file is incomplete",
        )
    _check_kernel(layer, roles[pair[0]], roles[pair[1]], adapter)
    _check_told(adapter.config, layer, roles, adapter)
    a, b = (_flat(roles[role], adapter) for role in pair)
    config, name = adapter.config, layer.path.removesuffix(".weight")
    blocks = block_diagonal(config, layer.module, a, b, adapter)
    if b.size[-1] * blocks.get("b", 1) != a.size[0]:
        raise InputError(
            f"the factors of {printable(layer.module)!r} do not fit: {a.spec.name} {a.spec.shape}, "
            f"{b.spec.name} {b.spec.shape}",
            where=adapter.where,
        )
    rank = a.size[0]
    check_rank(adapter, layer.module, rank, a)
    scaling = config.scaling(layer.module, rank) * layer.times
    _check_scaling(scaling, layer, adapter)
    out, into = math.prod(b.size[:-1]), a.size[1] * blocks.get("a", 1)
    transposed = _orientation(layer, (out, into), embedding=embedding, adapter=adapter)
    operator, tensors, options = _variant(adapter, layer, roles, (a, b), scaling=scaling, blocks=blocks)
    found = [
        Effect(
            path=layer.path,
            operator=operator,
            tensors=tensors,
            options=options,
            shape=(1, out, into),
            transposed=transposed,
        )
    ]
    if bias := roles.get("lora_B.bias"):
        found.append(_bias_effect(name, bias, out, scaling, adapter))
    return found


def _variant(
    adapter: Adapter,
    layer: Linear,
    roles: Mapping[str, View],
    factors: tuple[View, View],
    *,
    scaling: float,
    blocks: dict[str, int],
) -> tuple[str, dict[str, View], dict[str, Any]]:
    """The operator for the weight, its tensors and its options."""
    a, b = factors
    config = adapter.config
    magnitude, diagonal = roles.get("lora_magnitude_vector"), roles.get("lora_diag")
    kinds = {
        "use_dora": config.use_dora or magnitude is not None,
        "kasa_config": bool(config.raw.get("kasa_config")) or diagonal is not None,
        "use_bdlora": bool(blocks),
        "init_lora_weights": bool(config.init),
    }
    if len(together := [kind for kind, chosen in kinds.items() if chosen]) > 1:
        raise InputError(
            f"{' and '.join(together)} have no known meaning together, on {printable(layer.module)!r}",
            where=adapter.where,
        )
    options: dict[str, Any] = {"scaling": scaling}
    if len(b.size) > 2 and together:
        raise InputError(
            f"{together[0]} is not understood with the rows of {b.spec.name!r} in another order", where=adapter.where
        )
    if kinds["use_dora"]:
        vector = _vector(magnitude, b.size[0], "lora_magnitude_vector", layer, adapter)
        return "dora", {"a": a, "b": b, "magnitude": vector}, options
    if kinds["kasa_config"]:
        vector = _vector(diagonal, a.size[0], "lora_diag", layer, adapter)
        return "kasa", {"a": a, "b": b, "diag": vector}, options
    if blocks:
        return "bdlora", {"a": a, "b": b}, {**options, **{f"blocks_{side}": blocks.get(side, 1) for side in "ab"}}
    if config.init in ("pissa", "olora"):
        return config.init, {"a": a, "b": b}, options
    return LORA, {"a": a.stacked(), "b": b.stacked()}, options


def _check_kernel(layer: Linear, a: View, b: View, adapter: Adapter) -> None:
    """lora_A has the kernel of the base's weight and lora_B none, apart from sizes of 1: a matrix is a kernel of one
    element. A view in another order than its tensor is a matrix."""
    if len(layer.shape) < 2:
        raise InputError(f"{printable(layer.path)!r} of shape {layer.shape} is no layer's weight", where=adapter.where)
    for view, kernel in ((a, layer.shape[2:]), (b, ())):
        own = view.size[2:] if view.is_whole else ()
        if [size for size in own if size != 1] != [size for size in kernel if size != 1]:
            raise InputError(
                f"{printable(view.spec.name)!r} has shape {view.size}, its base tensor {layer.shape}",
                where=adapter.where,
                hint="the adapter was trained on another base",
            )


def _check_told(config: PeftConfig, layer: Linear, roles: Mapping[str, View], adapter: Adapter) -> None:
    """What the configuration says outright of the tensors beside the factors is what is there."""
    raw = config.raw
    absent = {"use_dora": False, "lora_bias": False, "kasa_config": None}
    beside = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias", "kasa_config": "lora_diag"}
    for name, role in beside.items():
        if role in roles and name in raw and raw[name] in (absent[name], None):
            raise InputError(
                f"{printable(roles[role].spec.name)!r} is there, but {name} is {json.dumps(raw[name])}",
                where=adapter.where,
                hint="configuration and weights are of different adapters",
            )
    if raw.get("lora_bias") is True and "lora_B.weight" in roles and "lora_B.bias" not in roles:
        raise InputError(
            f"{printable(layer.module)!r} has no lora_B.bias, but lora_bias is true",
            where=adapter.where,
            hint="the file is incomplete",
        )
    if layer.times != 1 and (config.use_dora or raw.get("kasa_config")):
        raise InputError(
            f"{printable(layer.module)!r} ends an attention and its delta counts {layer.times:g} times, which DoRA and "
            "KaSA do not support",
            where=adapter.where,
        )


def _flat(view: View, adapter: Adapter) -> View:
    """Factors of convolutions as matrices: (r, in * kernel) and (out, r). Where a file has lora_B's rows in another
    order, its view has them in several dimensions; the last one is r."""
    if view.spec.dtype not in ("BF16", "F16", "F32"):
        raise InputError(f"{printable(view.spec.name)!r} has dtype {view.spec.dtype}", where=adapter.where)
    if len(view.size) == 2 or (len(view.size) > 2 and not view.is_whole):
        return view
    if len(view.size) < 2:
        raise InputError(
            f"{printable(view.spec.name)!r} has shape {view.size}, expected a matrix or a kernel", where=adapter.where
        )
    inner = math.prod(view.size[1:])
    return View(spec=view.spec, offset=0, size=(view.size[0], inner), stride=(inner, 1))


def _orientation(layer: Linear, delta: tuple[int, int], *, embedding: bool, adapter: Adapter) -> bool:
    """True if the parameter holds the transpose of the delta (out, in)."""
    shape = layer.shape
    matrix = (shape[0], math.prod(shape[1:]))
    fits = {False: matrix == delta, True: len(shape) == 2 and matrix == delta[::-1]}
    wanted = embedding or layer.holds_transposed
    if fits[wanted]:
        return wanted
    raise InputError(
        f"the delta of {printable(layer.module)!r} has shape {delta[::-1] if wanted else delta}, "
        f"its base tensor {shape}",
        where=adapter.where,
        hint="the adapter was trained on another base",
    )


def block_diagonal(config: PeftConfig, module: str, a: View, b: View, adapter: Adapter) -> dict[str, int]:
    """BD-LoRA: how many blocks `a` and `b` of `module` have on their diagonals, a file holding them one below the
    other; empty where both are whole (PEFT, tuners/lora/variants.py, BdLoraLinearVariant)."""
    told = config.raw.get("use_bdlora")
    if not told:
        return {}
    if not isinstance(told, dict):
        raise InputError(f"use_bdlora must be an object, got {shown(told)}", where=str(adapter.folder))
    found: dict[str, Any] = {}
    for side in ("a", "b"):
        names = told.get(f"target_modules_bd_{side}") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"use_bdlora has target_modules_bd_{side} {shown(names)}", where=str(adapter.folder))
        if any(name in module for name in names):
            found[side] = told.get("nblocks")
    if not found:
        return {}
    blocks = next(iter(found.values()))
    if len(found) > 1 or type(blocks) is not int or blocks < 1 or (b.size[0] if "b" in found else a.size[0]) % blocks:
        raise InputError(f"use_bdlora does not fit {printable(module)!r}", where=adapter.where)
    return {"a": 1, "b": 1, **found}


def _vector(view: View | None, numel: int, role: str, layer: Linear, adapter: Adapter) -> View:
    if view is None:
        raise InputError(
            f"{printable(layer.module)!r} has no {role}", where=adapter.where, hint="the file is incomplete"
        )
    if view.numel != numel or not view.is_whole:
        raise InputError(
            f"{printable(view.spec.name)!r} has shape {view.size}, expected {numel} elements", where=adapter.where
        )
    return View(spec=view.spec, offset=0, size=(numel,), stride=(1,))


def _bias_effect(module: str, bias: View, out: int, scaling: float, adapter: Adapter) -> Effect:
    if bias.size != (out,):
        raise InputError(f"{printable(bias.spec.name)!r} has shape {bias.size}, expected ({out},)", where=adapter.where)
    return Effect(
        path=f"{module}.bias",
        operator=ADD,
        tensors={"values": bias},
        options={"scaling": scaling},
        shape=(1, out, 1),
    )


def check_rank(adapter: Adapter, path: str, rank: int, a: View) -> None:
    """Raises InputError if the configuration gives `path`, whose lora_A is `a`, another rank."""
    ranks = adapter.config.matching_ranks(path)
    if rank not in ranks:
        raise InputError(
            f"{printable(a.spec.name)!r} has r {rank}, adapter_config.json says {listing([str(r) for r in ranks])}",
            where=str(adapter.folder),
            hint="configuration and weights are of different adapters",
        )


def _check_scaling(scaling: float, layer: Linear, adapter: Adapter) -> None:
    if not 1e-30 < abs(scaling) < 1e30:
        raise InputError(
            f"the scaling of {printable(layer.module)!r} is {scaling}, beyond float32", where=adapter.where
        )
