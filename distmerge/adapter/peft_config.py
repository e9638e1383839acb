"""adapter_config.json: the fields that change the arithmetic, read by PEFT's rules or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distmerge.adapter.patterns import PatternTable, check_pattern, layer_pattern, module_pattern, tails
from distmerge.errors import InputError, listing, printable, shown
from distmerge.storage.strict_json import read_object

# Fields that say how training ran or where it was attached; the tensors themselves say what was trained.
_HARMLESS = {
    *("alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
    *(
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
    ),
    *("lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
    *("use_rslora", "ensure_weight_tying", "nvfp4_merge_aware"),
}
_REFUSED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "lora_bias": "trained LoRA biases",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained token rows",
    "target_parameters": "LoRA on expert parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA, which depends on the tokens",
    "arrow_config": "Arrow routing, which depends on the input",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
# Initialisations that leave the base weight as it was; the others train against a changed base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The part of adapter_config.json that a merge of plain LoRA depends on."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    base_model: str

    @cached_property
    def _ranks(self) -> PatternTable:
        return PatternTable(self.rank_pattern)

    @cached_property
    def _alphas(self) -> PatternTable:
        return PatternTable(self.alpha_pattern)

    @cached_property
    def _targets(self) -> str | frozenset[str]:
        return self.target_modules if isinstance(self.target_modules, str) else frozenset(self.target_modules)

    @cached_property
    def _excluded(self) -> str | frozenset[str]:
        return self.exclude_modules if isinstance(self.exclude_modules, str) else frozenset(self.exclude_modules)

    def matching_ranks(self, module: str) -> list[int]:
        """The LoRA ranks that `rank_pattern` gives `module`, in the file's order; `r` if no pattern matches."""
        return self._ranks.values(module) or [self.r]

    def matching_alphas(self, module: str) -> list[float]:
        """The alphas that `alpha_pattern` gives `module`, in the file's order; `lora_alpha` if no pattern matches."""
        return self._alphas.values(module) or [self.lora_alpha]

    def scaling(self, module: str, r: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA, for a module whose factors have rank `r` (PEFT's
        `update_layer`); where several patterns match, the first counts, as in PEFT's `get_pattern_key`."""
        return self.matching_alphas(module)[0] / (math.sqrt(r) if self.use_rslora else r)

    def targets(self, module: str) -> bool:
        """True if PEFT would put a LoRA on a linear layer named `module` (`check_target_module_exists`)."""
        if self._excluded and _named(self._excluded, module):
            return False
        if not _named(self._targets, module):
            return False
        if isinstance(self.target_modules, str) or module in self._targets or not self.layers_to_transform:
            return True
        patterns = [layer_pattern(pattern) for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found["layer"]) in self.layers_to_transform


def read_config(folder: Path, *, lora_alpha: float | None) -> LoraConfig:
    """The LoRA configuration in `folder`; `lora_alpha` replaces the file's. Raises InputError by field name."""
    path = folder / "adapter_config.json"
    if not path.exists():
        raise InputError(
            "adapter_config.json is missing", where=str(folder), hint="--adapter takes a folder that PEFT saved"
        )
    raw = read_object(path)
    where = str(path)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"peft_type {shown(raw.get('peft_type'))} is not supported; supported is 'LORA'", where=where)
    _refuse_unsupported(raw, where)
    alpha = raw.get("lora_alpha") if lora_alpha is None else lora_alpha
    return LoraConfig(
        r=_rank(raw.get("r"), "r", where),
        lora_alpha=_alpha(alpha, "lora_alpha", where),
        use_rslora=_flag(raw.get("use_rslora"), "use_rslora", where),
        rank_pattern={key: _rank(value, "rank_pattern", where) for key, value in _patterns(raw, "rank_pattern", where)},
        alpha_pattern={
            key: _alpha(value, "alpha_pattern", where) for key, value in _patterns(raw, "alpha_pattern", where)
        },
        target_modules=_modules(raw.get("target_modules"), "target_modules", where),
        exclude_modules=_modules(raw.get("exclude_modules"), "exclude_modules", where),
        layers_to_transform=_layers(raw.get("layers_to_transform"), where),
        layers_pattern=_layers_pattern(raw.get("layers_pattern"), where),
        base_model=printable(str(raw.get("base_model_name_or_path") or "")),
    )


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    for field, what in _REFUSED.items():
        if raw.get(field):
            raise InputError(f"{field} is set: {what} cannot be merged by this version", where=where)
    if raw.get("bias", "none") != "none":
        raise InputError(f"bias is {shown(raw['bias'])}: trained biases cannot be merged by this version", where=where)
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or init not in _PLAIN_INITS:
        raise InputError(
            f"init_lora_weights is {shown(init)}: the adapter was trained on a changed base",
            where=where,
            hint="convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )
    known = _HARMLESS | _REFUSED.keys() | {"bias"}
    unknown = sorted(field for field, value in raw.items() if field not in known and value not in (None, False, [], {}))
    if unknown:
        raise InputError(
            f"unknown fields that may change the arithmetic: {listing(unknown)}",
            where=where,
            hint="remove them from adapter_config.json if they do not change the trained weights",
        )


def _named(targets: str | frozenset[str], module: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(tail in targets for tail in tails(module))


def _rank(value: Any, field: str, where: str) -> int:
    if type(value) is not int or value < 1:
        raise InputError(f"{field} must be a positive integer, got {shown(value)}", where=where)
    return value


def _alpha(value: Any, field: str, where: str) -> float:
    if type(value) not in (int, float) or not _is_finite(value) or value == 0:
        raise InputError(
            f"{field} must be a finite number other than 0, got {shown(value)}",
            where=where,
            hint="give the value that training used with --lora-alpha",
        )
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _flag(value: Any, field: str, where: str) -> bool:
    if value is not None and type(value) is not bool:
        raise InputError(f"{field} must be true or false, got {shown(value)}", where=where)
    return bool(value)


def _patterns(raw: dict[str, Any], field: str, where: str) -> Iterable[tuple[str, Any]]:
    patterns = raw.get(field) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{field} must be an object, got {type(patterns).__name__}", where=where)
    for pattern in patterns:
        check_pattern(pattern, field, where, as_used=module_pattern(pattern))
    return patterns.items()


def _modules(value: Any, field: str, where: str) -> str | tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        check_pattern(value, field, where)
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise InputError(f"{field} must be a string or a list of strings", where=where)


def _layers_pattern(value: Any, where: str) -> tuple[str, ...]:
    names = _modules(value or None, "layers_pattern", where)
    patterns = (names,) if isinstance(names, str) else names
    for pattern in patterns:
        check_pattern(pattern, "layers_pattern", where, as_used=layer_pattern(pattern))
    return patterns


def _layers(value: Any, where: str) -> tuple[int, ...]:
    layers = [value] if type(value) is int else value or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise InputError(
            f"layers_to_transform must be an integer or a list of integers, got {shown(value)}", where=where
        )
    return tuple(layers)
