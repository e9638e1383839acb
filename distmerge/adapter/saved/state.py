"""The state of a PEFT model: as save_pretrained writes it, or raw, with the whole base around it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from distmerge.adapter.saved.dialect import Dialect, Source, collect, pattern
from distmerge.adapter.saved.keys import FULL, PREFIX, Key, parse
from distmerge.adapter.views import View
from distmerge.checkpoint.header import FLOATS, TensorSpec
from distmerge.errors import InputError, listing, printable

Row = tuple[TensorSpec, Key]

# What bitsandbytes stores beside a packed weight.
_COMPANION = re.compile(
    r"(?P<weight>.*)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB|weight_format)"
)
_BUFFERS = re.compile(r"(.*\.)?((original_)?inv_freq|position_ids|_extra_state)")
_HEADS = ("lm_head", "embed_out", "output", "output_layer", "score")
_FACTORS = ("lora_A.weight", "lora_embedding_A")
_PLAIN_ROLES = (*_FACTORS, "lora_B.weight", "lora_B.bias", "lora_embedding_B", "lora_magnitude_vector")


def read_state(source: Source, *, tails: Collection[str]) -> Dialect:
    """The adapter in the tensors of a PEFT model's state. Raises InputError unless there is exactly one."""
    rows = [(spec, parse(spec.name, tails)) for spec in source.specs]
    tuned = [key for _, key in rows if key.role != FULL and not key.is_copy]
    names = sorted({key.adapter for key in tuned})
    if len(names) > 1:
        raise InputError(
            f"holds several adapters: {listing([name or '(no name)' for name in names])}",
            where=source.where,
            hint="save them one by one",
        )
    if any(names):
        return _read_raw(rows, source.config or {}, source.where)
    if not tuned and not any(PREFIX in spec.name for spec, _ in rows):
        return Dialect(tensors={}, config={})
    return Dialect(tensors=collect(((key.canonical, View.whole(spec)) for spec, key in rows), source.where), config={})


def _read_raw(rows: list[Row], config: Mapping[str, Any], where: str) -> Dialect:
    merged, copied, mirrors, unused = [], [], {}, _idle(rows, config)
    packed = {key.tensor for spec, key in rows if _is_packed(spec, key) or spec.dtype == "I8"}
    for spec, key in rows:
        if spec.name in unused:
            continue
        if not (key.role == FULL or key.is_copy) or _is_trained(key, config):
            merged.append((key.canonical, View.whole(spec)))
        elif _is_companion(key, packed) or _BUFFERS.fullmatch(key.tensor):
            unused[spec.name] = "no parameter"
        elif key.param == "weight" and spec.dtype == "I8":
            unused[spec.name] = "int8 copy of the base"
        elif _is_packed(spec, key):
            unused[spec.name] = "packed mirror of the base"
            mirrors[key.tensor] = spec
        else:
            unused[spec.name] = "frozen copy of the base" if key.is_copy else "copy of the base"
            copied.append((key.tensor, View.whole(spec)))
    note = f"a raw training checkpoint: {len(merged)} of {len(rows)} tensors were trained"
    return Dialect(
        tensors=collect(merged, where),
        config={},
        unused=unused,
        copies=collect(copied, where),
        mirrors=mirrors,
        notes=(note,),
    )


def _idle(rows: list[Row], config: Mapping[str, Any]) -> dict[str, str]:
    """Tensors of tuners that save_pretrained leaves out: state of training, and second names of one tensor."""
    shared = {key.role for _, key in rows if key.shared}
    unused = {}
    for spec, key in rows:
        if key.role == "ranknum":
            unused[spec.name] = "a counter of training"
        elif key.role in shared and not key.shared:
            unused[spec.name] = f"the same as base_model.{key.role}"
    tokens = [(spec, key) for spec, key in rows if key.role == "token_adapter.trainable_tokens_delta"]
    indices = config.get("trainable_token_indices")
    for spec, key in tokens if len(tokens) > 1 and not isinstance(indices, dict) else []:
        if key.module.rpartition(".")[2] in _HEADS:  # a tied head's wrapper uses the embedding's rows
            unused[spec.name] = "the same as the rows of the embedding"
    return unused


