"""What an adapter's files make of a model's parameters, in float64: PEFT's formulas, written out one after another."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.matrix import exact_tuners

PREFIX = "base_model.model."
_TAIL = re.compile(rf"(?P<module>.+?)\.(?P<tail>(?:token_adapter\.)?(?:{exact_tuners.HEADS}).*)")
_LAYER = re.compile(r"(?P<stack>.*?\.?layers\.)(?P<number>\d+)(?P<rest>\..+)")


@dataclass(frozen=True, kw_only=True)
class Original:
    """A model before training: its parameters in the order of registration, the modules that hold (in, out), those
    whose experts do, and the names of one tensor that is the input embedding and more."""

    weights: dict[str, Tensor]
    conv1d: frozenset[str] = frozenset()
    flagged: frozenset[str] = frozenset()
    tie: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Value:
    """A parameter of the merged model, and the magnitude of the sums that the noise of float32 is proportional to: 0
    where nothing is computed, so that the bits must be right."""

    exact: Tensor
    magnitude: Tensor


@dataclass(kw_only=True)
class _Files:
    """An adapter's files: tensors of tuned modules by tail, tensors of the whole model, whole parameters."""

    config: dict[str, Any]
    weight: float
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)


def original(model: Any) -> Original:
    """The facts of a transformers model that nothing was done to yet."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    place = embedding.weight.data_ptr() if embedding is not None else None
    same = [name for name, tensor in model.state_dict().items() if tensor.data_ptr() == place]
    own = [f"{name}.weight" for name, module in modules.items() if module is embedding]
    return Original(
        weights=weights,
        conv1d=frozenset(name for name, module in modules.items() if type(module).__name__ == "Conv1D"),
        flagged=frozenset(name for name, module in modules.items() if getattr(module, "is_transposed", False) is True),
        tie=(*own, *(name for name in same if name not in own)) if len(same) > 1 else (),
    )


def merged(adapters: Sequence[tuple[Path, float]], model: Original, *, initial: Path | None = None) -> dict[str, Value]:
    """Every parameter of `model` with the adapters merged, each with its weight; `initial` is what the only one began
    as, and what was taken off the model before training."""
    values: dict[str, Value] = {}
    for folder, weight in [*adapters, *([(initial, -1.0)] if initial else [])]:
        files = _read(folder, weight)
        if initial:
            files.config["init_lora_weights"] = True
        if ranges := files.config.get("layer_replication"):
            model = _replicated(model, [number for first, last in ranges for number in range(first, last)])
        values = values or {name: _as_it_is(tensor) for name, tensor in model.weights.items()}
        values |= {name: _as_it_is(tensor) for name, tensor in files.full.items()}
        if len({values[name].exact.shape for name in model.tie}) > 1:
            table = next(name for name in model.tie if name in files.full)
            values |= dict.fromkeys(model.tie, values[table])  # the vocabulary is that of all of them
        for module, roles in files.modules.items():
            for name, value in _tuned(files, model, module, roles, values):
                values[name] = value
    return values


def _replicated(model: Original, sources: list[int]) -> Original:
    """The model with a new stack: layer n is what layer `sources[n]` was."""
    weights = {name: tensor for name, tensor in model.weights.items() if not _LAYER.match(name)}
    for number, source in enumerate(sources):
        for name, tensor in model.weights.items():
            if (match := _LAYER.match(name)) and int(match["number"]) == source:
                weights[f"{match['stack']}{number}{match['rest']}"] = tensor
    return replace(model, weights=weights)


def _as_it_is(tensor: Tensor) -> Value:
    return Value(exact=tensor.double() if tensor.is_floating_point() else tensor, magnitude=torch.zeros(tensor.shape))


def _read(adapter: Path, weight: float) -> _Files:
    files = _Files(config=json.loads((adapter / "adapter_config.json").read_text()), weight=weight)
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix(PREFIX)
        if name == key:
            files.shared[key.removeprefix("base_model.")] = tensor
        elif match := _TAIL.fullmatch(name):
            files.modules.setdefault(match["module"], {})[match["tail"]] = tensor
        elif ".original_module." not in name:
            for wrapper in (".token_adapter", ".base_layer", ".modules_to_save"):
                name = name.replace(f"{wrapper}.", ".")
            files.full[name] = tensor
    return files


def _tuned(
    files: _Files, model: Original, module: str, roles: dict[str, Tensor], values: Mapping[str, Value]
) -> Iterator[tuple[str, Value]]:
    """What the tensors of one module make of the parameters."""
    rows = roles.pop("token_adapter.trainable_tokens_delta", None)
    rows = roles.pop("trainable_tokens_delta", rows)
    if rows is not None:
        yield from _token_rows(files, model, module, rows, values)
    if not roles:
        return
    if files.config["peft_type"] != "LORA":
        running = {name: value.exact for name, value in values.items()}
        others = exact_tuners.tuned(
            files.config, module, roles, shared=files.shared, values=running, conv1d=model.conv1d
        )
        for name, exact in others:
            yield name, Value(exact=exact, magnitude=_magnitude(running[name], exact))
        return
    plain = module.removesuffix(".base_layer")
    while plain.endswith(".base_layer"):
        plain = plain.removesuffix(".base_layer")
    if parameter := _wrapped(files, model, module, plain):
        first = _acts_on_first(files.config, flagged=plain in model.flagged)
        yield parameter, _experts(files, parameter, roles, values[parameter], acts_on_first=first)
        return
    times, name = 1.0, f"{module}.weight"
    if module.endswith(".base_layer.out_proj"):
        times, name = 2.0, f"{module.removesuffix('.base_layer.out_proj')}.out_proj.weight"
    elif f"{module}.in_proj_weight" in values:
        name = f"{module}.in_proj_weight"
    unmerged = model.weights[name].double() if model.weights[name].shape == values[name].exact.shape else None
    yield name, _lora(files, module, roles, values[name], unmerged, flip=module in model.conv1d, times=times)
    if "lora_B.bias" in roles:
        bias = f"{module}.bias"
        delta = (
            files.weight
            * roles["lora_B.bias"].double()
            * scaling(files.config, module, roles["lora_A.weight"].shape[0])
        )
        yield bias, _plus(values[bias], delta, delta.abs())


def _magnitude(before: Tensor, after: Tensor) -> Tensor:
    """A bound for what a tuner adds up: rows and columns mix, so the largest element counts for all."""
    largest = max(float(before.abs().max()), float(after.abs().max()))
    return torch.full(after.shape, largest, dtype=torch.float64)


def _token_rows(
    files: _Files, model: Original, module: str, rows: Tensor, values: Mapping[str, Value]
) -> Iterator[tuple[str, Value]]:
    told = files.config.get("trainable_token_indices") or files.config.get("token_indices")
    indices = told if isinstance(told, list) else next(v for k, v in told.items() if f".{module}".endswith(f".{k}"))
    name = f"{module}.weight"
    for target in model.tie if name in model.tie[:1] else (name,):
        exact = values[target].exact.clone()
        exact[indices] = rows.double()
        yield target, Value(exact=exact, magnitude=values[target].magnitude)


def scaling(config: Mapping[str, Any], path: str, r: int) -> float:
    """`alpha / r` or `alpha / sqrt(r)` of the module `path`."""
    alpha = config["lora_alpha"]
    for pattern, chosen in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = chosen
            break
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _lora(
    files: _Files,
    module: str,
    roles: Mapping[str, Tensor],
    before: Value,
    unmerged: Tensor | None,
    *,
    flip: bool,
    times: float,
) -> Value:
    """A weight after LoRA in any of its variants; DoRA takes its norm from the unmerged weight."""
    embedding = "lora_embedding_A" in roles
    flip = flip or embedding
    a, b = (roles[f"lora_embedding_{x}" if embedding else f"lora_{x}.weight"].double().flatten(1) for x in "AB")
    r = a.shape[0]
    a, b = _unblocked(files.config, module, a, b)
    start = before.exact.T if flip else before.exact.flatten(1)
    s = scaling(files.config, module, r) * times * files.weight
    largest = 0.0
    if files.config.get("kasa_config"):
        u, sigma, v = torch.linalg.svd(start, full_matrices=False)
        start, b = (u[:, :-r] * sigma[:-r]) @ v[:-r], b * roles["lora_diag"].double()
        largest = 50 * float(sigma[0])  # singular vectors mix all elements
    elif (init := files.config.get("init_lora_weights")) in ("pissa", "olora"):
        largest = 50 * float(start.abs().max())
        start = start - s * _first_product(start, init, r, s)
    delta, size = s * (b @ a), abs(s) * (b.abs() @ a.abs())
    after, magnitude = start + delta, start.abs() + size + largest
    if "lora_magnitude_vector" in roles:
        own = before.exact if unmerged is None else unmerged
        norm = ((own.T if flip else own.flatten(1)) + delta).norm(dim=1)
        factor = (roles["lora_magnitude_vector"].double().flatten() / norm)[:, None]
        after, magnitude = factor * after, factor.abs() * magnitude
    if flip:
        after, magnitude = after.T, magnitude.T
    shape = before.exact.shape
    return Value(exact=after.reshape(shape), magnitude=magnitude.reshape(shape) + before.magnitude)


def _unblocked(config: Mapping[str, Any], module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of BD-LoRA with the zeros between their blocks."""
    told = config.get("use_bdlora") or {}
    if any(name in module for name in told.get("target_modules_bd_a") or ()):
        a = torch.block_diag(*a.chunk(told["nblocks"], 0))
    if any(name in module for name in told.get("target_modules_bd_b") or ()):
        b = torch.block_diag(*b.chunk(told["nblocks"], 0))
    return a, b


