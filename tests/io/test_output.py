"""The output folder: files, index, configuration, card, side files, permissions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from tests import oracles
from tests.conftest import tree
from tests.factories import edit_json, headers, load_folder, merge, write_adapter, write_base

INDEX = "model.safetensors.index.json"


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def data_nbytes(path: Path) -> int:
    return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


@pytest.fixture
def furnished(base: Path, tmp_path: Path) -> Path:
    """A base with everything beside its weights that a repository may hold."""
    folder = Path(shutil.copytree(base, tmp_path / "furnished"))
    files = {
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"{{ messages }}\r\n",
        "generation_config.json": b'{"do_sample":true}',
        "preprocessor_config.json": b"{ }",
        "modeling_custom.py": b"raise SystemExit('never run')\n",
        "LICENSE": b"\xff\xfe not UTF-8",
        "assets/deep/notes.txt": b"",
        "assets/logo.png": bytes(range(256)),
        "README.md": b"# the base's own card\n",
    }
    others = ["original/consolidated.00.pth", "original/params.json", "consolidated.safetensors", "pytorch_model.bin"]
    others += ["model-q4.gguf", "pytorch_model.bin.index.json", "model.fp16.safetensors", "onnx/model.onnx", "x.pt"]
    others += [".git/config", ".cache/huggingface/x", "tf_model.h5", "flax_model.msgpack", "assets/old.safetensors"]
    for name, data in {**files, **dict.fromkeys(others, b"weights")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_side_files_are_copied_byte_for_byte_and_no_other_weights(
    furnished: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    out = merge(furnished, adapter, tmp_path / "out")
    before, after = tree(furnished), tree(out)
    kept = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE"}
    kept |= {"generation_config.json", "preprocessor_config.json", "modeling_custom.py", "config.json"}
    kept |= {"assets/deep/notes.txt", "assets/logo.png"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after.keys() == kept | tree(merged).keys()


def test_tokenizer_and_template_of_the_adapter_are_laid_over_the_base(
    furnished: Path, adapter: Path, tmp_path: Path
) -> None:
    lora = Path(shutil.copytree(adapter, tmp_path / "lora"))
    laid = {"tokenizer.json": b"new", "chat_template.jinja": b"other", "added_tokens.json": b"{}", "vocab.json": b"{}"}
    kept = {"README.md": b"# adapter", "trainer_state.json": b"{}", "optimizer.pt": b"", "generation_config.json": b"x"}
    for name, data in {**laid, **kept}.items():
        (lora / name).write_bytes(data)
    out = merge(furnished, lora, tmp_path / "out")
    assert {name: (out / name).read_bytes() for name in laid} == laid
    assert (out / "special_tokens_map.json").read_bytes() == b"{}"
    assert (out / "generation_config.json").read_bytes() == b'{"do_sample":true}'
    assert not {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} & tree(out).keys()


def test_the_last_adapter_with_a_tokenizer_wins(base: Path, adapter: Path, other_adapter: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (adapter, other_adapter)]
    for number, folder in enumerate(folders):
        (folder / "tokenizer.json").write_text(str(number))
    out = merge(base, [(folder, 1.0) for folder in folders], tmp_path / "out")
    assert (out / "tokenizer.json").read_text() == "1"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_ordinary_permissions(
    umask: int, furnished: Path, adapter: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        out = merge(furnished, adapter, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o7777 for path in [out, *out.rglob("*")]}
    assert len(modes) > 10
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}
    assert {str(path): oct(mode) for path, mode in modes.items()} == {str(p): oct(m) for p, m in expected.items()}


@pytest.mark.parametrize("limit", [1, 20_000, 41_000, 10**9])
@pytest.mark.parametrize("which", ["base", "packed_base"])
def test_max_shard_size_bounds_every_file_and_the_index_lists_them(
    limit: int, which: str, adapter: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(which)
    out = merge(base, adapter, tmp_path / "out", max_shard_size=limit)
    oracles.assert_merged(out, oracles.dense(load_folder(base)), [(adapter, 1.0)])
    found = headers(out)
    assert all(data_nbytes(out / name) <= limit or len(names) == 1 for name, names in found.items())
    if limit == 10**9:
        assert list(found) == ["model.safetensors"]
        assert not (out / INDEX).exists()
    else:
        count = len(found)
        assert list(found) == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        assert read_index(out)["weight_map"] == {name: file for file, names in found.items() for name in names}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_index_tells_the_true_sizes(dtype: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = merge(base, adapter, tmp_path / "out", dtype=dtype)
    tensors, index = load_folder(out), read_index(out)
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "total_size": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    }
    assert index["metadata"]["total_size"] == sum(data_nbytes(path) for path in out.glob("*.safetensors"))
    assert index["weight_map"] == {name: file for file, names in headers(out).items() for name in names}


def test_every_file_says_that_it_is_torchs(merged: Path) -> None:
    for path in merged.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def small(folder: Path, config: str) -> tuple[Path, Path]:
    """A base of one linear whose config.json holds the text `config`, and an adapter for it."""
    base = write_base(folder / "base", {"m.weight": torch.ones(4, 6).bfloat16()})
    (base / "config.json").write_text(config)
    return base, write_adapter(folder / "lora", {"m": (torch.ones(2, 6), torch.ones(4, 2))})


def test_a_configuration_that_stays_true_keeps_its_bytes(tmp_path: Path) -> None:
    text = '{"b" : 1,\r\n   "a":\t[1.50, 1e3, "\\u00e9"], "torch_dtype":"bfloat16"}'
    base, adapter = small(tmp_path, text)
    assert (merge(base, adapter, tmp_path / "out") / "config.json").read_bytes() == text.encode()


def test_quantization_is_taken_out_of_the_configuration_at_every_level(tmp_path: Path) -> None:
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    inner = {"quantization_config": section, "dtype": "float16", "x": {"y": [1]}}
    config = {"dtype": "bfloat16", "quantization_config": section, "text_config": inner, "keep": None}
    base, adapter = small(tmp_path, json.dumps(config))
    found = json.loads((merge(base, adapter, tmp_path / "out") / "config.json").read_text())
    assert found == {"dtype": "bfloat16", "text_config": {"dtype": "float16", "x": {"y": [1]}}, "keep": None}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_names_the_dtype_that_was_asked_for(key: str, tmp_path: Path) -> None:
    config = {key: "bfloat16", "text_config": {key: "bfloat16"}, "vision_config": {"hidden_size": 4}}
    base, adapter = small(tmp_path, json.dumps(config))
    found = json.loads((merge(base, adapter, tmp_path / "out", dtype="float32") / "config.json").read_text())
    assert found == {key: "float32", "text_config": {key: "float32"}, "vision_config": {"hidden_size": 4}}


def test_a_packed_base_gets_the_recorded_dtype_in_its_configuration(packed_base: Path, merged_nf4: Path) -> None:
    before = json.loads((packed_base / "config.json").read_text())
    after = json.loads((merged_nf4 / "config.json").read_text())
    before.pop("quantization_config")
    assert after == {**before, "dtype": "bfloat16"}


def test_a_base_without_a_configuration_gives_an_output_without_one(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, "{}")
    (base / "config.json").unlink()
    assert not (merge(base, adapter, tmp_path / "out") / "config.json").exists()


def test_the_card_is_one_that_the_hub_reads(base: Path, adapter: Path, tmp_path: Path) -> None:
    lora = Path(shutil.copytree(adapter, tmp_path / "lora_[x]|y"))
    edit_json(lora / "adapter_config.json", base_model_name_or_path="meta-llama/Llama-3.1-8B")
    card = ModelCard.load(merge(base, lora, tmp_path / "out") / "README.md")
    assert card.data.base_model == "meta-llama/Llama-3.1-8B"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["distmerge", "lora", "merge"]
    assert card.data.base_model_relation == "finetune"
    assert card.content.startswith(f"---\n{card.data.to_yaml()}\n---\n")  # as the Hub's own library writes it
    assert "[meta" not in card.data.to_yaml()
    assert r"lora\_\[x\]\|y" in card.text


@pytest.mark.parametrize("name", ["/home/someone/base", "../x", "a/b\nlicense: mit", "org/name\n---\n# x", ""])
def test_a_local_base_name_does_not_reach_the_cards_metadata(
    name: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    lora = Path(shutil.copytree(adapter, tmp_path / "lora"))
    edit_json(lora / "adapter_config.json", base_model_name_or_path=name)
    card = ModelCard.load(merge(base, lora, tmp_path / "out") / "README.md")
    assert card.data.base_model is None
    assert card.data.license is None
