"""Training checkpoints say the same adapter as the folder that PEFT would have saved from them."""

from __future__ import annotations

import json
import shutil
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
from distmerge.adapter.saved.training import Saved, read_saved
from distmerge.errors import InputError
from tests.conftest import environment
from tests.models import build

ZERO3 = Path(__file__).parents[1] / "real" / "data" / "zero3_llava_next"


def read(path: Path, **changes: Any) -> Saved:
    options: dict[str, Any] = {"base_modules": (), "base_config": {}, "lora_alpha": None, "use_rslora": None}
    return read_saved(path, **{**options, "allow_pickle": False, **changes})


def values(saved: Saved) -> dict[str, Tensor]:
    return {name: read_view(saved.folder, view) for name, view in saved.tensors.items()}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def peft_model(name: str = "llama", **changes: Any) -> Any:
    """A model of tests.models with a LoRA whose factors are all random."""
    import peft

    options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(build(name), peft.LoraConfig(**{**options, **changes}))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad and "modules_to_save" not in key:
                value.add_(torch.randn(value.shape) * 0.1)
    return model


def save_raw(model: Any, folder: Path, *, config: bool = True) -> Path:
    """What a trainer leaves that saves the state of the whole model."""
    folder.mkdir(parents=True)
    save_file(
        {key: value.clone().contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    if config:
        model.peft_config["default"].save_pretrained(folder)
    return folder


def saved_by_peft(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


TRAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"down_proj": 4}},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [1, 4]},
    "biases": {"bias": "all", "lora_bias": True, "name": "gpt2", "target_modules": ["c_attn"]},
    "own biases": {"bias": "lora_only", "name": "gpt2", "target_modules": ["c_attn"]},
    "experts": {
        "name": "mixtral",
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "vision": {"name": "llava_next", "modules_to_save": ["multi_modal_projector"]},
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_raw_state_says_what_save_pretrained_says(name: str, tmp_path: Path) -> None:
    model = peft_model(**TRAINED[name])
    raw = read(save_raw(model, tmp_path / "raw"))
    wanted = saved_by_peft(model, tmp_path / "peft")
    assert same(values(raw), wanted)
    assert same(values(read(tmp_path / "peft")), wanted)
    config = read(tmp_path / "peft").config
    assert all(
        raw.config[field] == config[field] for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias")
    )


@pytest.mark.parametrize("name", TRAINED)
def test_every_tensor_of_a_raw_state_is_merged_or_its_reason_is_given(name: str, tmp_path: Path) -> None:
    raw = read(save_raw(peft_model(**TRAINED[name]), tmp_path / "raw"))
    used = {view.spec.name for view in raw.tensors.values()}
    assert used | raw.unused.keys() == load_file(raw.folder / "model.safetensors").keys()
    assert not used & raw.unused.keys()


@pytest.mark.parametrize("name", TRAINED)
def test_what_a_raw_state_holds_of_the_base_has_the_bases_names_and_values(name: str, tmp_path: Path) -> None:
    raw = read(save_raw(peft_model(**TRAINED[name]), tmp_path / "raw"))
    base = build(TRAINED[name].get("name", "llama")).state_dict()
    copies = {key: read_view(raw.folder, view) for key, view in raw.copies.items()}
    assert len(copies) > 10
    assert all(torch.equal(base[key], value) for key, value in copies.items())
    trained = {key for key in base if f"base_model.model.{key}" in raw.tensors}
    biases = {key for key in base if f"base_model.model.{key[:-5]}.base_layer.bias".replace("..", ".") in raw.tensors}
    assert base.keys() - copies.keys() - trained - biases == set()


@pytest.mark.parametrize("name", ["LoHaConfig", "VeraConfig", "AdaLoraConfig", "LNTuningConfig"])
def test_the_raw_state_of_another_tuner_says_what_save_pretrained_says(name: str, tmp_path: Path) -> None:
    import peft

    options = {"AdaLoraConfig": {"total_step": 9}, "LNTuningConfig": {"target_modules": ["norm"]}}.get(name, {})
    model = peft.get_peft_model(build("llama"), getattr(peft, name)(**{"target_modules": ["q_proj"], **options}))
    tails = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"]
    raw = read(save_raw(model, tmp_path / "raw"), tails=[*tails, "ln_tuning_layers.weight"])
    assert same(values(raw), saved_by_peft(model, tmp_path / "peft"))


def test_a_tied_heads_token_rows_are_left_to_the_embedding(tmp_path: Path) -> None:
    model = peft_model("llama_tied", trainable_token_indices=[1, 4])
    raw = read(save_raw(model, tmp_path / "raw"))
    assert same(values(raw), saved_by_peft(model, tmp_path / "peft"))
    assert any("rows of the embedding" in why for why in raw.unused.values())


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_packed_weights_of_a_raw_state_are_mirrors_with_their_bytes(storage: str, tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    model = peft_model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    packed = {}
    for key in [key for key in state if key.endswith("base_layer.weight")]:
        packed[key], _ = bnb.quantize_4bit(
            state[key], quant_type="nf4", blocksize=64, quant_storage=getattr(torch, storage)
        )
        state[key] = packed[key] if storage == "uint8" else packed[key].float()  # as zero_to_fp32 does
    (tmp_path / "raw").mkdir()
    save_file(state, tmp_path / "raw" / "model.safetensors")
    raw = read(tmp_path / "raw", lora_alpha=6)
    names = {key.removeprefix("base_model.model.").replace(".base_layer", ""): key for key in packed}
    assert {name: spec.name for name, spec in raw.mirrors.items()} == names
    assert not names.keys() & raw.copies.keys()
    assert same(values(raw), saved_by_peft(model, tmp_path / "peft"))


def test_a_packed_state_with_its_quantization_state_says_the_same_adapter(tmp_path: Path) -> None:
    import peft
    import transformers

    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    raw = read(save_raw(model, tmp_path / "raw"))
    assert any(key.endswith(".absmax") for key in raw.unused)
    assert not any("absmax" in key or "quant" in key for key in [*raw.copies, *raw.mirrors, *raw.tensors])
    assert same(values(raw), saved_by_peft(model, tmp_path / "peft"))


def test_a_compiled_model_says_the_same_adapter(tmp_path: Path) -> None:
    model = peft_model()
    wanted = saved_by_peft(model, tmp_path / "peft")
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0])
    inner = saved_by_peft(model, tmp_path / "inner")
    assert any("._orig_mod." in key for key in inner)
    assert same(values(read(tmp_path / "inner")), wanted)
    save_raw(torch.compile(model), tmp_path / "outer")
    assert same(values(read(tmp_path / "outer")), wanted)


