"""Configurations are data from strangers: what transformers cannot build, or should not, is a reason and no harm."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules import module as registry

from distmerge.adapter.naming.conversion import ModelNames, read_names
from tests import models
from tests.conftest import environment

DISK = {"model.embed_tokens.weight": (56, 32)}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = models.save("llama", tmp_path_factory.mktemp("llama"))
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


def read(folder: Path, config: dict[str, Any]) -> ModelNames | str:
    (folder / "config.json").write_text(json.dumps(config))
    return read_names(folder, DISK)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
        ({"architectures": [["LlamaForCausalLM"]]}, "names no architecture"),
        ({"architectures": ["LlamaForNothing"]}, "there is no such class"),
        ({"architectures": ["pipeline"]}, "there is no such class"),
        ({"architectures": ["Trainer"]}, "there is no such class"),
        ({"architectures": ["models.llama.LlamaForCausalLM"]}, "there is no such class"),
        ({"architectures": ["PreTrainedModel"]}, ""),
        ({"architectures": ["LlamaPreTrainedModel\u001b[2J"]}, "there is no such class"),
        ({"hidden_size": "wide"}, ""),
        ({"hidden_size": None}, ""),
        ({"hidden_size": -5}, ""),
        ({"vocab_size": 10**30}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_act": "os.system"}, ""),
        ({"rope_parameters": {"rope_type": ["x"]}}, ""),
        ({"rope_parameters": 7}, ""),
        ({"id2label": "x"}, ""),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_hidden_layers": 900_000}, "far more modules than there are tensors"),
        ({"num_hidden_layers": 1e300}, ""),
        ({"num_labels": 10**10}, "num_labels 10000000000"),
        ({"text_config": {"depths": [10**9]}}, "depths 1000000000"),
        ({"architecture": "hf-hub:someone/else"}, "not local"),
    ],
    ids=lambda value: next(iter(value.items())).__repr__()[:50] if isinstance(value, dict) else "",
)
def test_a_configuration_that_makes_no_model_is_a_reason(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    before = time.process_time()
    answer = read(tmp_path, config | changes)
    assert isinstance(answer, str)
    assert answer.isprintable()
    assert reason in answer
    assert time.process_time() - before < 30
    assert not registry._global_parameter_registration_hooks
    assert not registry._global_module_registration_hooks
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_file_that_is_no_configuration_of_this_model_raises_nothing(tmp_path: Path, text: str) -> None:
    assert isinstance(read_names(tmp_path, DISK), str)
    (tmp_path / "config.json").write_text(text)
    read_names(tmp_path, DISK)


def test_what_decides_about_no_name_is_left_out(tmp_path: Path, config: dict[str, Any]) -> None:
    plain = read(tmp_path, config)
    odd = {
        "quantization_config": "unheard_of",
        "compression_config": {"format": "x"},
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "experts_implementation": "someone/kernel",
        "torch_dtype": "float3",
        "dtype": "float3",
        "model_type": "of_a_relative",
    }
    assert isinstance(plain, ModelNames)
    assert read(tmp_path, config | odd) == plain


def test_what_decides_about_no_name_is_left_out_of_inner_configurations_too(tmp_path: Path) -> None:
    config = json.loads((models.save("llava", tmp_path) / "config.json").read_text())
    plain = read(tmp_path, config)
    odd = {"quantization_config": "unheard_of", "attn_implementation": "someone/kernel"}
    inner = {key: config[key] | odd for key in ("text_config", "vision_config")}
    assert isinstance(plain, ModelNames)
    assert read(tmp_path, config | inner) == plain


def test_a_class_that_other_configurations_share_keeps_its_own_names(tmp_path: Path) -> None:
    folder = models.save("deepseek_v3", tmp_path)
    tensors = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    plain = read_names(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    shared = read_names(folder, tensors)
    assert isinstance(plain, ModelNames)
    assert isinstance(shared, ModelNames)
    assert all(shared.slots(name) == plain.slots(name) != () for name in plain.shapes)


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them(tmp_path: Path) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {
        "num_heads": 4,
        "head_dim": 16,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 56,
        "state_size": 8,
    }
    Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=2)).save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert isinstance(read_names(tmp_path, DISK), ModelNames)


def test_no_code_of_a_folder_runs(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}}
    assert isinstance(read(tmp_path, config | auto_map | {"architectures": ["Model"]}), str)
    assert isinstance(read(tmp_path, config | auto_map), ModelNames)
    assert isinstance(read(tmp_path, config | auto_map | {"model_type": "strange"}), ModelNames)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_said(tmp_path: Path) -> None:
    models.save("qwen2_vl", tmp_path)
    code = """
import sys
from pathlib import Path
from distmerge.adapter.naming.conversion import read_names
assert not isinstance(read_names(Path(sys.argv[1]), {}), str)
from transformers.utils import logging
assert logging.get_verbosity() == logging.WARNING
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment(), check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_without_transformers_the_reason_is_said_and_the_tables_of_names_still_work(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["transformers"] = None
from pathlib import Path
from distmerge.adapter.naming.conversion import read_names
from distmerge.adapter.naming.tables import rename
print(read_names(Path(sys.argv[1]), {}))
for path, disk in (
    ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
    ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
    ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
):
    assert rename([path], {disk}.__contains__, ()).paths == {path: disk}
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment(), check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("transformers is not installed\n", "", 0)
