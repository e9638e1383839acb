"""PEFT's other tuners in float64: the weight that each makes of a linear layer's, from the files alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

HEADS = "lora_|hada_|lokr_|vera_|ia3_|oft_|boft_|hra_|ln_tuning_|miss_|trainable_tokens_delta"
Roles = Mapping[str, Tensor]


def tuned(
    config: Mapping[str, Any],
    module: str,
    roles: Roles,
    *,
    shared: Roles,
    values: Mapping[str, Tensor],
    conv1d: Collection[str],
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `module` as the tuner of `config` leaves them."""
    if config["peft_type"] == "LN_TUNING":
        for tail, tensor in roles.items():
            yield f"{module}.{tail.removeprefix('ln_tuning_layers.')}", tensor.double()
        return
    name, flip = f"{module}.weight", module in conv1d
    weight = values[name].T if flip else values[name]
    wide = {key: tensor.double() for key, tensor in (*roles.items(), *shared.items())}
    after = _FORMULAS[config["peft_type"]](weight, wide, config)
    yield name, after.T if flip else after
    bias = f"{module}.bias"
    if config["peft_type"] == "IA3" and bias in values and wide["ia3_l"].shape[1] == 1:
        yield bias, values[bias] * wide["ia3_l"][:, 0]


def _loha(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    return weight + product * config["alpha"] / config["r"]


def _lokr(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    one, two = (t[f"lokr_w{n}"] if f"lokr_w{n}" in t else t[f"lokr_w{n}_a"] @ t[f"lokr_w{n}_b"] for n in (1, 2))
    return weight + torch.kron(one, two) * config["alpha"] / config["r"]


def _adalora(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    return weight + t["lora_B"] @ (t["lora_A"] * t["lora_E"]) * config["lora_alpha"] / (config["init_r"] + 1e-5)


def _vera(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    out, into = weight.shape
    return weight + (t["vera_lambda_b"][:, None] * t["vera_B"][:out]) @ (
        t["vera_lambda_d"][:, None] * t["vera_A"][:, :into]
    )


def _ia3(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    return weight * t["ia3_l"]


def _oft(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    blocks = t["oft_R.weight"]
    size = config["oft_block_size"]
    above = torch.triu_indices(size, size, 1)
    rotations = []
    for values in blocks:
        q = torch.zeros(size, size, dtype=torch.float64)
        q[above[0], above[1]] = values
        q = q - q.T
        if config["use_cayley_neumann"]:
            rotations.append(torch.eye(size) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
        else:
            rotations.append((torch.eye(size) - q) @ torch.linalg.inv(torch.eye(size) + q))
    return weight @ torch.block_diag(*rotations).T


def _boft(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    assert t["boft_R"].shape[0] == 1, "one factor: no butterfly"
    rotations = []
    for block in t["boft_R"][0]:
        q = (block - block.T) / 2
        eye = torch.eye(q.shape[0], dtype=torch.float64)
        rotations.append((eye - q) @ torch.linalg.inv(eye + q))
    return weight @ torch.block_diag(*rotations).T * t["boft_s"]


def _hra(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    for vector in t["hra_u"].T:
        unit = vector / vector.norm()
        weight = weight - 2 * torch.outer(weight @ unit, unit)
    return weight


def _miss(weight: Tensor, t: Roles, config: Mapping[str, Any]) -> Tensor:
    block = t["miss_block"].T
    return weight + block.repeat(1, -(-weight.shape[1] // block.shape[1]))[:, : weight.shape[1]]


_FORMULAS: dict[str, Callable[[Tensor, Roles, Mapping[str, Any]], Tensor]] = {
    "LOHA": _loha,
    "LOKR": _lokr,
    "ADALORA": _adalora,
    "VERA": _vera,
    "IA3": _ia3,
    "OFT": _oft,
    "BOFT": _boft,
    "HRA": _hra,
    "MISS": _miss,
}