def test_the_command_in_the_hint_makes_a_sharded_fsdp_checkpoint_readable(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = peft_model(modules_to_save=["lm_head"])
    training = tmp_path / "checkpoint-5"
    dcp.save({"model": model.state_dict()}, checkpoint_id=training / "pytorch_model_fsdp_0", no_dist=True)
    model.peft_config["default"].save_pretrained(tmp_path)
    with pytest.raises(InputError) as refused:
        read(training)
    command = refused.value.hint.partition("`")[2].partition("`")[0].replace(" OUT", f" {training / 'merged'}").split()
    assert command[:2] == ["accelerate", "merge-weights"]
    code = "from accelerate.commands.accelerate_cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *command[1:]], check=True, env=environment(), capture_output=True)
    merged = read(training / "merged")
    assert same(values(merged), saved_by_peft(model, tmp_path / "peft"))
    assert str(tmp_path / "adapter_config.json") in merged.notes[0]


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_zero3_checkpoint_says_what_training_computed(kind: str, tmp_path: Path) -> None:
    import peft
    import transformers

    saved = read(ZERO3 / kind)
    assert len(saved.mirrors) == (14 if kind == "packed" else 0)
    base = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        ZERO3 / "base", dtype=torch.float32, attn_implementation="eager"
    )
    own = base.state_dict()
    assert all(torch.equal(own[name], read_view(saved.folder, view)) for name, view in saved.copies.items())
    assert saved.copies.keys() | saved.mirrors.keys() == own.keys()
    if kind == "packed":
        _pack(base, saved)
    model = peft.get_peft_model(base, peft.LoraConfig(**_known(saved.config))).eval()
    outcome = peft.set_peft_model_state_dict(model, values(saved))
    assert not outcome.unexpected_keys
    reference = load_file(ZERO3 / f"{kind}-reference.safetensors")
    with torch.no_grad():
        logits = model(**{name: value for name, value in reference.items() if name != "logits"}).logits
    torch.testing.assert_close(logits, reference["logits"], rtol=1e-5, atol=1e-5)


