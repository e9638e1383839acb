"""LoRA's variants as operators: DoRA, KaSA, PiSSA, OLoRA and block-diagonal LoRA against PEFT's unmerged models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from distmerge.numerics.tuners import LOW_RANK, OPERATORS
from tests.tuners import PREFIX, TARGETS, TOKENS, disturb, llama, saved

ROLES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude", "lora_diag": "diag"}
ALL = slice(0, None)


def train(
    adapters: int = 1, **fields: Any
) -> tuple[Any, dict[str, Tensor], Tensor, list[dict[str, dict[str, Tensor]]]]:
    """An empty model, the base's weights, the unmerged model's logits and each adapter's tensors by module and role."""
    import peft

    # PEFT takes decompositions of float32 weights alone.
    model = llama().float()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = ["default", "second"][:adapters]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **fields)
        tuned = peft.get_peft_model(model, config).eval()
        for name in names[1:]:
            tuned.add_adapter(name, config)
        tuned.base_model.set_adapter(names)
        disturb(tuned, 0.1)
        logits = tuned.eval()(TOKENS).logits
        files = [saved(tuned, name)[1] for name in names]
    return llama().float(), base, logits, [by_module(tensors) for tensors in files]


def by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        tail = next(tail for tail in ROLES if key.endswith(f".{tail}"))
        found.setdefault(key.removeprefix(PREFIX).removesuffix(f".{tail}"), {})[ROLES[tail]] = tensor.double()
    return found


def assert_logits(model: Any, base: dict[str, Tensor], changed: dict[str, Tensor], logits: Tensor) -> None:
    """The model with `changed` weights gives `logits`, and the base gives something else entirely."""
    with torch.no_grad():
        model.load_state_dict(base)
        assert float((model(TOKENS).logits - logits).abs().max()) > 0.02
        model.load_state_dict({**base, **{f"{name}.weight": weight.float() for name, weight in changed.items()}})
        assert float((model(TOKENS).logits - logits).abs().max()) < 5e-5


@pytest.mark.parametrize("operator", ["dora", "kasa", "pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_operator_gives_the_logits_of_the_unmerged_model(operator: str, use_rslora: bool) -> None:
    from peft.tuners.lora.config import KasaConfig

    fields: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "kasa": {"kasa_config": KasaConfig()}}
    chosen = fields.get(operator, {"init_lora_weights": operator})
    model, base, logits, (adapter,) = train(use_rslora=use_rslora, **chosen)
    options = {"scaling": 3.0 if use_rslora else 1.5}
    changed = {}
    for name, tensors in adapter.items():
        weight = base[f"{name}.weight"].double()
        changed[name] = OPERATORS[operator].apply(weight, weight, tensors, options, slice(0, len(weight)))
    assert_logits(model, base, changed, logits)


def test_two_dora_adapters_take_their_norms_from_the_unmerged_base() -> None:
    model, base, logits, adapters = train(adapters=2, use_dora=True)
    changed = {}
    for name in adapters[0]:
        weight = running = base[f"{name}.weight"].double()
        for adapter in adapters:
            running = OPERATORS["dora"].apply(running, weight, adapter[name], {"scaling": 1.5}, slice(0, len(weight)))
        changed[name] = running
    assert_logits(model, base, changed, logits)


def test_dora_by_blocks_of_rows_is_dora_of_all_rows() -> None:
    _, base, _, (adapter,) = train(use_dora=True)
    name, tensors = next(iter(adapter.items()))
    weight = base[f"{name}.weight"].double()
    whole = OPERATORS["dora"].apply(weight + 1, weight, tensors, {"scaling": 1.5}, slice(0, len(weight)))
    for rows in (slice(0, 3), slice(5, 40), slice(len(weight) - 1, len(weight))):
        part = OPERATORS["dora"].apply(weight[rows] + 1, weight[rows], tensors, {"scaling": 1.5}, rows)
        assert torch.allclose(part, whole[rows], rtol=0, atol=1e-13)


def test_block_diagonal_factors_give_the_logits_of_the_unmerged_model() -> None:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "gate_proj"], nblocks=2)
    model, base, logits, (adapter,) = train(use_bdlora=BdLoraConfig(**{**vars(blocks), "match_strict": False}))
    changed = {}
    for name, tensors in adapter.items():
        options = {
            "scaling": 1.5,
            "blocks_a": 2 if "down_proj" in name else 1,
            "blocks_b": 2 if "q_proj" in name or "gate_proj" in name else 1,
        }
        b, a = LOW_RANK["bdlora"](tensors, options)
        changed[name] = base[f"{name}.weight"].double() + b @ a
    assert_logits(model, base, changed, logits)
