"""What does not stop a merge but is worth a look before it: is this the base that the adapter was trained on?"""

from __future__ import annotations

import math

from distmerge.adapter.naming.names import Names
from distmerge.adapter.peft_adapter import Adapter
from distmerge.adapter.resolve import untouched_targets
from distmerge.checkpoint.base import Base, folder_name
from distmerge.checkpoint.formats import CONV1D_MODELS
from distmerge.config import MergeConfig
from distmerge.errors import listing


def doubts(adapter: Adapter, names: Names, config: MergeConfig) -> list[str]:
    """What does not stop a merge but is worth a look before it."""
    base = names.base
    name, told = adapter.folder.name, adapter.config.base_model
    found = []
    own = str(base.config.get("_name_or_path") or "") or folder_name(base.folder)
    if told and told.rstrip("/").split("/")[-1].lower() not in (own.rstrip("/").split("/")[-1].lower(), ""):
        found.append(f"{name}: trained on {told!r}, merged into {own!r}")
    if not {"nf4", "fp4"} & set(base.kinds) and config.simulate_quant == "none":
        found += _never_seen(adapter, base)
    if wide := _wider_than_they_need(adapter):
        found.append(f"{name}: r is larger than the layer in {len(wide)} modules: {listing(wide, 3)}")
    if adapter.config.raw.get("fan_in_fan_out") is True and base.config.get("model_type") not in CONV1D_MODELS:
        found.append(f"{name}: fan_in_fan_out is set, but no weight of the base is stored transposed; it is not heeded")
    # Where names were translated, those that the configuration means are not the base's.
    if not names.how and (missing := untouched_targets(adapter, base)):
        found.append(f"{name}: {len(missing)} targeted modules have no weights in the adapter: {listing(missing, 3)}")
    return found


def _wider_than_they_need(adapter: Adapter) -> list[str]:
    """The modules whose factors have a larger r than their delta has rows or columns; none where parameters are tuned,
    since lora_A has r rows for each of their experts."""
    if adapter.config.target_parameters:
        return []
    pairs = {name: (roles.get("lora_A.weight"), roles.get("lora_B.weight")) for name, roles in adapter.modules.items()}
    return [name for name, (a, b) in pairs.items() if a and b and a.size[0] > min(math.prod(a.size[1:]), b.size[0])]


def _never_seen(adapter: Adapter, base: Base) -> list[str]:
    """A word of warning where the adapter says that it was trained on a 4-bit base, or holds copies of one."""
    told = adapter.config.base_model
    if adapter.mirrors:
        said = "of which it holds copies"
    elif any(mark in told.lower() for mark in ("4bit", "nf4", "int4")):
        said = repr(told)
    else:
        return []
    into = " and ".join(base.kinds) if base.packed else "16-bit"
    hint = "" if base.packed else "; --simulate-quant nf4 merges into those that it has"
    name = adapter.folder.name
    return [f"{name}: trained on a 4-bit base ({said}), merged into {into} weights that it has never seen{hint}"]
