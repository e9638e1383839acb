"""PEFT's tuners on a tiny Llama, trained-like, and what distmerge makes of the files that they save."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distmerge.adapter.tuners.registry import TUNERS, Tuner
from distmerge.numerics.tuners import LOW_RANK, OPERATORS
from tests.factories import build_llama

TARGETS = ["q_proj", "k_proj", "gate_proj", "down_proj"]  # (64, 64), (32, 64), (160, 64), (64, 160)
TOKENS = torch.arange(12).view(2, 6) * 7 + 3
PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tuner's configuration, and how close PEFT, which computes some of them in float32, comes to float64."""

    config: str
    fields: dict[str, Any]
    noise: float = 0.3
    tolerance: float = 1e-11
    biases: bool = False

    @property
    def logits_tolerance(self) -> float:
        """A Llama's norms round to float32 in between."""
        return max(self.tolerance, 2e-6)

    def __str__(self) -> str:
        values = "-".join(f"{key}={value}" for key, value in self.fields.items() if key != "target_modules")
        return f"{self.config}-{values}{'-biases' * self.biases}"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A base, the files of an adapter, and the logits of base and unmerged model, all in float64."""

    base: dict[str, Tensor]
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    base_logits: Tensor
    logits: Tensor
    merged: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What an operator is called with for one module."""

    name: str
    weight: Tensor
    tensors: dict[str, Tensor]
    options: dict[str, Any]


def llama(biases: bool = False) -> Any:
    """A Llama in float64 whose weights are large enough for an adapter to be seen in the logits."""
    model = build_llama(torch.float64, attention_bias=biases, mlp_bias=biases).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.dim() == 2 else 0.02
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
            if "layernorm" in name:
                parameter.clamp_(min=0.5)
    return model


def peft_config(case: Case) -> Any:
    import peft

    return getattr(peft, f"{case.config}Config")(**{"target_modules": TARGETS, **case.fields})


def disturb(model: Any, noise: float, name: str = "") -> None:
    """Changes every trainable parameter whose name contains `name`, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "ranknum" in key:
                continue  # AdaLoRA's rank: PEFT lets it be trained where it changed its dtype, and does not save it
            if parameter.requires_grad and parameter.is_floating_point() and name in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * noise)


def saved(model: Any, adapter: str = "default") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors that PEFT writes."""
    with tempfile.TemporaryDirectory() as root:
        model.save_pretrained(root, selected_adapters=[adapter])
        folder = Path(root) if adapter == "default" else Path(root) / adapter
        tensors = load_file(folder / "adapter_model.safetensors")
        return json.loads((folder / "adapter_config.json").read_text()), tensors


@lru_cache(maxsize=64)
def _train(key: str, biases: bool) -> Trained:
    case = _BY_NAME[key]
    import peft

    model = llama(biases)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base_logits = model(TOKENS).logits
        torch.manual_seed(1)
        tuned = peft.get_peft_model(model, peft_config(case)).eval()
        disturb(tuned, case.noise)
        logits = tuned(TOKENS).logits
        config, tensors = saved(tuned)
        merged = tuned.merge_and_unload().state_dict()
    return Trained(base=base, config=config, tensors=tensors, base_logits=base_logits, logits=logits, merged=merged)


_BY_NAME: dict[str, Case] = {}


def train(case: Case) -> Trained:
    """The adapter of `case`, made by PEFT and then disturbed."""
    _BY_NAME[str(case)] = case
    return _train(str(case), case.biases)


def modules(base: Mapping[str, Tensor], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Tuned]:
    """What the files alone say for each module: every tensor belongs to one module or to all."""
    tuner = TUNERS[config["peft_type"]]
    shared = {name: tensors[f"base_model.{name}"] for name in tuner.shared}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.removeprefix("base_model.") in shared:
            continue
        tail = next(t for t in (*tuner.tails, *tuner.optional) if key.endswith(f".{t}"))
        found.setdefault(key.removeprefix(PREFIX).removesuffix(f".{tail}"), {})[tail] = tensor
    assert all(set(tuner.tails) <= own.keys() for own in found.values())
    return [
        _tuned(tuner, config, name, base[f"{name}.weight"], {**own, **shared}) for name, own in sorted(found.items())
    ]


