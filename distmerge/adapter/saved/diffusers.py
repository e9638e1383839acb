"""Adapters of diffusers: PEFT's tensors without PEFT's prefix, behind the pipeline component's name, or in the older
`.lora.down` and `.processor.` forms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distmerge.adapter.saved.dialect import Dialect, Source, Target, collect, read_number, scaled
from distmerge.adapter.saved.keys import parse
from distmerge.adapter.views import View
from distmerge.errors import InputError, listing
from distmerge.storage.strict_json import parse_object

_COMPONENTS = re.compile(r"(unet|transformer(_\d)?|text_encoder(_\d)?|prior|controlnet|diffusion_model)\.")
_OLD = re.compile(r"\.(lora|lora_linear_layer|to_(q|k|v|out)_lora)\.(down|up)\.weight$")
_METADATA = "lora_adapter_metadata"
# What an attention processor's LoRA belongs to, in UNets and in text encoders.
_PROCESSED = {
    "to_q_lora": ("to_q", "q_proj"),
    "to_k_lora": ("to_k", "k_proj"),
    "to_v_lora": ("to_v", "v_proj"),
    "to_out_lora": ("to_out.0", "out_proj"),
}


def speaks(source: Source, target: Target) -> bool:
    """True if the names are diffusers' and not PEFT's. A base's own modules may begin like a pipeline's component
    ("transformer.h.0")."""
    names = [spec.name for spec in source.specs]
    if any("base_model." in name for name in names):
        return False
    if _METADATA in source.metadata or any(_OLD.search(name) for name in names):
        return True
    starts = {match[0] for name in names if (match := _COMPONENTS.match(name))}
    return any(not any(module.startswith(start) for module in target.modules) for start in starts)


def read(source: Source, target: Target) -> Dialect:
    """The adapter by PEFT's keys; alpha from the file's metadata or its alpha tensors, else equal to the rank."""
    where = source.where
    component = _component(source, target)
    names = {spec.name: _rename(spec.name.removeprefix(component), target) for spec in source.specs}
    alphas = {
        names[spec.name].removesuffix(".alpha"): read_number(source.folder, spec)
        for spec in source.specs
        if spec.name.endswith(".alpha")
    }
    rows = [(spec, parse(names[spec.name])) for spec in source.specs if not spec.name.endswith(".alpha")]
    if strange := [spec.name for spec, key in rows if key.role == "full" or key.adapter]:
        raise InputError(
            f"{len(strange)} of {len(rows)} tensors are not known in a file of diffusers: {listing(strange)}",
            where=where,
        )
    tensors = collect(((key.canonical, View.whole(spec)) for spec, key in rows), where)
    ranks = {key.module: spec.shape[0] for spec, key in rows if key.role == "lora_A.weight" and spec.shape}
    if not ranks:
        raise InputError("holds no lora_A", where=where)
    config, how = _config(source, component, ranks, alphas)
    config |= {"peft_type": "LORA", "target_modules": sorted(ranks)}
    config.setdefault("use_dora", any(key.role == "lora_magnitude_vector" for _, key in rows))
    config.setdefault("lora_bias", any(key.role == "lora_B.bias" for _, key in rows))
    return Dialect(
        tensors=tensors,
        config=config,
        unused={
            spec.name: "alpha, which is in the configuration"
            for spec in source.specs
            if spec.name in names and spec.name.endswith(".alpha")
        },
        notes=(f"an adapter under diffusers' names; alpha {how}",),
    )


def _component(source: Source, target: Target) -> str:
    """The component's name that begins every tensor's, with its dot; empty if the base's modules begin so too."""
    starts = {match[0] if (match := _COMPONENTS.match(spec.name)) else "" for spec in source.specs}
    known = {start for start in starts if start and any(module.startswith(start) for module in target.modules)}
    if len(starts) > 1 and not known:
        raise InputError(
            f"holds adapters for several components: {listing(sorted(start or '(no name)' for start in starts))}",
            where=source.where,
            hint="split the file; each component is a base of its own",
        )
    return "" if known else starts.pop()


def _rename(name: str, target: Target) -> str:
    """The name in PEFT's form."""
    name = name.replace(".processor.", ".")
    match = _OLD.search(name)
    if match is None:
        return name
    module, factor = name[: match.start()], "lora_A" if match[3] == "down" else "lora_B"
    if match[1] in _PROCESSED:
        candidates = [f"{module}.{linear}" for linear in _PROCESSED[match[1]]]
        module = next((found for found in candidates if found in target.modules), candidates[0])
    return f"{module}.{factor}.weight"


def _config(
    source: Source, component: str, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> tuple[dict[str, Any], str]:
    where = source.where
    if strange := sorted(alphas.keys() - ranks.keys()):
        raise InputError(f"alphas belong to no factors: {listing(strange)}", where=where)
    if raw := source.metadata.get(_METADATA):
        told = {
            key.removeprefix(component): value
            for key, value in parse_object(raw.encode(), f"{where}: {_METADATA}").items()
            if key.startswith(component)
        }
        if told and alphas:
            raise InputError(f"holds alpha tensors and {_METADATA}, which may disagree", where=where)
        if "lora_alpha" in told:
            return told, "from the file's metadata"
    if source.config is not None:
        return dict(source.config), "from adapter_config.json"
    filled = {module: alphas.get(module, float(r)) for module, r in ranks.items()}
    return scaled(ranks, filled), "from the file" if alphas else "equal to the rank, since the file tells none"
