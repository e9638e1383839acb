"""Adapters that other libraries saved merge into what those libraries compute with them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distmerge.adapter.load import read_view
from distmerge.adapter.saved.keys import parse
from distmerge.adapter.saved.training import Saved, read_saved
from distmerge.errors import InputError
from tests.conftest import environment

FOREIGN = Path(__file__).parents[1] / "real" / "data" / "foreign"
NAMES = sorted(path.name for path in FOREIGN.iterdir() if path.is_dir())
LLAMA_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def read(name: str, scratch: Path, **changes: Any) -> Saved:
    """The adapter in the folder `name` for its own base."""
    folder = FOREIGN / name
    family = name.split("_")[1] if name.startswith("torchtune") else "llama"
    options: dict[str, Any] = {
        "base_modules": json.loads((folder / "modules.json").read_text()),
        "base_config": {"model_type": family, **LLAMA_HEADS},
        "lora_alpha": None,
        "use_rslora": None,
        "allow_pickle": True,
        "scratch": scratch,
    }
    path = next((folder / file for file in ("adapter.safetensors",) if (folder / file).exists()), folder)
    return read_saved(path, **{**options, **changes})


def value_of(config: Mapping[str, Any], field: str, module: str) -> float:
    """`r` or alpha of a module by PEFT's rule."""
    patterns = config.get("rank_pattern" if field == "r" else "alpha_pattern") or {}
    found = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
    return float(found[0] if found else config[field])


def merged(weight: Tensor, roles: dict[str, Tensor], scale: float) -> Tensor:
    """The weight with an adapter, by PEFT's formulas."""
    get = roles.get
    if "hada_w1_a" in roles:
        return weight + scale * (roles["hada_w1_a"] @ roles["hada_w1_b"]) * (roles["hada_w2_a"] @ roles["hada_w2_b"])
    if "lokr_w1" in roles or "lokr_w1_a" in roles:
        left, right = (
            roles[f"lokr_w{i}"] if f"lokr_w{i}" in roles else roles[f"lokr_w{i}_a"] @ roles[f"lokr_w{i}_b"]
            for i in (1, 2)
        )
        return weight + scale * torch.kron(left, right).reshape(weight.shape)
    if "lora_embedding_A" in roles:
        return weight + scale * (roles["lora_embedding_B"] @ roles["lora_embedding_A"]).T
    a, b = roles["lora_A.weight"], roles["lora_B.weight"]
    r = a.shape[0]
    changed = weight + scale * (b.reshape(-1, r) @ a.reshape(r, -1)).reshape(weight.shape)
    magnitude = get("lora_magnitude_vector")
    if magnitude is None:
        return changed
    return changed * (magnitude.reshape(-1) / changed.norm(dim=1))[:, None]


