"""Tiny checkpoints in every way of naming their tensors, the models in them, and what those answer to fixed inputs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import models
from tests.factories import load_folder, split_files
from tests.matrix.zoo import CLASSES, maker

TOKENS = torch.tensor([[7, 11, 13, 17, 19, 23, 29, 31], [3, 2, 40, 41, 6, 47, 1, 9]])
IMAGE_TOKEN = 5
_MEMORY: dict[tuple[str, ...], Path] = {}


def folder(root: Path, name: str, naming: str = "hub", dtype: str = "float32", shard: str = "50GB") -> Path:
    """The checkpoint of model `name` below `root`, made once. `naming` is `hub` (as transformers saves by default),
    `modules` (its own names), or one of VARIANTS."""
    key = (str(root), name, naming, dtype, shard)
    if key not in _MEMORY:
        _MEMORY[key] = _save(root / "-".join(key[1:]), name, naming, getattr(torch, dtype), shard)
    return _MEMORY[key]


def _save(where: Path, name: str, naming: str, dtype: torch.dtype, shard: str) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = build(name).to(dtype)
    if isinstance(model, Net):
        where.mkdir(parents=True)
        save_file(model.state_dict(), where / "model.safetensors", metadata={"format": "pt"})
        (where / "config.json").write_text(json.dumps({"model_type": "net"}))
        return where
    model.save_pretrained(where, save_original_format=naming != "modules", max_shard_size=shard)
    if naming in VARIANTS:
        twin = where.with_name(f"{where.name}-fused")
        model.save_pretrained(twin, save_original_format=False)
        tensors = VARIANTS[naming](load_folder(where), load_file(twin / "model.safetensors"))
        shutil.rmtree(twin)
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        if index := sorted(where.glob("*.index.json")):
            files = json.loads(index[0].read_text())["weight_map"]
            last = max(files.values())
            save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
            index[0].unlink()
            split_files(where, {key: files.get(key, last) for key in tensors})
        else:
            save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    return where


Tensors = dict[str, Tensor]
# What files of the Hub have and transformers 5 no longer writes; from the tensors of both ways of saving.
VARIANTS: dict[str, Callable[[Tensors, Tensors], Tensors]] = {
    "clip": lambda hub, _: {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in hub.items()
    },
    "mixed": lambda hub, modules: {
        **{name: tensor for name, tensor in modules.items() if ".layers.0." in name},
        **{name: tensor for name, tensor in hub.items() if ".layers.0." not in name},
    },
    "transposed": lambda hub, _: {name: tensor.mT if ".experts." in name else tensor for name, tensor in hub.items()},
}


def build(name: str) -> Any:
    """A model of tests.models, or one of those that only the matrix needs."""
    if name in models.NAMES:
        return models.build(name)
    torch.manual_seed(0)
    model = _MORE[name]().eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape) * 0.02)
    return model


class Net(nn.Module):
    """Convolutions, attention of torch's own and an embedding: what no model of transformers has together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.line = nn.Conv1d(24, 12, 3, padding=1)
        self.plane = nn.Conv2d(1, 6, (3, 2))
        self.point = nn.Conv2d(6, 5, 1)
        self.solid = nn.Conv3d(1, 4, (2, 3, 1))
        self.mha = nn.MultiheadAttention(12, 3, batch_first=True)
        self.out = nn.Linear(12, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        states = torch.tanh(self.line(self.embed(tokens).mT)).mT
        image = self.point(torch.tanh(self.plane(states[:, None])))
        solid = self.solid(image[:, None])
        return (
            self.out(self.mha(states, states, states)[0])
            + solid.mean()
            + torch.tanh(image).mean((1, 2, 3))[:, None, None]
        )


def _tied(name: str) -> Callable[[], Any]:
    """The model `name` with the head tied to the input embedding, as most checkpoints of its class have it."""

    def make() -> Any:
        model = models.build(name)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = True
        return type(model)(model.config)

    return make


_SQUARE = {**models.TEXT, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8}
_MORE: dict[str, Callable[[], Any]] = {
    "net": Net,
    **{name: maker(*how) for name, how in CLASSES.items()},
    "qwen2": maker("Qwen2ForCausalLM", models.TEXT),
    "llama_biased": maker("LlamaForCausalLM", {**models.WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama_deep": maker("LlamaForCausalLM", {**models.WIDE, "num_hidden_layers": 3}),
    "llama_backbone": maker("LlamaModel", models.WIDE),
    "gemma": maker("GemmaForCausalLM", {**models.WIDE, "tie_word_embeddings": True}),
    "mixtral_square": maker("MixtralForCausalLM", {**_SQUARE, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gpt_oss_square": maker("GptOssForCausalLM", {**_SQUARE, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gemma3_tied": _tied("gemma3"),
    "paligemma_tied": _tied("paligemma"),
    "qwen2_vl_tied": _tied("qwen2_vl"),
}


@cache
def _inputs(name: str) -> dict[str, Any]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def picture(tokens: int, *, batch: int = 1) -> Tensor:
        return torch.tensor([[7, 11, *[IMAGE_TOKEN] * tokens, 13, 17, 19]] * batch)

    grid = {
        "input_ids": picture(4),
        "mm_token_type_ids": (picture(4) == IMAGE_TOKEN).long(),
        "pixel_values": noise(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    tile = {
        "input_ids": TOKENS[:1],
        "pixel_values": noise(1, 1, 4, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        "cross_attention_mask": torch.ones(1, 8, 1, 4),
    }
    square = {"input_ids": picture(4), "pixel_values": noise(1, 3, 16, 16)}
    pages = {"input_ids": picture(10), "pixel_values": noise(1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    two = {
        "input_ids": picture(1, batch=2),
        "pixel_values": noise(2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * 2),
    }
    known = {
        "llava": square,
        "gemma3": square,
        "paligemma": square,
        "llava_next": pages,
        "mllama": tile,
        "llama4": square,
    }
    both = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}
    sound = {"input_features": noise(2, 6, 16), "decoder_input_ids": TOKENS}
    known |= {"t5": both, "bart": both, "whisper": sound, "internvl": {**square, "input_ids": picture(1)}}
    known |= {"mistral3": two, "qwen2_vl": grid, "qwen2_5_vl": grid, "qwen3_vl": grid, "qwen3_vl_moe": grid}
    return known.get(name.removesuffix("_tied"), {"input_ids": TOKENS})


def answers(model: Any, name: str) -> Tensor:
    """What `model`, wrapped by an adapter or not, makes of the inputs for `name`."""
    model = model.eval()
    with torch.no_grad():
        if name == "net":
            return model(TOKENS % 20)
        model.config.pad_token_id = 0
        model.config.image_token_id = IMAGE_TOKEN  # some classes' own number is beyond the tiny vocabulary
        given = model(**_inputs(name))
        return next(
            tensor for key in ("logits", "last_hidden_state") if (tensor := getattr(given, key, None)) is not None
        )


def load(folder: Path, *, kind: str = "", dtype: str = "float32") -> Any:
    """The model in `folder` as transformers loads it; `kind` names another class than that of config.json, else
    nothing may be missing or left over."""
    if is_net(folder):
        net = Net().to(getattr(torch, dtype))
        net.load_state_dict(load_folder(folder))
        return net.eval()
    torch.manual_seed(1)  # a head that the file lacks is random
    model, info = _class(folder, kind).from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    wrong = {key: names for key, names in info.items() if names and (not kind or key == "mismatched_keys")}
    if "unexpected_keys" in wrong and type(model).__name__.endswith("Classification"):
        wrong.pop("unexpected_keys")  # the head that was replaced
    assert not wrong, wrong
    return model.eval()


def not_loaded(folder: Path, kind: str) -> list[str]:
    """The tensors of the checkpoint that class `kind` has no use for."""
    if not kind:
        return []
    _, info = _class(folder, kind).from_pretrained(folder, output_loading_info=True)
    return sorted(info["unexpected_keys"])


def is_net(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["model_type"] == "net")


def _class(folder: Path, kind: str) -> Any:
    import transformers

    return getattr(transformers, kind or json.loads((folder / "config.json").read_text())["architectures"][0])


def old_naming(name: str, release: str) -> str:
    """How checkpoints were named at the time of an old `release`."""
    return "clip" if name.startswith(("llava", "gemma3", "paligemma")) and release != "4" else "hub"


def old_names(names: list[str], name: str, release: str) -> dict[str, str]:
    """What the modules of model `name` were called in `release`, for the `names` of a checkpoint of that time."""
    if release != "4.52":
        return {key: key for key in names}
    rules = _SINCE_4_52["qwen" if name.startswith("qwen") else "llava"]
    found = {}
    for key in names:
        new = key
        for pattern, replacement in rules:
            new, done = re.subn(pattern, replacement, new)
            if done:
                break
        found[key] = new
    return found


# Since 4.52 the parts of a model are inside of `model`, and the head is beside it.
_SINCE_4_52 = {
    "llava": (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^(?=vision_tower|multi_modal_projector|vision_model)", "model."),
    ),
    "qwen": ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")),
}
