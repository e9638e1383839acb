"""Adapters under other producers' names: every tensor of them lost, misshapen, mistyped or doubled."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distmerge.inspection import inspect
from tests.attacks.scene import CONFIG, HEAD, WEIGHTS, Q, Scene, failure
from tests.factories import edit_json, load_folder

FLAT = "lora_unet_" + Q.replace(".", "_")
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def factors(down: str, up: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {down: torch.randn(2, 12, generator=generator), up: torch.randn(8, 2, generator=generator)}


# By producer: the tensors, the configuration, and the factor of the delta that they mean.
KOHYA = {**factors(f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight"), f"{FLAT}.alpha": torch.tensor(4.0)}
DIALECTS: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, float]] = {
    "kohya": (KOHYA, None, 2.0),
    "kohya without alpha": (factors(f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight"), None, 1.0),
    "diffusers": (factors(f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight"), None, 1.0),
    "old diffusers": (factors(f"unet.{Q}.lora.down.weight", f"unet.{Q}.lora.up.weight"), None, 1.0),
    "torchtune": (factors("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"), LORA, 2.0),
    "mlx": ({n: t.T for n, t in factors(f"{Q}.lora_a", f"{Q}.lora_b").items()}, MLX, 2.0),
}
each = pytest.mark.parametrize("dialect", DIALECTS)


def write(scene: Scene, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scene.adapter / WEIGHTS)
    (scene.adapter / CONFIG).unlink(missing_ok=True)
    if config is not None:
        (scene.adapter / CONFIG).write_text(json.dumps(config))
    edit_json(scene.base / "config.json", model_type="qwen2", num_attention_heads=2)


@each
def test_the_dialect_itself_is_understood(small: Scene, dialect: str) -> None:
    tensors, config, scaling = DIALECTS[dialect]
    write(small, tensors, config)
    small.merge()
    a, b = (t.T if dialect == "mlx" else t for t in list(tensors.values())[:2])
    expected = load_folder(small.base)[f"{Q}.weight"] + scaling * (b @ a)
    assert torch.allclose(load_folder(small.output)[f"{Q}.weight"], expected, atol=1e-5)


@each
def test_a_tensor_of_a_dialect_that_is_spoiled_is_refused_or_means_the_same(small: Scene, dialect: str) -> None:
    tensors, config, _ = DIALECTS[dialect]
    for key, tensor in tensors.items():
        one = tensor.reshape(-1)[:1]
        spoiled = [one[0].clone(), one, one[:0], tensor[None], torch.cat([one, one]), tensor * math.nan]
        spoiled += [tensor.to(dtype) for dtype in (torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn)]
        spoiled += [torch.cat([tensor, tensor]), tensor.reshape(1, -1)] if tensor.dim() else []
        for wrong in spoiled:
            write(small, {**tensors, key: wrong}, config)
            error = small.try_plan()
            assert error is not None or key.endswith("alpha"), (key, wrong.shape, wrong.dtype)
            assert failure(lambda: inspect(small.adapter)) is None
        write(small, {name: t for name, t in tensors.items() if name != key}, config)
        assert small.try_plan() is not None or key.endswith("alpha"), key


@each
@pytest.mark.parametrize(
    "tail", ["extra", "alpha2", "lora_mid.weight", "lora_c.weight", "m", "dora_scale", "bias", "lora.x"]
)
def test_a_surplus_tensor_of_a_dialect_is_refused(small: Scene, dialect: str, tail: str) -> None:
    tensors, config, _ = DIALECTS[dialect]
    module = next(iter(tensors)).partition(".lora")[0]
    write(small, {**tensors, f"{module}.{tail}": torch.ones(3)}, config)
    small.refuse(WEIGHTS)


@each
@pytest.mark.parametrize("key", ["base_model.model.lm_head.weight", HEAD, "extra", "lora_A.weight"])
def test_a_tensor_of_another_dialect_is_refused(small: Scene, dialect: str, key: str) -> None:
    tensors, config, _ = DIALECTS[dialect]
    write(small, {**tensors, key: torch.ones(20, 12)}, config)
    small.refuse(WEIGHTS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e38, 1e-38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_alpha_that_is_no_number_for_a_scaling_is_refused(small: Scene, value: float, dtype: torch.dtype) -> None:
    alpha = torch.tensor(value, dtype=dtype)
    write(small, {**KOHYA, f"{FLAT}.alpha": alpha}, None)
    small.refuse("alpha" if not alpha.isfinite() or alpha == 0 else "scaling")


@pytest.mark.parametrize("value", ["x", None, True, [2.0], math.nan, math.inf, {}, "2.0"], ids=str)
def test_a_scale_that_is_no_number_is_refused(small: Scene, value: Any) -> None:
    tensors, _, _ = DIALECTS["mlx"]
    write(small, tensors, {"fine_tune_type": "lora", "lora_parameters": {"scale": value}})
    small.refuse("scale", WEIGHTS)


@pytest.mark.parametrize("value", ["x", None, 0, -1, True, 2.0, 3, [2], 10**30], ids=str)
def test_heads_that_do_not_divide_the_rows_are_refused(small: Scene, value: Any) -> None:
    tensors, config, _ = DIALECTS["torchtune"]
    write(small, tensors, config)
    edit_json(small.base / "config.json", model_type="llama", num_attention_heads=value)
    small.refuse(WEIGHTS, "q_proj")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"lora_alpha": NaN}', '{"unet.lora_alpha": "x"}', '{"unet.r": -1, "unet.lora_alpha": 2}']
)
def test_metadata_that_says_nothing_sensible_is_refused(small: Scene, text: str) -> None:
    tensors, _, _ = DIALECTS["diffusers"]
    write(small, tensors, None)
    save_file(tensors, small.adapter / WEIGHTS, metadata={"lora_adapter_metadata": text})
    error = small.try_plan()
    assert error is not None or text == '{"lora_alpha": NaN}'  # of a component that the file does not hold
