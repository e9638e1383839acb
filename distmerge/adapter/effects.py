"""What an adapter does to each parameter: LoRA and its variants, other tuners, biases, token rows, whole parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from distmerge.adapter.changes import LORA, Effect, Replacement
from distmerge.adapter.peft_adapter import Adapter
from distmerge.adapter.tuners.experts import assign, is_transposed, stack_a, stack_b, unwrap, wrapped_parameters
from distmerge.adapter.tuners.lora import Linear, check_rank, lora_effects
from distmerge.adapter.tuners.registry import TUNERS
from distmerge.adapter.tuners.tokens import token_indices
from distmerge.adapter.views import View
from distmerge.errors import InputError, listing, printable, shown

_LORA_ROLES = {
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "lora_diag"),
}
_TOKENS = "token_adapter.trainable_tokens_delta"
_TOKENS_ALONE = "trainable_tokens_delta"  # of the tuner that trains nothing else
_OUT_PROJ = ".base_layer.out_proj"
_NORM = "ln_tuning_layers."


class Parameters(Protocol):
    """What effects need to know about the base, asked in the adapter's own names."""

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The shape of a parameter; None if the base has none of that name."""
        ...

    def order(self, module: str) -> Sequence[str] | None:
        """The parameters of a module in the order of registration; None where that is not known."""
        ...

    def holds_transposed(self, path: str) -> bool:
        """True if the parameter is of a layer that stores its weight as (in, out)."""
        ...

    def marks_transposed(self, module: str) -> bool | None:
        """What the model's class says of an expert module's layout; None where it is not known."""
        ...


def parameter_paths(adapter: Adapter) -> list[str]:
    """The parameters that the base must have, in the adapter's names: the weights of the tuned modules."""
    paths = []
    for name, roles in adapter.modules.items():
        module, depth = unwrap(name)
        if not module:
            names = sorted(view.spec.name for view in roles.values())
            raise InputError(f"{len(names)} tensors name no module: {listing(names)}", where=adapter.where)
        if wrapped := _wrapped(adapter, module):
            paths += [f"{module}.{parameter}" for parameter in wrapped]
        elif module.endswith(_OUT_PROJ):
            paths.append(f"{module.removesuffix(_OUT_PROJ)}.out_proj.weight")
        elif depth:
            raise InputError(
                f"{printable(name)!r} is wrapped, but target_parameters does not name it",
                where=adapter.where,
                hint="configuration and weights are of different adapters",
            )
        else:
            paths.append(f"{module}.weight")
    return list(dict.fromkeys(paths))


def effects(adapter: Adapter, parameters: Parameters) -> tuple[list[Effect], list[Replacement]]:
    """Everything that `adapter` does, parameter by parameter. Raises InputError, naming keys, for what is not
    understood or does not fit."""
    found: list[Effect] = []
    replaced = [Replacement(path=path, view=view) for path, view in adapter.full.items()]
    for module, roles in _plain_modules(adapter):
        if (rows := roles.get(_TOKENS) or roles.get(_TOKENS_ALONE)) and len(roles) == 1:
            found.append(_token_effect(adapter, module, rows, parameters))
        elif rows:
            names = sorted(view.spec.name for view in roles.values())
            raise InputError(
                f"{printable(module)!r} has token rows and more, which no training makes: {listing(names)}",
                where=adapter.where,
            )
        elif adapter.config.peft_type == "LN_TUNING":
            replaced += _norms(adapter, module, roles, parameters)
        else:
            make = _lora if adapter.config.peft_type == "LORA" else _tuned
            found += make(adapter, module, roles, parameters)
    found += _expert_effects(adapter, parameters)
    _check_tokens(adapter, found)
    return found, replaced


def _norms(adapter: Adapter, module: str, roles: Mapping[str, View], parameters: Parameters) -> Iterator[Replacement]:
    """The parameters of a norm that LN tuning trained: all that it has."""
    have = {f"{_NORM}{name}" for name in ("weight", "bias") if parameters.shape(f"{module}.{name}") is not None}
    if have != roles.keys():
        raise InputError(
            f"{printable(module)!r} has {listing(sorted(roles))}, expected {listing(sorted(have))}", where=adapter.where
        )
    for role, view in roles.items():
        yield Replacement(path=f"{module}.{role.removeprefix(_NORM)}", view=view)


