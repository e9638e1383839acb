"""adapter_config.json: what is taken gives r, alpha and scaling as PEFT's rules, written here once more, give them."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any
from unittest.mock import patch

from distmerge.adapter import patterns
from distmerge.adapter.patterns import time_limit
from distmerge.adapter.peft_config import PeftConfig, read_config
from distmerge.storage.strict_json import parse_object
from fuzz.law import taken
from fuzz.mutate import mutated

SECONDS = 0.2  # of CPU time, so that a fuzzer of little priority keeps to its own limit
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "x" * 100)


def one(data: bytes) -> bool:
    def read() -> tuple[PeftConfig, list[float], list[bool]]:
        config = read_config(parse_object(data, "adapter_config.json"), "adapter_config.json")
        with time_limit("adapter_config.json"):
            scalings = [config.scaling(module, 4) for module in MODULES]
            return config, scalings, [config.targets(module) for module in MODULES]

    with patch.object(patterns, "_SECONDS", SECONDS):
        found = taken(read)
    if found is None:
        return False
    config, scalings, _ = found
    raw = json.loads(data)
    assert config.peft_type == raw["peft_type"]
    if config.peft_type == "LORA":
        assert config.r == raw["r"]
        assert config.lora_alpha == float(raw["lora_alpha"])
        assert scalings == [_scaling(raw, module) for module in MODULES]
    return True


def _scaling(raw: dict[str, Any], module: str) -> float:
    """peft.utils.other.get_pattern_key and LoraLayer.update_layer."""
    patterns = raw.get("alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(raw["lora_alpha"] if key is None else patterns[key])
    return alpha / (math.sqrt(4) if raw.get("use_rslora") else 4)


def changed(data: bytes, chance: random.Random) -> bytes:
    return mutated(data, chance)