def _is_trained(key: Key, config: Mapping[str, Any]) -> bool:
    """True if the configuration says that the parameter itself was trained, not an adapter over it."""
    bias, modules = config.get("bias", "none"), config.get("modules_to_save") or ()
    if key.param == "bias" and (bias == "all" or (bias == "lora_only" and key.role == "base_layer.bias")):
        return True
    parts = key.module.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return key.role == FULL and any(isinstance(name, str) and path.endswith(name) for name in modules for path in paths)


def _is_companion(key: Key, packed: Collection[str]) -> bool:
    """True for what lies beside a weight that is packed."""
    match = _COMPANION.fullmatch(key.tensor)
    return match is not None and (match["weight"] in packed or f"{match['weight']}.weight" in packed)


def _is_packed(spec: TensorSpec, key: Key) -> bool:
    """True for bitsandbytes' bytes without their quantization state: a column, of bytes or of floats that were made
    of the bytes of a storage dtype."""
    column = len(spec.shape) == 2 and spec.shape[1] == 1 and spec.shape[0] > 1
    return key.param == "weight" and (spec.dtype == "U8" or (column and spec.dtype in FLOATS))


def derive_config(
    tensors: Mapping[str, View],
    *,
    tails: Collection[str],
    lora_alpha: float | None,
    use_rslora: bool | None,
    where: str,
) -> dict[str, Any]:
    """The configuration of a LoRA that came without one: ranks from the tensors, alpha from the user."""
    keys = {name: parse(name, tails) for name in tensors}
    if strange := [
        name for name, key in keys.items() if not key.is_full and key.role not in _PLAIN_ROLES and not key.is_copy
    ]:
        raise InputError(
            f"adapter_config.json is missing, and {len(strange)} tensors mean nothing without it: {listing(strange)}",
            where=where,
            hint="copy the adapter_config.json of the training run beside the weights",
        )
    factors = {name: tensors[name] for name, key in keys.items() if key.role in _FACTORS}
    if flat := [view.spec for view in factors.values() if len(view.size) < 2 or not view.numel]:
        raise InputError(
            f"{printable(flat[0].name)!r} has shape {flat[0].shape}, expected a matrix",
            where=where,
            hint="ZeRO-3 or FSDP shards were not gathered when it was saved; gather them and save again",
        )
    ranks = {keys[name].module: view.size[0] for name, view in factors.items()}
    if not ranks:
        raise InputError("holds no adapter tensors", where=where, hint="is it the checkpoint of a whole model?")
    if nested := [module for module in ranks if module.endswith((".base_layer", ".experts"))]:
        raise InputError(
            f"adapter_config.json is missing: it says to which parameters the factors of {nested[0]!r} belong",
            where=where,
            hint="copy the adapter_config.json of the training run beside the weights",
        )
    if lora_alpha is None:
        raise InputError(
            "adapter_config.json is missing, and the tensors do not tell alpha",
            where=where,
            hint="give what training used: --lora-alpha N (and --use-rslora if it was trained so)",
        )
    r = max(ranks.values(), key=list(ranks.values()).count)
    return {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {pattern(module): rank for module, rank in ranks.items() if rank != r},
        "lora_alpha": lora_alpha,
        "use_rslora": bool(use_rslora),
        "use_dora": any(key.role == "lora_magnitude_vector" for key in keys.values()),
        "lora_bias": any(key.role == "lora_B.bias" for key in keys.values()),
        "target_modules": sorted(ranks),
        "modules_to_save": sorted({key.module for key in keys.values() if key.is_full}) or None,
        "bias": "none",
    }
