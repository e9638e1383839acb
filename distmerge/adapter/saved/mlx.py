"""Adapters of MLX-LM: `lora_a` (in, r) and `lora_b` (r, out), and the scale itself instead of alpha."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distmerge.adapter.saved.dialect import Dialect, Source, Target, collect, scaled
from distmerge.adapter.saved.keys import PREFIX
from distmerge.adapter.views import View
from distmerge.checkpoint.header import TensorSpec
from distmerge.errors import InputError, printable, shown

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings")
_FUSE = "merge it with `mlx_lm.fuse --dequantize` instead"


def speaks(source: Source, target: Target) -> bool:
    """True if the names or the configuration are MLX's."""
    return any(spec.name.endswith((".lora_a", ".lora_b")) for spec in source.specs) or "fine_tune_type" in (
        source.config or {}
    )


def read(source: Source, target: Target) -> Dialect:
    """The adapter by PEFT's keys; factors as transposed views."""
    config, where = source.config or {}, source.where
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputError(f"fine_tune_type is {shown(kind)}, not a LoRA", where=where, hint=_FUSE)
    tensors = collect((_translate(spec, where) for spec in source.specs), where)
    ranks = {
        name.removeprefix(PREFIX).rpartition(".lora_")[0].removesuffix(".lora_embedding"): view.size[0]
        for name, view in tensors.items()
        if name.endswith((".lora_A.weight", ".lora_embedding_A"))
    }
    if not ranks:
        raise InputError("holds no lora_a", where=where, hint=_FUSE)
    scale = _scale(config, where)
    return Dialect(
        tensors=tensors,
        config={
            "peft_type": "LORA",
            **scaled(ranks, {module: scale * r for module, r in ranks.items()}),
            "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors),
            "target_modules": sorted(ranks),
        },
        notes=(f"an MLX adapter with scale {scale:g}",),
    )


def _translate(spec: TensorSpec, where: str) -> tuple[str, View]:
    module, _, leaf = spec.name.rpartition(".")
    view = View.whole(spec)
    embedding = module.rpartition(".")[2] in _EMBEDDINGS
    roles = {"lora_a": ("lora_A.weight", "lora_embedding_A"), "lora_b": ("lora_B.weight", "lora_embedding_B")}
    if leaf == "m" and len(spec.shape) == 1:
        return f"{PREFIX}{module}.lora_magnitude_vector", view
    if leaf not in roles or len(spec.shape) != 2:
        raise InputError(
            f"{printable(spec.name)!r} of shape {spec.shape} is no factor of a linear layer", where=where, hint=_FUSE
        )
    return f"{PREFIX}{module}.{roles[leaf][embedding]}", view.permute(1, 0)


def _scale(config: Mapping[str, Any], where: str) -> float:
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise InputError(
            "adapter_config.json with lora_parameters is missing: it tells the scale", where=where, hint=_FUSE
        )
    if "alpha" in parameters:
        raise InputError(
            "lora_parameters has both scale and alpha, which versions of MLX-LM multiplied in different ways",
            where=where,
            hint=_FUSE,
        )
    scale = parameters.get("scale")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise InputError(f"the scale in lora_parameters is {shown(scale)}, not a number", where=where)
    return float(scale)