def _check_tokens(adapter: Adapter, found: Sequence[Effect]) -> None:
    told = adapter.config.raw.get("trainable_token_indices")
    if told and not any(effect.operator == "rows" for effect in found):
        raise InputError(
            f"trainable_token_indices is {shown(told)}, but there is no trainable_tokens_delta",
            where=adapter.where,
            hint="the file is incomplete",
        )


def _wrapped(adapter: Adapter, module: str) -> list[str]:
    """The parameters of `module` that factors may be laid over themselves; none for an ordinary layer."""
    nested = f"{module}.base_layer" in adapter.modules
    if not nested and "lora_A.weight" not in adapter.modules.get(module, {}):
        return []  # token rows and the like
    return wrapped_parameters(module, adapter.config, nested=nested)


def _plain_modules(adapter: Adapter) -> Iterator[tuple[str, dict[str, View]]]:
    for name, roles in adapter.modules.items():
        if not _wrapped(adapter, unwrap(name)[0]):
            yield name, roles


def _token_effect(adapter: Adapter, module: str, rows: View, parameters: Parameters) -> Effect:
    path = f"{module}.weight"
    shape = _shape_of(parameters, path, adapter)
    indices = token_indices(adapter.config, module, str(adapter.folder))
    if rows.size != (len(indices), *shape[1:]) or len(shape) != 2:
        raise InputError(
            f"{printable(rows.spec.name)!r} has shape {rows.size}, expected {(len(indices), *shape[1:])}",
            where=adapter.where,
        )
    if len(set(indices)) != len(indices) or not all(0 <= index < shape[0] for index in indices):
        raise InputError(
            f"the token indices of {printable(module)!r} are not different rows below {shape[0]}",
            where=str(adapter.folder),
        )
    return Effect(path=path, operator="rows", tensors={"rows": rows}, options={"indices": indices}, shape=(1, *shape))


def _lora(adapter: Adapter, module: str, roles: Mapping[str, View], parameters: Parameters) -> list[Effect]:
    if strange := sorted(roles.keys() - _LORA_ROLES):
        names = [roles[role].spec.name for role in strange]
        raise InputError(
            f"{len(names)} tensors are no part of a LoRA: {listing(names)}",
            where=adapter.where,
            hint="nothing is skipped; is the file of another kind of adapter?",
        )
    path, times = f"{module}.weight", 1.0
    if module.endswith(_OUT_PROJ):
        # PEFT's MultiheadAttention adds this delta in its own forward pass and in out_proj's once more.
        path, times = f"{module.removesuffix(_OUT_PROJ)}.out_proj.weight", 2.0
    elif parameters.shape(path) is None and parameters.shape(f"{module}.in_proj_weight") is not None:
        path = f"{module}.in_proj_weight"
    linear = Linear(
        module=module,
        path=path,
        shape=_shape_of(parameters, path, adapter),
        holds_transposed=parameters.holds_transposed(path),
        times=times,
    )
    return lora_effects(adapter, linear, roles)


def _tuned(adapter: Adapter, module: str, roles: Mapping[str, View], parameters: Parameters) -> list[Effect]:
    """The effects of a tuner other than LoRA, by the registry."""
    tuner = TUNERS[adapter.config.peft_type]
    where = adapter.where
    missing, strange = sorted(set(tuner.tails) - roles.keys()), roles.keys() - {*tuner.tails, *tuner.optional}
    if missing or strange:
        raise InputError(
            f"{printable(module)!r} has {listing(sorted(roles))}, expected {listing([*tuner.tails])}", where=where
        )
    path = f"{module}.weight"
    stored = _shape_of(parameters, path, adapter)
    if len(stored) != 2:
        raise InputError(
            f"{tuner.peft_type} on {printable(path)!r} of shape {stored}; only linear layers can be merged", where=where
        )
    transposed = parameters.holds_transposed(path)
    out, into = reversed(stored) if transposed else stored
    tensors = {**roles, **{name: view for name, view in adapter.shared.items() if name in tuner.shared}}
    shapes = {name: view.size for name, view in tensors.items()}
    options = tuner.read_options(adapter.config.raw, module, shapes, (out, into))
    common: dict[str, Any] = {"operator": tuner.operator, "tensors": tensors, "options": options}
    found = []
    if tuner.changes_weight:
        found.append(Effect(path=path, shape=(1, out, into), transposed=transposed, **common))
    bias = parameters.shape(f"{module}.bias")
    if not tuner.changes_weight and bias is None:
        raise InputError(f"{tuner.peft_type} trained the bias of {printable(module)!r}, which has none", where=where)
    if bias not in (None, (out,)):
        raise InputError(f"the bias of {printable(module)!r} has shape {bias}, expected ({out},)", where=where)
    if bias is not None and (tuner.changes_bias or not tuner.changes_weight) and not options.get("keeps_bias"):
        found.append(Effect(path=f"{module}.bias", shape=(1, out, 1), **common))
    return found


