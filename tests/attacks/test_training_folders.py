"""Folders of training that cannot be merged as they are: each is refused with what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distmerge.adapter.saved.training import Saved, read_saved
from distmerge.errors import InputError

Q = "base_model.model.model.layers.0.self_attn.q_proj"
RAW = {f"{Q}.lora_A.default.weight": (2, 3), f"{Q}.lora_B.default.weight": (4, 2)}
SAVED = {name.replace(".default", ""): shape for name, shape in RAW.items()}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def read(path: Path, **changes: Any) -> Saved:
    options: dict[str, Any] = {"base_modules": (), "base_config": {}, "lora_alpha": None, "use_rslora": None}
    return read_saved(path, **{**options, "allow_pickle": False, **changes})


def put(path: Path, shapes: dict[str, tuple[int, ...]] | None = None, config: dict[str, Any] | None = CONFIG) -> None:
    """A safetensors file with tensors of ones, and a configuration beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(shape) for name, shape in (shapes or SAVED).items()}, path)
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config))


def touch(folder: Path, *names: str) -> None:
    """Files with these names, in folders where the names have slashes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


SCATTERED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "DeepSpeed": (
        ("global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py", "latest", "training_args.bin"),
        ".",
        "python {}/zero_to_fp32.py {} OUT --safe_serialization",
    ),
    "a step of DeepSpeed": (
        ("global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        "global_step5",
        "python {}/zero_to_fp32.py {} OUT --safe_serialization",
    ),
    "FSDP": (
        ("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "scheduler.pt"),
        ".",
        "accelerate merge-weights {}/pytorch_model_fsdp_0 OUT",
    ),
    "the pieces of FSDP": (("x/__0_0.distcp", "x/.metadata"), "x", "accelerate merge-weights {}/x OUT"),
    "Megatron": (("latest_checkpointed_iteration.txt", "iter_0000010/common.pt"), ".", "save_hf_adapter"),
    "a rank of Megatron": (("mp_rank_00/model_optim_rng.pt",), ".", "save_hf_adapter"),
}


@pytest.mark.parametrize("name", SCATTERED)
def test_pieces_of_a_checkpoint_are_refused_with_the_command_that_gathers_them(name: str, tmp_path: Path) -> None:
    files, inner, command = SCATTERED[name]
    touch(tmp_path, *files)
    with pytest.raises(InputError) as refused:
        read(tmp_path / inner)
    assert command.format(tmp_path, tmp_path) in refused.value.hint


def test_an_adapter_beside_the_pieces_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    touch(tmp_path, *SCATTERED["DeepSpeed"][0], *SCATTERED["FSDP"][0])
    put(tmp_path / "adapter_model.safetensors")
    assert read(tmp_path).tensors.keys() == SAVED.keys()


def _two_adapters(folder: Path) -> None:
    put(folder / "model.safetensors", {**RAW, **{name.replace("default", "other"): (2, 3) for name in RAW}})


def _same_key_twice(folder: Path) -> None:
    put(folder / "adapter_model.safetensors", {**SAVED, f"_orig_mod.{Q}.lora_A.weight": (2, 3)})


def _one_tensor_in_two_shards(folder: Path) -> None:
    put(folder / "model-1.safetensors", RAW)
    put(folder / "model-2.safetensors", RAW)
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _two_copies_of_one_weight(folder: Path) -> None:
    copies = {f"{Q}.base_layer.weight": (4, 3), f"{Q}.original_module.weight": (4, 3)}
    put(folder / "model.safetensors", {**RAW, **copies})


def _index(weight_map: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def _whole_model(folder: Path) -> None:
    put(folder / "model.safetensors", {"model.norm.weight": (3,), "lm_head.weight": (4, 3)})


def _single_and_index(folder: Path) -> None:
    touch(folder, "model.safetensors", "model.safetensors.index.json")


def _unreadable_config(folder: Path) -> None:
    put(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 2, "r": 4}')


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "two adapters": (_two_adapters, ("several adapters", "'default'", "'other'")),
    "one key under two names": (_same_key_twice, ("twice", f"_orig_mod.{Q}.lora_A.weight", f"'{Q}.lora_A.weight'")),
    "one tensor in two shards": (_one_tensor_in_two_shards, ("model-1.safetensors", "model-2.safetensors")),
    "two copies of one weight": (_two_copies_of_one_weight, ("twice", "base_layer", "original_module")),
    "an index that leads outside": (_index({"a": "../model.safetensors"}), ("plain .safetensors file name",)),
    "an index to a pickle": (_index({"a": "model.bin"}), ("plain .safetensors file name",)),
    "an index of numbers": (_index({"a": 5}), ("weight_map",)),
    "an index of nothing": (_index({}), ("weight_map",)),
    "an index without its shards": (_index({"a": "x.safetensors"}), ("missing", "x.safetensors")),
    "a file and an index": (_single_and_index, ("both",)),
    "a whole model": (_whole_model, ("no adapter tensors", "whole model")),
    "a configuration that says r twice": (_unreadable_config, ("twice",)),
    "rows of new tokens": (lambda folder: put(folder / "new_embeddings.safetensors"), ("would be lost",)),
    "two weight files": (lambda folder: touch(folder, "a.safetensors", "b.safetensors"), ("'a.safetensors'", "name")),
    "training state alone": (lambda folder: touch(folder, "optimizer.pt", "rng_state_0.pth"), ("is missing",)),
    "adapters in sub-folders": (
        lambda folder: [put(folder / name / "adapter_model.safetensors") for name in "ab"] and None,
        ("sub-folders 'a', 'b'",),
    ),
    "flat parameters": (
        lambda folder: put(folder / "model.safetensors", {"model._fsdp_wrapped_module._flat_param": (9,)}),
        ("_flat_param", "merge-weights"),
    ),
    "Megatron's names": (
        lambda folder: put(
            folder / "model.safetensors",
            {"decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": (2, 3)},
        ),
        ("linear_in", "save_hf_adapter"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_whole_adapter_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    make(tmp_path)
    with pytest.raises(InputError) as refused:
        read(tmp_path)
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize(
    "role", ["lora_diag.default", "lora_E.default", "token_adapter.trainable_tokens_delta.default", "hada_w1_a.default"]
)
def test_tensors_that_mean_nothing_without_a_config_are_refused_by_name(role: str, tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors", {**RAW, f"{Q}.{role}": (2,)}, config=None)
    with pytest.raises(InputError, match=r"adapter_config\.json is missing") as refused:
        read(tmp_path, lora_alpha=4.0, tails=("hada_w1_a",))
    assert role.removesuffix(".default") in str(refused.value)


def test_factors_of_experts_without_a_config_are_refused(tmp_path: Path) -> None:
    shapes = {name.replace("q_proj", "experts.base_layer"): shape for name, shape in RAW.items()}
    put(tmp_path / "model.safetensors", shapes, config=None)
    with pytest.raises(InputError, match="to which parameters"):
        read(tmp_path, lora_alpha=4.0)


@pytest.mark.parametrize("path", ["nothing", "file/inside"])
def test_a_folder_that_is_not_there_is_said(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError):
        read(tmp_path / path)


def test_a_file_can_be_named_itself(tmp_path: Path) -> None:
    put(tmp_path / "a.safetensors")
    put(tmp_path / "b.safetensors", {**SAVED, f"{Q}.lora_magnitude_vector": (4,)})
    assert read(tmp_path / "b.safetensors").folder == tmp_path
    assert len(read(tmp_path / "b.safetensors").tensors) == 3