def _pack(base: Any, saved: Saved) -> None:
    """Gives the linears of `base` the values that their packed forms in the checkpoint stand for."""
    import bitsandbytes.functional as bnb

    for name, spec in saved.mirrors.items():
        weight = base.get_parameter(name)
        packed, state = bnb.quantize_4bit(
            weight.data.to(torch.bfloat16), quant_type="nf4", blocksize=64, compress_statistics=True
        )
        stored = load_file(saved.folder / spec.file)[spec.name]
        assert torch.equal(packed, stored)
        weight.data = bnb.dequantize_4bit(packed, state).float()


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("r", "lora_alpha", "target_modules", "modules_to_save")}


def test_without_a_config_ranks_come_from_the_tensors_and_alpha_from_the_user(tmp_path: Path) -> None:
    model = peft_model(rank_pattern={"layers.1.self_attn.q_proj": 3}, modules_to_save=["lm_head"], use_dora=True)
    folder = save_raw(model, tmp_path / "run" / "raw", config=False)
    with pytest.raises(InputError, match="--lora-alpha N"):
        read(folder)
    config = read(folder, lora_alpha=6, use_rslora=True).config
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (2, 6, True, True)
    assert config["rank_pattern"] == {r"^model\.layers\.1\.self_attn\.q_proj": 3}
    assert config["modules_to_save"] == ["lm_head"]


@pytest.mark.parametrize("levels", [1, 2])
def test_the_config_of_the_run_is_used_and_said(levels: int, tmp_path: Path) -> None:
    model = peft_model()
    folder = save_raw(model, tmp_path / "run" / "checkpoint-5" / "out", config=False)
    model.peft_config["default"].save_pretrained(folder.parents[levels - 1])
    saved = read(folder)
    assert saved.config["lora_alpha"] == 6
    assert str(folder.parents[levels - 1] / "adapter_config.json") in saved.notes[0]


def test_a_config_three_folders_up_belongs_to_something_else(tmp_path: Path) -> None:
    model = peft_model()
    folder = save_raw(model, tmp_path / "a" / "b" / "c" / "raw", config=False)
    model.peft_config["default"].save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        read(folder)


def test_what_the_user_says_of_alpha_counts(tmp_path: Path) -> None:
    folder = save_raw(peft_model(), tmp_path / "raw")
    config = read(folder, lora_alpha=11.0, use_rslora=True).config
    assert (config["lora_alpha"], config["use_rslora"]) == (11.0, True)


def test_the_shards_of_an_index_are_read_as_one_state(tmp_path: Path) -> None:
    model = peft_model()
    wanted = values(read(save_raw(model, tmp_path / "whole")))
    state = load_file(tmp_path / "whole" / "model.safetensors")
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copy(tmp_path / "whole" / "adapter_config.json", folder)
    weight_map = {key: f"model-{number % 3}.safetensors" for number, key in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({key: value for key, value in state.items() if weight_map[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(values(read(folder)), wanted)