def _first_product(weight: Tensor, init: str, r: int, s: float) -> Tensor:
    """B0 @ A0, which PiSSA and OLoRA took off the base before training."""
    if init == "pissa":
        u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
        return (u[:, :r] * (sigma[:r] / s)) @ v[:r]
    q, upper = torch.linalg.qr(weight)
    return q[:, :r] @ upper[:r]


def _wrapped(files: _Files, model: Original, module: str, plain: str) -> str | None:
    """The parameter that the factors saved at `module` are laid over: the innermost wrapper is that of the first one
    registered."""
    targets = files.config.get("target_parameters") or []
    inside = [name for name in model.weights if name.rpartition(".")[0] == plain]
    wanted = [name for name in inside if any(f".{name}".endswith(f".{target}") for target in targets)]
    return wanted[len(wanted) - 1 - module.count(".base_layer")] if wanted else None


def _acts_on_first(config: Mapping[str, Any], *, flagged: bool) -> bool:
    """True if lora_A of square experts acts on their first dimension, by the release of PEFT."""
    version = tuple(int(part) for part in config["peft_version"].split(".")[:3])
    if version < (0, 19, 0):
        return True
    return not flagged if version == (0, 19, 0) else flagged


def _experts(files: _Files, name: str, roles: Mapping[str, Tensor], before: Value, *, acts_on_first: bool) -> Value:
    a, b = (roles[f"lora_{x}.weight"].double() for x in "AB")
    weight = before.exact
    experts = weight.shape[0] if weight.dim() == 3 else 1
    rank = a.shape[0] // experts
    a = a.reshape(experts, rank, a.shape[1])
    b = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    s = scaling(files.config, name, rank) * files.weight
    delta, size = s * (b @ a), abs(s) * (b.abs() @ a.abs())
    rows, cols = weight.shape[-2:]
    flip = acts_on_first if rows == cols else delta.shape[-2:] != (rows, cols)
    if flip:
        delta, size = delta.mT, size.mT
    return _plus(before, delta.reshape(weight.shape), size.reshape(weight.shape))


def _plus(before: Value, delta: Tensor, size: Tensor) -> Value:
    return Value(exact=before.exact + delta, magnitude=before.magnitude + before.exact.abs() * (size > 0) + size)