def _expert_effects(adapter: Adapter, parameters: Parameters) -> Iterator[Effect]:
    stacks: dict[str, dict[int, dict[str, View]]] = {}
    for name, roles in adapter.modules.items():
        module, depth = unwrap(name)
        if _wrapped(adapter, module):
            stacks.setdefault(module, {})[depth] = roles
    for module, depths in stacks.items():
        factors = {depth: _pair(adapter, module, roles) for depth, roles in depths.items()}
        names = assign(
            module,
            {depth: (a.size, b.size) for depth, (a, b) in factors.items()},
            {name: parameters.shape(f"{module}.{name}") for name in _wrapped(adapter, module)},
            order=partial(parameters.order, module),
            where=adapter.where,
        )
        for depth, (a, b) in factors.items():
            yield _expert_effect(adapter, (module, names[depth]), a, b, parameters)


def _pair(adapter: Adapter, module: str, roles: Mapping[str, View]) -> tuple[View, View]:
    config = adapter.config
    variants = {
        "use_dora": config.use_dora,
        "init_lora_weights": config.init in ("pissa", "olora"),
        **{name: bool(config.raw.get(name)) for name in ("kasa_config", "use_bdlora", "lora_bias")},
    }
    if told := [name for name, chosen in variants.items() if chosen]:
        raise InputError(
            f"{' and '.join(told)} have no known meaning for the parameters of {printable(module)!r}",
            where=adapter.where,
        )
    if roles.keys() != {"lora_A.weight", "lora_B.weight"}:
        raise InputError(
            f"the expert parameters of {printable(module)!r} have {listing(sorted(roles))}, expected lora_A and lora_B",
            where=adapter.where,
            hint="DoRA and biases on parameters are not what PEFT saves",
        )
    return roles["lora_A.weight"], roles["lora_B.weight"]


def _expert_effect(adapter: Adapter, target: tuple[str, str], a: View, b: View, parameters: Parameters) -> Effect:
    module, name = target
    path = f"{module}.{name}"
    shape = _shape_of(parameters, path, adapter)
    experts = shape[0] if len(shape) == 3 else 1
    transposed = is_transposed(
        (a.size, b.size),
        shape,
        flagged=partial(parameters.marks_transposed, module),
        config=adapter.config,
        where=adapter.where,
    )
    rank = a.size[0] // experts
    check_rank(adapter, path, rank, a)
    if (rank, rank * experts) != (b.size[1] // experts, a.size[0]):
        raise InputError(f"the factors of {printable(path)!r} do not fit: {a.size}, {b.size}", where=adapter.where)
    scaling = adapter.config.scaling(path, rank)
    return Effect(
        path=path,
        operator=LORA,
        tensors={
            "a": stack_a(a, experts),
            "b": stack_b(b, experts, expert_major=_expert_major(adapter, rank, experts)),
        },
        options={"scaling": scaling},
        shape=(experts, b.size[0], a.size[1]),
        transposed=transposed,
    )


def _expert_major(adapter: Adapter, rank: int, experts: int) -> bool:
    """The order of lora_B's columns, which only matters where there are several of both."""
    chosen = adapter.options.expert_b_order
    if chosen != "auto" or rank == 1 or experts == 1:
        return chosen == "expert-major"
    told = f"{adapter.config.base_model} {adapter.config.raw.get('auto_mapping')}"
    if "unsloth" in told.lower():
        raise InputError(
            "the adapter comes from Unsloth, whose kernels order the columns of experts' lora_B otherwise than PEFT, "
            "and the file does not tell which of the two it holds",
            where=adapter.where,
            hint="--expert-b-order expert-major if Unsloth's own kernels trained it, else --expert-b-order peft",
        )
    return False


def _shape_of(parameters: Parameters, path: str, adapter: Adapter) -> tuple[int, ...]:
    """The shape of a parameter in training: that of the table that the adapter brings, or the base's."""
    shape = parameters.shape(path)
    if shape is None:
        raise InputError(f"the base has no {printable(path)!r}", where=adapter.where)
    return adapter.full[path].size if path in adapter.full else shape
