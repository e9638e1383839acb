"""adapter_config.json: the fields that change the arithmetic, read by PEFT's rules or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distmerge.adapter.patterns import ModuleNames, PatternTable, check_pattern, layer_pattern, matched, module_pattern
from distmerge.adapter.tuners.fields import FIELDS
from distmerge.adapter.tuners.registry import TUNERS, UNMERGEABLE
from distmerge.errors import InputError, listing, printable, shown

# Fields that say how training ran or where it was attached; the tensors themselves say what was trained.
_HARMLESS = {
    *("alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save"),
    *("monteclora_config", "nvfp4_merge_aware", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices"),
    *("use_bdlora", "use_dora", "use_rslora", "velora_config"),
}
REFUSED_FIELDS = {
    "alora_invocation_tokens": "activated LoRA changes the weights for some tokens only",
    "arrow_config": "Arrow chooses among adapters by the input",
    "use_qalora": "QA-LoRA pools the input of lora_A, which no weight can do",
}
# Initialisations that leave the base weight as it was.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Those whose first factors, taken off the base before training, follow from the base alone.
RECOMPUTED_INITS = ("pissa", "olora")
_INITIAL_INITS = ("corda", "lora_ga")
_RANDOM_INIT = re.compile(r"pissa_niter_\d+")  # PiSSA by a randomised decomposition, off by per cents of the weight
BIASES = ("none", "all", "lora_only")
_MAX_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The part of adapter_config.json that a merge depends on. `raw` is all of it; what only LoRA has is at its
    default for the other tuners. `init` is `pissa` or `olora` where the first factors are recomputed, `given` where
    they come from an initial adapter, else empty."""

    peft_type: str
    raw: dict[str, Any]
    base_model: str
    task_type: str
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    r: int = 1
    lora_alpha: float = 1.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init: str = ""
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_parameters: tuple[str, ...] = ()
    layer_replication: tuple[tuple[int, int], ...] = ()
    peft_version: tuple[int, ...] = ()

    @cached_property
    def _ranks(self) -> PatternTable:
        return PatternTable(self.rank_pattern)

    @cached_property
    def _alphas(self) -> PatternTable:
        return PatternTable(self.alpha_pattern)

    @cached_property
    def _targets(self) -> ModuleNames:
        return ModuleNames(self.target_modules)

    @cached_property
    def _excluded(self) -> ModuleNames:
        return ModuleNames(self.exclude_modules)

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
        if module in self._excluded or module not in self._targets:
            return False
        if isinstance(self.target_modules, str) or self._targets.lists(module) or not self.layers_to_transform:
            return True
        patterns = [layer_pattern(pattern) for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        every = (matched("match", pattern, module) for pattern in patterns)
        found = next((groups for groups in every if groups is not None), None)
        return found is not None and int(found["layer"] or -1) in self.layers_to_transform


def read_config(
    raw: dict[str, Any],
    where: str,
    *,
    lora_alpha: float | None = None,
    use_rslora: bool | None = None,
    initial: bool = False,
) -> PeftConfig:
    """The configuration in `raw`; `lora_alpha` and `use_rslora` replace its own. `initial` says that the adapter as it
    was before training is given too. Raises InputError by field name."""
    peft_type = raw.get("peft_type")
    if peft_type == "LORA":
        return _lora_config(raw, where, lora_alpha=lora_alpha, use_rslora=use_rslora, initial=initial)
    if isinstance(peft_type, str) and peft_type in UNMERGEABLE:
        raise InputError(f"peft_type {peft_type!r} cannot be merged: {UNMERGEABLE[peft_type]}", where=where)
    if not isinstance(peft_type, str) or peft_type not in TUNERS:
        raise InputError(
            f"peft_type {shown(peft_type)} is not known",
            where=where,
            hint=f"known are LORA and {', '.join(sorted(TUNERS))}",
        )
    for option, given in (("--lora-alpha", lora_alpha), ("--use-rslora", use_rslora)):
        if given is not None and (option == "--use-rslora" or "lora_alpha" not in FIELDS[peft_type]):
            raise InputError(f"{option} means nothing for a {peft_type}", where=where, hint=f"leave {option} out")
    _refuse_unknown(raw, FIELDS[peft_type], where)
    return PeftConfig(peft_type=peft_type, rank_pattern={}, alpha_pattern={}, **_common(raw, where))


def _common(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """What every tuner's configuration may have."""
    saved = _modules(raw.get("modules_to_save"), "modules_to_save", where)
    if "" in (saved, *saved):
        raise InputError("modules_to_save holds an empty name, which every module ends with", where=where)
    return {
        "raw": raw,
        "target_modules": _modules(raw.get("target_modules"), "target_modules", where),
        "exclude_modules": _modules(raw.get("exclude_modules"), "exclude_modules", where),
        "modules_to_save": (saved,) if isinstance(saved, str) else saved,
        "layers_to_transform": _layers(raw.get("layers_to_transform"), where),
        "layers_pattern": _layers_pattern(raw.get("layers_pattern"), where),
        "base_model": printable(str(raw.get("base_model_name_or_path") or "")),
        "task_type": printable(str(raw.get("task_type") or "")),
        "bias": _bias(raw.get("bias"), raw["peft_type"], where),
    }


def _lora_config(
    raw: dict[str, Any], where: str, *, lora_alpha: float | None, use_rslora: bool | None, initial: bool
) -> PeftConfig:
    _refuse_unsupported(raw, where)
    alpha = raw.get("lora_alpha") if lora_alpha is None else lora_alpha
    rslora = _flag(raw.get("use_rslora"), "use_rslora", where) if use_rslora is None else use_rslora
    parameters = _modules(raw.get("target_parameters"), "target_parameters", where)
    return PeftConfig(
        peft_type="LORA",
        **_common(raw, where),
        r=_rank(raw.get("r"), "r", where),
        lora_alpha=_alpha(alpha, "lora_alpha", where),
        use_rslora=rslora,
        use_dora=_flag(raw.get("use_dora"), "use_dora", where),
        init=_init(raw.get("init_lora_weights", True), where, initial=initial),
        rank_pattern={key: _rank(value, "rank_pattern", where) for key, value in _patterns(raw, "rank_pattern", where)},
        alpha_pattern={
            key: _alpha(value, "alpha_pattern", where) for key, value in _patterns(raw, "alpha_pattern", where)
        },
        target_parameters=(parameters,) if isinstance(parameters, str) else parameters,
        layer_replication=_replication(raw.get("layer_replication"), where),
        peft_version=_version(raw.get("peft_version")),
    )


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    for name, why in REFUSED_FIELDS.items():
        if raw.get(name):
            raise InputError(f"{name} is set: {why}, so the adapter cannot be merged", where=where)
    _refuse_unknown(raw, _HARMLESS | REFUSED_FIELDS.keys(), where)


def _refuse_unknown(raw: dict[str, Any], known: Collection[str], where: str) -> None:
    unknown = sorted(name for name, value in raw.items() if name not in known and value not in (None, False, [], {}))
    if unknown:
        raise InputError(
            f"unknown fields that may change the arithmetic: {listing(unknown)}",
            where=where,
            hint="remove them from adapter_config.json if they do not change the trained weights",
        )


def _init(value: Any, where: str, *, initial: bool) -> str:
    if value is None or type(value) is bool or (isinstance(value, str) and value in _PLAIN_INITS):
        return ""
    name = value if isinstance(value, str) else ""
    if name == "loftq":
        raise InputError(
            "init_lora_weights is 'loftq': training ran on a base that LoftQ quantized, which no original base gives",
            where=where,
            hint="merge into the base that LoftQ saved, with init_lora_weights set to true",
        )
    changed = name in (*RECOMPUTED_INITS, *_INITIAL_INITS) or _RANDOM_INIT.fullmatch(name)
    if changed and initial:
        return "given"
    if name in RECOMPUTED_INITS:
        return name
    if changed:
        raise InputError(
            f"init_lora_weights is {name!r}: the base was changed by factors that depend on data or chance before "
            "training",
            where=where,
            hint="give the adapter as it was before training with --initial-adapter, or convert it to a plain LoRA "
            "with PEFT's path_initial_model_for_weight_conversion",
        )
    raise InputError(f"init_lora_weights {shown(value)} is not known", where=where)


def _bias(value: Any, peft_type: str, where: str) -> str:
    if value is None:
        return "none"
    if not isinstance(value, str) or (value not in BIASES and value.lower() != f"{peft_type.lower()}_only"):
        raise InputError(f"bias {shown(value)} is not known", where=where)
    return value


def _replication(value: Any, where: str) -> tuple[tuple[int, int], ...]:
    ranges = value or []
    fits = isinstance(ranges, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(item) is int for item in pair) and 0 <= pair[0] < pair[1]
        for pair in ranges
    )
    if not fits or sum(last - first for first, last in ranges) > _MAX_LAYERS:
        raise InputError(f"layer_replication must be a list of [first, last), got {shown(value)}", where=where)
    return tuple((first, last) for first, last in ranges)


def _version(value: Any) -> tuple[int, ...]:
    """The numbers of a version such as `0.19.1`; empty where there is none."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", value) if isinstance(value, str) else None
    return tuple(int(part or 0) for part in match.groups()) if match else ()


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