def _tuned(tuner: Tuner, config: Mapping[str, Any], name: str, weight: Tensor, tensors: dict[str, Tensor]) -> Tuned:
    size = (weight.shape[0], weight.shape[-1])
    options = tuner.read_options(config, name, {key: tuple(t.shape) for key, t in tensors.items()}, size)
    assert options == json.loads(json.dumps(options))
    doubles = {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}
    return Tuned(name=name, weight=weight, tensors=doubles, options=options)


def rewritten(operator: str, weight: Tensor, base: Tensor, tuned: Tuned) -> Tensor:
    """All rows of `weight` after `operator`."""
    if operator in LOW_RANK:
        b, a = LOW_RANK[operator](tuned.tensors, tuned.options)
        return weight + b @ a
    return OPERATORS[operator].apply(weight, base, tuned.tensors, tuned.options, slice(0, len(weight)))


def merge(
    running: Mapping[str, Tensor], base: Mapping[str, Tensor], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`running` after the adapter of `config` and `tensors`, which was trained on `base`."""
    tuner = TUNERS[config["peft_type"]]
    result = dict(running)
    for tuned in modules(base, config, tensors):
        weight, bias = f"{tuned.name}.weight", f"{tuned.name}.bias"
        if not tuner.operator:
            result |= {f"{tuned.name}.{tail.rpartition('.')[2]}": tensor for tail, tensor in tuned.tensors.items()}
            continue
        if tuner.changes_weight:
            result[weight] = rewritten(tuner.operator, running[weight], tuned.weight, tuned)
        if tuner.changes_bias and bias in base and not tuned.options.get("keeps_bias"):
            result[bias] = rewritten(tuner.operator, running[bias][:, None], base[bias][:, None], tuned)[:, 0]
    return result


def logits(weights: Mapping[str, Tensor], biases: bool = False) -> Tensor:
    """The logits of a plain Llama with `weights`."""
    model = llama(biases)
    model.load_state_dict(weights)
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


FLOAT32 = 2e-5
CASES = [
    Case(config="LoHa", fields={"r": 4, "alpha": 6}),
    Case(config="LoHa", fields={"r": 4, "alpha": 6, "alpha_pattern": {"k_proj": 3}, "rank_pattern": {"down_proj": 3}}),
    Case(config="LoKr", fields={"r": 4, "alpha": 6}),
    Case(config="LoKr", fields={"r": 2, "alpha": 6, "decompose_both": True, "decompose_factor": 8}),
    Case(config="LoKr", fields={"r": 16, "alpha": 5, "rank_pattern": {"k_proj": 32}}),
    Case(config="AdaLora", fields={"init_r": 6, "target_r": 4, "lora_alpha": 5, "total_step": 10}),
    Case(config="Vera", fields={"r": 8}),
    Case(config="Pvera", fields={"r": 8}),
    Case(config="IA3", fields={"feedforward_modules": ["down_proj"]}),
    Case(config="IA3", fields={"feedforward_modules": ["down_proj"]}, biases=True),
    Case(config="OFT", fields={"oft_block_size": 8}, noise=0.05),
    Case(config="OFT", fields={"oft_block_size": 8, "num_cayley_neumann_terms": 3}, noise=0.05),
    Case(config="OFT", fields={"oft_block_size": 8, "num_cayley_neumann_terms": 4}, noise=0.05),
    Case(config="OFT", fields={"oft_block_size": 8, "num_cayley_neumann_terms": 2}, noise=0.05),
    Case(config="OFT", fields={"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 7}, noise=0.02),
    Case(config="OFT", fields={"oft_block_size": 8, "use_cayley_neumann": False}, biases=True),
    Case(config="OFT", fields={"oft_block_size": 16, "block_share": True}, noise=0.03),
    Case(config="OFT", fields={"oft_block_size": 8, "coft": True, "eps": 0.5}, noise=0.05, tolerance=FLOAT32),
    Case(config="BOFT", fields={"boft_block_size": 4}),
    Case(config="BOFT", fields={"boft_block_size": 0, "boft_block_num": 8}, biases=True),
    Case(config="HRA", fields={"r": 4}),
    Case(config="HRA", fields={"r": 3, "apply_GS": True}),
    Case(config="FourierFT", fields={"n_frequency": 60, "scaling": 130.0}, tolerance=FLOAT32),
    Case(config="VBLoRA", fields={"vector_length": 8, "num_vectors": 16, "topk": 2, "r": 4}),
    Case(
        config="VBLoRA",
        fields={"vector_length": 8, "num_vectors": 16, "topk": 3, "r": 4, "save_only_topk_weights": True},
    ),
    Case(config="Miss", fields={"r": 4}, noise=0.02),
    Case(config="Miss", fields={"r": 7}, noise=0.02),
    Case(config="Miss", fields={"r": 8, "init_weights": "bat"}, noise=0.05),
    Case(config="Miss", fields={"r": 4, "mini_r": 8, "init_weights": "mini"}, noise=0.02),
    Case(config="Shira", fields={"r": 2, "random_seed": 3}),
    Case(config="C3A", fields={"block_size": 8}, tolerance=FLOAT32),
    Case(config="C3A", fields={"block_size": 16, "block_size_pattern": {"k_proj": 32}}, tolerance=FLOAT32),
    Case(config="Delora", fields={"r": 4, "delora_lambda": 3, "rank_pattern": {"k_proj": 2}}),
    Case(config="Hira", fields={"r": 4, "rank_pattern": {"k_proj": 2}}),
    Case(config="RandLora", fields={"r": 5, "randlora_alpha": 3}, noise=0.1),
    Case(config="RandLora", fields={"r": 4, "randlora_alpha": 3, "sparse": True}, noise=0.1),
    Case(config="Road", fields={"group_size": 8}, biases=True),
    Case(config="Road", fields={"group_size": 16, "variant": "road_2"}),
    Case(config="Road", fields={"group_size": 8, "variant": "road_4"}, biases=True),
    Case(config="OSF", fields={"effective_rank": 20}, noise=0.1, tolerance=1e-4),
    Case(config="WaveFT", fields={"n_frequency": 60}),
    Case(config="WaveFT", fields={"n_frequency": 60, "wavelet_family": "db3", "scaling": 20.0}),
    Case(config="WaveFT", fields={"n_frequency": 60, "wavelet_family": "sym5", "proportional_parameters": True}),
    Case(config="WaveFT", fields={"n_frequency": 60, "wavelet_family": "coif3", "n_frequency_pattern": {"k_proj": 9}}),
    Case(config="WaveFT", fields={"n_frequency": 60, "use_idwt": False}),
    Case(config="Gralora", fields={"r": 4, "alpha": 6}),
    Case(config="Gralora", fields={"r": 8, "alpha": 6, "gralora_k": 4, "hybrid_r": 3}),
    Case(config="Glora", fields={"r": 4}),
    Case(config="Glora", fields={"config_A_B": "vector"}),
    Case(config="Glora", fields={"config_A_B": "constant"}),
    Case(config="Glora", fields={"r": 4, "config_C": "none", "config_D_E": "none"}, biases=True),
    Case(config="UniLora", fields={"r": 4, "theta_d_length": 50, "save_indices": True}),
    Case(config="Peanut", fields={"r": 4, "depth": 2, "scaling": 0.5}),
    Case(config="Peanut", fields={"r": 4, "act_fn": "gelu"}),
    Case(config="Deft", fields={"r": 4, "alpha": 6}, tolerance=FLOAT32),
    Case(config="Deft", fields={"r": 4, "decomposition_method": "qr"}, tolerance=FLOAT32, biases=True),
    Case(config="Deft", fields={"r": 4, "para": True}, noise=0.1, tolerance=FLOAT32),
    Case(config="Supertuning", fields={"sparsity": 0.9}),
    Case(config="Supertuning", fields={"sparsity": 0.9, "r": 4, "lora_alpha": 3}),
    Case(config="Beft", fields={}, biases=True),
    Case(config="LNTuning", fields={"target_modules": ["input_layernorm", "norm"]}),
    Case(
        config="TrainableTokens",
        fields={"token_indices": [10, 3, 31], "target_modules": ["embed_tokens", "lm_head"]},
    ),
]
