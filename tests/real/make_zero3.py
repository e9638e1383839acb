"""Makes tests/real/data/zero3_llava_next: a tiny LLaVA-NeXT, trained by DeepSpeed ZeRO-3 and consolidated by its tool.

Needs deepspeed beside what the tests need; no GPU. In a virtual environment:

    DS_BUILD_OPS=0 pip install deepspeed==0.19.8 torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 tests/real/make_zero3.py

It saves a random base in bfloat16, trains PEFT LoRA on the language model's linears and the whole projector for two
steps on two processes, lets DeepSpeed save, runs the `zero_to_fp32.py` that DeepSpeed put beside the checkpoint, and
writes the logits of the trained model, computed by PEFT in float32 from the consolidated tensors. Once with the dense
base, once with a base that bitsandbytes packed to NF4.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "data" / "zero3_llava_next"
# bitsandbytes' CPU kernel needs in_features that are multiples of the block size, 64.
TEXT = {
    "model_type": "llama",
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 20,
}
LANGUAGE_LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
IMAGE_TOKEN = 5
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def main() -> None:
    """Runs in every process of torchrun; the files are the first one's work."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    if _is_first():
        shutil.rmtree(FOLDER, ignore_errors=True)
        _save_base(FOLDER / "base")
    torch.distributed.barrier()
    for name in ("dense", "packed"):
        _train(name)
        torch.distributed.barrier()
    if _is_first():
        print(*sorted(f"{path.relative_to(FOLDER)} {path.stat().st_size}" for path in _files(FOLDER)), sep="\n")


def _is_first() -> bool:
    return os.environ["RANK"] == "0"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _save_base(folder: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlavaNextConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[16, 16]],
        tie_word_embeddings=False,
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape) * 0.05)  # biases begin as zeros, norms as ones
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn((1, 2, 3, 16, 16), generator=generator)
    sizes = torch.tensor([[16, 16]])
    # 4 patches of the whole image, 4 of its one tile and a newline after each of the tile's 2 rows.
    image = torch.full((10,), IMAGE_TOKEN)
    words = torch.randint(IMAGE_TOKEN + 1, TEXT["vocab_size"], (7,), generator=generator)  # type: ignore[call-overload]
    ids = torch.cat([words[:2], image, words[2:]])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}


def _load(name: str, dtype: torch.dtype) -> Any:
    """The base as training loads it, with an adapter."""
    import peft
    import transformers

    quantization = {
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["lm_head", "model.multi_modal_projector", "model.vision_tower"],
        ),
        "device_map": {"": "cpu"},
    }
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        FOLDER / "base", dtype=dtype, attn_implementation="eager", **(quantization if name == "packed" else {})
    )
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=LANGUAGE_LINEARS, modules_to_save=["multi_modal_projector"]
    )
    torch.manual_seed(2)
    return peft.get_peft_model(model, config)


def _train(name: str) -> None:
    import deepspeed

    model = _load(name, torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=0.05), config=ZERO3)
    inputs = _inputs(engine.module)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    for _ in range(2):
        loss = engine(**inputs, labels=inputs["input_ids"]).loss
        engine.backward(loss)
        engine.step()
    raw = FOLDER / f"{name}-raw"
    engine.save_checkpoint(str(raw))
    torch.distributed.barrier()
    if _is_first():
        command = [sys.executable, str(raw / "zero_to_fp32.py"), str(raw), str(FOLDER / name), "--safe_serialization"]
        subprocess.run([*command, "--max_shard_size", "200KB"], check=True)
        shutil.rmtree(raw)
        _save_reference(name)


def _save_reference(name: str) -> None:
    """What the trained model answers: PEFT's own forward over the consolidated tensors, in float32, with the linears
    that the packed model trained on."""
    from safetensors.torch import load_file, save_file

    state = {key: value for path in (FOLDER / name).glob("*.safetensors") for key, value in load_file(path).items()}
    model = _load("dense", torch.float32).eval()
    expected = model.state_dict()
    packed = {key for key, value in state.items() if value.dtype == torch.uint8}
    if name == "packed":
        import bitsandbytes.functional

        seen = dict(_load("packed", torch.bfloat16).named_parameters())
        for key in packed:
            assert torch.equal(seen[key].data, state[key]), key
            weight = bitsandbytes.functional.dequantize_4bit(seen[key].data, seen[key].quant_state)
            state[key] = weight.float()
    assert state.keys() == expected.keys()
    model.load_state_dict(state)
    if name == "dense":
        model.peft_config["default"].base_model_name_or_path = "base"
        model.peft_config["default"].save_pretrained(FOLDER)
        config = json.loads((FOLDER / "adapter_config.json").read_text())
        (FOLDER / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    inputs = _inputs(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    save_file({**inputs, "logits": logits}, FOLDER / f"{name}-reference.safetensors")


if __name__ == "__main__":
    main()