def merge(saved: Saved, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, view in saved.tensors.items():
        key = parse(name, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
        role = key.role if key.role != "full" else key.param
        modules.setdefault(key.module, {})[role] = read_view(saved.folder, view).float()
    alpha = "lora_alpha" if saved.config["peft_type"] == "LORA" else "alpha"
    scales = {module: value_of(saved.config, alpha, module) / value_of(saved.config, "r", module) for module in modules}
    return {f"{m}.weight": merged(base[f"{m}.weight"], roles, scales[m]) for m, roles in modules.items()}


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_another_library_comes_to_what_that_library_computes(name: str, tmp_path: Path) -> None:
    reference = load_file(FOREIGN / name / "reference.safetensors")
    base = {key.removeprefix("base."): value for key, value in reference.items() if key.startswith("base.")}
    wanted = {key.removeprefix("merged."): value for key, value in reference.items() if key.startswith("merged.")}
    found = merge(read(name, tmp_path), base)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_file_is_merged_or_its_reason_is_given(name: str, tmp_path: Path) -> None:
    saved = read(name, tmp_path)
    files = [saved.folder / file for file in saved.files]
    stored = {key for file in files for key in load_file(file)}
    used = {view.spec.name for view in saved.tensors.values()}
    assert used | saved.unused.keys() == stored
    assert not used & saved.unused.keys()


def test_torch_is_not_needed_to_plan_with_an_adapter_of_another_library(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from distmerge.adapter.saved.training import read_saved\n"
        "modules = ['model.layers.0.self_attn.q_proj', 'model.layers.0.mlp.down_proj']\n"
        "read_saved(Path(sys.argv[1]), base_modules=modules, base_config={}, lora_alpha=None, use_rslora=None,"
        " allow_pickle=False)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(FOREIGN / "lycoris_lora" / "adapter.safetensors")]
    subprocess.run(command, check=True, env=environment(), cwd=Path(__file__).parents[2])


MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")
Q, DOWN = "lora_unet_model_layers_0_self_attn_q_proj", "lora_unet_model_layers_1_mlp_down_proj"
PAIR = {"lora_down.weight": (2, 3), "lora_up.weight": (4, 2)}


def flat(module: str, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The factors of a module in kohya's form."""
    return {f"{module}.{tail}": shape for tail, shape in {**PAIR, **more}.items()}


def put(folder: Path, shapes: Mapping[str, tuple[int, ...]], name: str = "a.safetensors", **metadata: str) -> Path:
    save_file({key: torch.full(shape, 3.0) for key, shape in shapes.items()}, folder / name, metadata=metadata or None)
    return folder / name


def plan(path: Path, **changes: Any) -> Saved:
    options: dict[str, Any] = {"base_modules": MODULES, "base_config": {}, "lora_alpha": None, "use_rslora": None}
    return read_saved(path, **{**options, "allow_pickle": False, **changes})


def test_every_module_has_the_alpha_and_the_rank_of_its_own(tmp_path: Path) -> None:
    shapes = {
        **flat(Q),
        f"{Q}.alpha": (),
        **flat(DOWN),
        f"{DOWN}.lora_down.weight": (5, 3),
        f"{DOWN}.lora_up.weight": (4, 5),
    }
    config = plan(put(tmp_path, shapes)).config
    module = {Q: MODULES[0], DOWN: MODULES[2]}
    assert [value_of(config, "lora_alpha", module[name]) for name in (Q, DOWN)] == [3.0, 5.0]
    assert [value_of(config, "r", module[name]) for name in (Q, DOWN)] == [2, 5]
    given = plan(tmp_path / "a.safetensors", lora_alpha=7.0).config
    assert [value_of(given, "lora_alpha", module[name]) for name in (Q, DOWN)] == [7.0, 7.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_is_read_in_every_dtype_it_is_saved_in(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {key: torch.ones(size) for key, size in flat(Q).items()}
    save_file({**tensors, f"{Q}.alpha": torch.full(shape, 6, dtype=getattr(torch, dtype))}, tmp_path / "a.safetensors")
    assert plan(tmp_path / "a.safetensors").config["lora_alpha"] == 6.0


OLD = {
    "unet.model.layers.0.self_attn.processor.to_q_lora.down.weight": "lora_A.weight",
    "unet.model.layers.0.self_attn.processor.to_q_lora.up.weight": "lora_B.weight",
    "unet.model.layers.1.mlp.down_proj.lora.down.weight": "lora_A.weight",
    "unet.model.layers.1.mlp.down_proj.lora.up.weight": "lora_B.weight",
    "unet.model.layers.1.self_attn.q_proj.lora_linear_layer.down.weight": "lora_A.weight",
    "unet.model.layers.1.self_attn.q_proj.lora_linear_layer.up.weight": "lora_B.weight",
}


def test_the_older_names_of_diffusers_lead_to_the_same_modules(tmp_path: Path) -> None:
    shapes = {name: (2, 3) if "down." in name.rpartition("lora")[2] else (4, 2) for name in OLD}
    saved = plan(put(tmp_path, shapes, "pytorch_lora_weights.safetensors").parent)
    modules = [MODULES[0], MODULES[0], MODULES[2], MODULES[2], MODULES[1], MODULES[1]]
    wanted = {f"base_model.model.{module}.{role}" for module, role in zip(modules, OLD.values(), strict=True)}
    assert saved.tensors.keys() == wanted


def test_a_module_called_transformer_is_no_component_of_a_pipeline(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn"
    put(tmp_path, {f"{name}.lora_A.weight": (2, 3), f"{name}.lora_B.weight": (4, 2)})
    with pytest.raises(InputError, match="--lora-alpha"):
        plan(tmp_path, base_modules=[name])
    assert f"base_model.model.{name}.lora_A.weight" in plan(tmp_path, base_modules=[name], lora_alpha=2.0).tensors


def test_a_path_that_is_the_whole_name_goes_before_one_that_ends_so(tmp_path: Path) -> None:
    saved = plan(put(tmp_path, flat("lora_unet_q_proj")), base_modules=["block.q_proj", "q_proj"])
    assert "base_model.model.q_proj.lora_A.weight" in saved.tensors


TUNE = "layers.0.attn.q_proj"
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "a module that the base lacks": (flat("lora_unet_model_layers_7_q"), {}, "lora_unet_model_layers_7_q"),
    "a module that the base has twice": (flat("lora_te_q_proj"), {}, "not uniquely"),
    "two names of one module": ({**flat(Q), **flat(Q.replace("unet", "te"))}, {}, "two modules"),
    "a Tucker decomposition": (flat(Q, **{"lora_mid.weight": (2, 2, 3, 3)}), {}, "Tucker"),
    "a difference": (flat(Q, diff=(4, 3)), {}, "full difference"),
    "two kinds": ({**flat(Q), f"{DOWN}.hada_w1_a": (4, 2)}, {}, "several kinds"),
    "an alpha of nothing": ({**flat(Q), f"{DOWN}.alpha": ()}, {}, "no factors"),
    "an alpha of two numbers": ({**flat(Q), f"{Q}.alpha": (2,)}, {}, "one number"),
    "a magnitude of inputs": (flat(Q, dora_scale=(1, 3)), {}, "no magnitude"),
    "two components": ({f"{c}.a.lora_A.weight": (2, 3) for c in ("unet", "text_encoder")}, {}, "several components"),
    "torchtune for a strange base": ({f"{TUNE}.lora_a.weight": (2, 3)}, {"model_type": "phi3"}, "model_type 'phi3'"),
    "torchtune without heads": ({f"{TUNE}.lora_b.weight": (8, 2)}, {"model_type": "llama"}, "heads"),
    "torchtune with other heads": (
        {f"{TUNE}.lora_b.weight": (8, 2)},
        {"model_type": "llama", "num_attention_heads": 3},
        "3 heads",
    ),
    "torchtune's experts": ({"layers.0.mlp.experts.lora_gate_a": (2, 3)}, {"model_type": "llama"}, "no known name"),
    "mlx's experts": ({"model.q.lora_a": (2, 3, 4)}, {}, "no factor of a linear layer"),
    "mlx without its configuration": ({"model.q.lora_a": (3, 2)}, {}, "lora_parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_dialect_does_not_say_for_certain_is_refused_by_name(name: str, tmp_path: Path) -> None:
    shapes, config, words = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(words)):
        plan(put(tmp_path, shapes), base_config=config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fine_tune_type": "full"}, "not a LoRA"),
        ({"lora_parameters": {"rank": 2, "scale": 2.0, "alpha": 4}}, "both scale and alpha"),
        ({"lora_parameters": {"rank": 2, "scale": "2"}}, "not a number"),
        ({"lora_parameters": {"rank": 2, "scale": float("nan")}}, "not a number"),
    ],
)
def test_an_mlx_adapter_whose_scale_is_not_certain_is_refused(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    put(tmp_path, {"model.q.lora_a": (3, 2), "model.q.lora_b": (2, 4)}, "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        plan(tmp_path)


def test_an_adapter_that_torchtune_reordered_for_the_wrong_base_is_said(tmp_path: Path) -> None:
    name = f"base_model.model.{MODULES[0]}"
    put(tmp_path, {f"{name}.lora_A.weight": (2, 3), f"{name}.lora_B.weight": (4, 2)}, "adapter_model.safetensors")
    (tmp_path / "adapter_model.pt").write_bytes(b"")
    assert not plan(tmp_path, lora_alpha=1.0, base_config={"model_type": "llama"}).notes[1:]
    assert "q_proj and k_proj" in plan(tmp_path, lora_alpha=1.0, base_config={"model_type": "qwen2"}).notes[1]
