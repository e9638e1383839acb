"""Adapters under torchtune's own names, for Llama and its relatives: `layers.0.attn.q_proj.lora_a.weight`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distmerge.adapter.saved.dialect import Dialect, Source, Target, collect
from distmerge.adapter.saved.keys import PREFIX
from distmerge.adapter.views import View
from distmerge.checkpoint.header import TensorSpec
from distmerge.errors import InputError, printable, shown

_NAME = re.compile(
    r"(?:layers\.(?P<layer>\d+)\.(?P<part>attn|mlp)\.(?P<linear>\w+)|(?P<head>output))\."
    r"(?P<tail>lora_a\.weight|lora_b\.weight|magnitude)"
)
_LINEARS = {
    ("attn", "q_proj"): "self_attn.q_proj",
    ("attn", "k_proj"): "self_attn.k_proj",
    ("attn", "v_proj"): "self_attn.v_proj",
    ("attn", "output_proj"): "self_attn.o_proj",
    ("mlp", "w1"): "mlp.gate_proj",
    ("mlp", "w2"): "mlp.down_proj",
    ("mlp", "w3"): "mlp.up_proj",
}
_ROLES = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# torchtune turns pairs of neighbouring rows into each other where transformers takes one of either half.
_INTERLEAVED = ("llama", "mistral", "gemma", "gemma2")
_AS_TRANSFORMERS = ("qwen2", "qwen3")
_HINT = "give torchtune's adapter_model.safetensors, which has PEFT's names, or its merged checkpoint"


def speaks(source: Source, target: Target) -> bool:
    """True if a name is torchtune's."""
    return any(re.search(r"\.lora_[ab]\.weight$|\.lora_(gate|up|down)_[ab]$", spec.name) for spec in source.specs)


def read(source: Source, target: Target) -> Dialect:
    """The adapter by PEFT's keys; the rows of q and k in transformers' order, as views."""
    family = target.config.get("model_type")
    if family not in (*_INTERLEAVED, *_AS_TRANSFORMERS):
        raise InputError(
            f"has torchtune's own names, which are not known for a base of model_type {shown(family)}",
            where=source.where,
            hint=_HINT,
        )
    tensors = collect((_translate(spec, target.config, source.where) for spec in source.specs), source.where)
    config = dict(source.config or {})
    if config:
        config["use_dora"] = any(name.endswith("lora_magnitude_vector") for name in tensors)
    return Dialect(tensors=tensors, config=config, notes=("an adapter under torchtune's names",))


def doubts(source: Source, target: Target) -> tuple[str, ...]:
    """What is wrong with an adapter that torchtune saved under PEFT's names, beside its own file."""
    family = target.config.get("model_type")
    beside = (source.folder / "adapter_model.pt").exists() and source.specs[0].file == "adapter_model.safetensors"
    if not beside or family not in _AS_TRANSFORMERS:
        return ()
    return (
        "torchtune 0.6 reorders the rows of q_proj and k_proj as for Llama when it saves PEFT's names, which is wrong "
        f"for {family}; adapter_model.pt has them right: give it with --allow-pickle",
    )


def _translate(spec: TensorSpec, config: Mapping[str, Any], where: str) -> tuple[str, View]:
    match = _NAME.fullmatch(spec.name)
    linear = _LINEARS.get((match["part"], match["linear"])) if match and not match["head"] else "lm_head"
    if match is None or linear is None:
        raise InputError(f"{printable(spec.name)!r} is no known name of torchtune", where=where, hint=_HINT)
    module = "lm_head" if match["head"] else f"model.layers.{match['layer']}.{linear}"
    view, role = View.whole(spec), _ROLES[match["tail"]]
    if config.get("model_type") in _INTERLEAVED and role != "lora_A.weight" and match["linear"] in ("q_proj", "k_proj"):
        view = _halves(view, _heads(config, match["linear"], where), where)
    return f"{PREFIX}{module}.{role}", view


def _heads(config: Mapping[str, Any], linear: str, where: str) -> int:
    heads = config.get("num_attention_heads")
    if linear == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    if type(heads) is not int or heads < 1:
        raise InputError(f"the base's config.json does not tell the heads of {linear}", where=where, hint=_HINT)
    return heads


def _halves(view: View, heads: int, where: str) -> View:
    """Rows (head, pair, 2) as (head, 2, pair)."""
    rows = view.size[0]
    if rows % (2 * heads):
        raise InputError(
            f"{printable(view.spec.name)!r} has {rows} rows, which do not make {heads} heads of pairs",
            where=where,
            hint="is this the base that the adapter was trained on?",
        )
    view = view.unflatten(0, heads, rows // heads // 2, 2)
    return view.permute(0, 2, 1, *range(3, len(view.size)))
