"""Makes tests/real/data/foreign: tiny adapters, each written by the library whose names it has, and what they come to.

Needs, beside what the tests need (no GPU; mlx runs on the CPU of Linux too):

    pip install torch==2.13.0 transformers==5.23.0 lycoris-lora==4.1.3 torchtune==0.6.1 torchao==0.11.0 \
        "mlx[cpu]==0.32.4" mlx-lm==0.32.2
    python tests/real/make_foreign.py lycoris torchtune mlx
    pip uninstall torchao && pip install peft==0.21.2 diffusers==0.42.1      # PEFT refuses this old torchao
    python tests/real/make_foreign.py diffusers

Every folder holds what the library saved, `modules.json` with the module paths of the base, and `reference.safetensors`
with `base.<path>` and `merged.<path>` for each changed weight, as the library itself computes with it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "foreign"
LLAMA = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


def main(*producers: str) -> None:
    makers: dict[str, list[tuple[Any, ...]]] = {
        "lycoris": [("lora",), ("dora",), ("loha",), ("lokr",), ("lokr_full",)],
        "torchtune": [(family, dora) for family in ("llama", "qwen2") for dora in (False, True)],
        "mlx": [(False,), (True,)],
        "diffusers": [("metadata",), ("bare",), ("kohya",)],
    }
    for producer in producers:
        for arguments in makers[producer]:
            globals()[f"make_{producer}"](*arguments)
    print(*sorted(f"{path.relative_to(FOLDER)} {path.stat().st_size}" for path in FOLDER.rglob("*.*")), sep="\n")


def new_folder(name: str) -> Path:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save_reference(folder: Path, base: dict[str, Tensor], merged: dict[str, Tensor], modules: list[str]) -> None:
    changed = {name: weight for name, weight in merged.items() if not torch.equal(weight, base[name])}
    tensors = {f"base.{name}": base[name] for name in changed} | {f"merged.{name}": w for name, w in changed.items()}
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / "reference.safetensors")
    (folder / "modules.json").write_text(json.dumps(sorted(modules), indent=0) + "\n")


def randomise(tensors: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)


def linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "weight")]


def make_lycoris(kind: str) -> None:
    """LyCORIS over a Llama; its merge scales LoHa and LoKr twice, so the reference is its forward."""
    import transformers
    from lycoris import LycorisNetwork, create_lycoris

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    modules = linears(model)
    paths = [name for name in modules if name.endswith(("q_proj", "down_proj"))]
    base = {f"{path}.weight": model.get_submodule(path).weight.detach().clone() for path in paths}
    LycorisNetwork.apply_preset({"target_module": [], "target_name": [".*q_proj", ".*down_proj"]})
    options: dict[str, Any] = {"algo": kind.removesuffix("_full").replace("dora", "lora")}
    options |= {"dora_wd": kind == "dora", "full_matrix": kind == "lokr_full", "factor": 2}
    network = create_lycoris(model, 1.0, linear_dim=3, linear_alpha=1.5, **options)
    network.apply_to()
    randomise(list(network.parameters()))
    folder = new_folder(f"lycoris_{kind}")
    network.save_weights(str(folder / "adapter.safetensors"), torch.float32, {})
    with torch.no_grad():
        merged = {
            f"{path}.weight": model.get_submodule(path)(torch.eye(model.get_submodule(path).in_features)).T
            for path in paths
        }
    save_reference(folder, base, merged, modules)


def make_torchtune(family: str, dora: bool) -> None:
    """torchtune's own adapter_model.pt; the reference is its merged checkpoint under transformers' names."""
    from torchtune.models import convert_weights
    from torchtune.models.llama3 import lora_llama3
    from torchtune.models.qwen2 import lora_qwen2
    from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
    from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt

    torch.manual_seed(0)
    build, convert = (lora_llama3, convert_weights.tune_to_hf) if family == "llama" else (lora_qwen2, qwen2_tune_to_hf)
    model = build(
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=20,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=16,
        intermediate_dim=24,
        max_seq_len=32,
        lora_rank=3,
        lora_alpha=6,
        use_dora=dora,
    )
    sizes = {"num_heads": 4, "num_kv_heads": 2, "dim": 16}
    adapter = get_adapter_params(model)
    with torch.no_grad():
        for name, value in adapter.items():
            if name.endswith("magnitude"):
                value.fill_(1.0)
    randomise(list(adapter.values()))
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    dense = {name: value for name, value in state.items() if name not in adapter}
    merged = get_merged_lora_ckpt({name: value.clone() for name, value in state.items()}, rank=3, alpha=6)
    folder = new_folder(f"torchtune_{family}_{'dora' if dora else 'lora'}")
    torch.save({name: value.detach().clone() for name, value in adapter.items()}, folder / "adapter_model.pt")
    config = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"],
    }
    config = convert_weights.tune_to_peft_adapter_config({**config, "peft_type": "LORA"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = convert(dense, **sizes)
    save_reference(folder, base, convert(merged, **sizes), [name.removesuffix(".weight") for name in base])


def make_mlx(dora: bool) -> None:
    """What `mlx_lm.lora` leaves; the reference is its fused model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **{**LLAMA, "tie_word_embeddings": False})
    )
    parameters = {"rank": 3, "dropout": 0.0, "scale": 2.5}
    if not dora:
        parameters["keys"] = ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"]
    else:
        parameters["keys"] = ["self_attn.q_proj", "mlp.down_proj"]
    model.freeze()
    base = {name: numbers(value) for name, value in tree_flatten(model.parameters())}
    linear_to_lora_layers(model, 1, parameters, use_dora=dora)
    model.update(tree_map(lambda value: value + mx.random.normal(value.shape) * 0.3, model.trainable_parameters()))
    folder = new_folder(f"mlx_{'dora' if dora else 'lora'}")
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 1, "lora_parameters": parameters}
    save_config(config, folder / "adapter_config.json")
    fused = {f"{name}.weight": numbers(m.fuse().weight) for name, m in model.named_modules() if hasattr(m, "fuse")}
    save_reference(folder, base, fused, [name.removesuffix(".weight") for name in base])


def numbers(array: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(array))


def make_diffusers(name: str) -> None:
    """LoRA on a UNet, as diffusers saves it with and without its metadata, and in kohya's form."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    def build() -> Any:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            layers_per_block=1,
            cross_attention_dim=6,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )

    model = build()
    modules = linears(model)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    alpha = 5 if name == "metadata" else 2
    targets = ["to_q", "to_out.0"] + ["conv_in"] * (name == "metadata")
    model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=targets))
    randomise([value for key, value in model.named_parameters() if "lora_" in key])
    state = get_peft_model_state_dict(model)
    folder = new_folder(f"diffusers_{name}")
    if name == "kohya":
        # The pipelines' exporter; it sets alpha to the rank.
        layers = {f"unet.{key}": value for key, value in state.items()}
        save_file(convert_state_dict_to_kohya(layers), folder / "adapter.safetensors")
    else:
        told = {key: value for key, value in model.peft_config["default"].to_dict().items() if value is not None}
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(state),
            unet_lora_adapter_metadata=told if name == "metadata" else None,
        )
    model.fuse_lora()
    merged = {
        key.replace(".base_layer.", "."): value for key, value in model.state_dict().items() if "lora_" not in key
    }
    save_reference(folder, base, merged, modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
