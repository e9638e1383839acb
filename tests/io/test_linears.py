"""Which weights bitsandbytes packs: those of real 4-bit loads, for classes of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distmerge.adapter.naming.linears import packed_linears
from distmerge.checkpoint.base import read_base
from distmerge.errors import InputError
from tests import models
from tests.factories import edit_json, load_folder, write_base

SKIPS: list[tuple[str, ...]] = [(), ("k_proj", "key", "c_fc"), (r"model\.layers\.1.*", "lm_head")]


def save_bert(folder: Path) -> Path:
    """A classifier, whose last module is its head."""
    import transformers as t

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
    torch.manual_seed(0)
    t.BertForSequenceClassification(t.BertConfig(vocab_size=56, **sizes)).save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """An encoder and a decoder that share their embedding; `wo` stays in float32."""
    import transformers as t

    torch.manual_seed(0)
    config = t.T5Config(vocab_size=56, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4)
    t.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_tied_twice(folder: Path) -> Path:
    """A tied head that lies in the checkpoint all the same."""
    tensors = load_folder(models.save("llama_tied", folder))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MAKERS: dict[str, Any] = {"bert": save_bert, "t5": save_t5, "tied twice": save_tied_twice}
NAMES = ["llama", "llama_tied", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "llava", "qwen2_vl", *MAKERS]


def packed_by_transformers(folder: Path, output: Path, skip: tuple[str, ...]) -> set[str]:
    """The tensors with a quantization state when the model in `folder` is loaded in 4 bits and saved in `output`."""
    import transformers as t

    kind = getattr(t, json.loads((folder / "config.json").read_text())["architectures"][0])
    config = t.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(skip) or None)
    model = kind.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"})
    model.save_pretrained(output)
    return {name.split(".quant_state.")[0] for name in load_folder(output) if ".quant_state." in name}


@pytest.mark.parametrize("name", NAMES)
def test_the_packed_linears_are_those_of_a_real_load_in_4_bits(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path / "base") if name in MAKERS else models.save(name, tmp_path / "base")
    for number, skip in enumerate(SKIPS):
        expected = packed_by_transformers(folder, tmp_path / f"packed-{number}", skip)
        found = packed_linears(read_base(folder), skip)
        assert expected
        assert found.keys() == expected
        assert set(found.values()) == {name == "gpt2"}
        assert packed_linears(read_base(tmp_path / f"packed-{number}")) == found


def test_a_base_whose_class_is_not_known_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)})
    with pytest.raises(InputError, match=r"only its class tells: config\.json names no architecture"):
        packed_linears(read_base(base))


def test_linear_weights_that_are_one_tensor_on_disk_are_refused_by_name(tmp_path: Path) -> None:
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = t.HrmTextForCausalLM(t.HrmTextConfig(vocab_size=56, num_key_value_heads=4, head_dim=8, **sizes))
    model.save_pretrained(tmp_path / "fused")
    assert any("gate_up_proj" in name for name in load_folder(tmp_path / "fused"))
    for skip in ((), ("gate_proj",)):
        with pytest.raises(
            InputError, match=r"not one tensor each, and are packed as one: .*mlp\.(gate|up)_proj\.weight"
        ):
            packed_linears(read_base(tmp_path / "fused"), skip)
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    assert any("up_proj" in name for name in packed_linears(read_base(tmp_path / "own")))


def test_a_class_that_another_architecture_names_decides(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "base")
    edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    assert "lm_head.weight" not in packed_linears(read_base(folder), ("score",))
