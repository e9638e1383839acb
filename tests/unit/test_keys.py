"""The parts of every name that PEFT and the wrappers around it give to a saved tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from distmerge.adapter.saved.keys import Key, parse
from tests.models import build

MODULE = "model.layers.0.self_attn.q_proj"
FULL = f"base_model.model.{MODULE}"
# saved tail: raw tail, where NAME stands for the adapter's name
ROLES = {
    "lora_A.weight": "lora_A.NAME.weight",
    "lora_B.weight": "lora_B.NAME.weight",
    "lora_B.bias": "lora_B.NAME.bias",
    "lora_embedding_A": "lora_embedding_A.NAME",
    "lora_embedding_B": "lora_embedding_B.NAME",
    "lora_magnitude_vector": "lora_magnitude_vector.NAME.weight",
    "lora_diag": "lora_diag.NAME",
    "lora_velora_embed": "lora_velora_embed.NAME",
    "lora_monteclora_sampler.std_prior": "lora_monteclora_sampler.NAME.std_prior",
    "token_adapter.trainable_tokens_delta": "token_adapter.trainable_tokens_delta.NAME",
    "lora_A": "lora_A.NAME",
    "lora_E": "lora_E.NAME",
    "hada_w1_a": "hada_w1_a.NAME",
    "oft_R.weight": "oft_R.NAME.weight",
    "osf_svd_params.S_low": "osf_svd_params.NAME.S_low",
}
TAILS = ("hada_w1_a", "oft_R.weight", "osf_svd_params.S_low", "vera_A", "peanut_encoders.*.weight")
JUNK = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
names = st.text(min_size=1).filter(lambda name: "." not in name and name not in {"weight", "bias", *JUNK})


def lora(**changes: Any) -> Any:
    import peft

    return peft.LoraConfig(r=2, target_modules=["q_proj"], **changes)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)


CONFIGS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "plain": lambda: (build("llama"), lora()),
    "everything": lambda: (
        build("llama"),
        lora(use_dora=True, bias="all", modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1]}),
    ),
    "embedding": lambda: (build("llama"), _embedding()),
    "experts": lambda: (build("mixtral"), _experts()),
    "attention": lambda: (_Attention(), _attention()),
    "kasa": lambda: (build("llama"), lora(kasa_config=_sub("KasaConfig"))),
    "velora": lambda: (build("llama"), lora(velora_config=_sub("VeloraConfig"))),
    "monteclora": lambda: (build("llama"), lora(monteclora_config=_sub("MontecloraConfig"))),
    "adalora": lambda: (build("llama"), _other("AdaLoraConfig", total_step=10)),
    "loha": lambda: (build("llama"), _other("LoHaConfig")),
    "oft": lambda: (build("llama"), _other("OFTConfig", oft_block_size=8)),
    "osf": lambda: (build("llama"), _other("OSFConfig")),
    "vera": lambda: (build("llama"), _other("VeraConfig", r=4)),
}


def _sub(name: str) -> Any:
    import peft.tuners.lora.config

    return getattr(peft.tuners.lora.config, name)()


def _other(name: str, **options: Any) -> Any:
    import peft

    return getattr(peft, name)(target_modules=["q_proj"], **options)


def _embedding() -> Any:
    import peft

    return peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])


def _experts() -> Any:
    import peft

    return peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])


def _attention() -> Any:
    import peft

    return peft.LoraConfig(r=2, target_modules=["mha"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_raw_state_has_every_key_that_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(*CONFIGS[name](), adapter_name="mine")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    tails = {key.rpartition("q_proj.")[2] for key in saved if "q_proj." in key and ".lora_" not in key}
    tails |= {key.removeprefix("base_model.") for key in saved if not key.startswith("base_model.model.")}
    raw = {parse(key, tails).canonical: value for key, value in model.state_dict().items()}
    assert saved.keys() <= raw.keys()
    assert all(torch.equal(raw[key], value) for key, value in saved.items())
    assert {parse(key, tails).adapter for key in model.state_dict()} <= {"", "mine"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_key_stands_for_itself(name: str, tmp_path: Path) -> None:
    import peft

    peft.get_peft_model(*CONFIGS[name]()).save_pretrained(tmp_path)
    for key in load_file(tmp_path / "adapter_model.safetensors"):
        assert parse(key, TAILS).canonical == key
        assert parse(key, TAILS).adapter == ""


@given(st.sampled_from(sorted(ROLES)), names)
def test_the_adapters_name_is_found_whatever_it_is(role: str, name: str) -> None:
    raw = parse(f"{FULL}.{ROLES[role].replace('NAME', name)}", TAILS)
    assert raw == Key(module=MODULE, role=role, adapter=name)
    assert parse(raw.canonical, TAILS) == Key(module=MODULE, role=role)


@given(st.sampled_from(sorted(ROLES)), st.lists(st.sampled_from(JUNK), min_size=1), st.data())
def test_components_of_wrappers_are_dropped_wherever_they_stand(
    role: str, junk: list[str], data: st.DataObject
) -> None:
    plain = f"{FULL}.{ROLES[role].replace('NAME', 'default')}"
    parts = plain.split(".")
    for component in junk:
        parts.insert(data.draw(st.integers(0, len(parts) - 1)), component)
    assert parse(".".join(parts), TAILS) == parse(plain, TAILS)


@pytest.mark.parametrize("outer", ["module.", "_forward_module.", "model.", "module.model.", "_forward_module.module."])
def test_what_stands_before_the_peft_model_is_dropped(outer: str) -> None:
    assert parse(f"{outer}{FULL}.lora_A.default.weight") == parse(f"{FULL}.lora_A.default.weight")


@pytest.mark.parametrize("outer", ["", "module.", "_forward_module.", "module.module."])
def test_a_model_without_the_prefix_keeps_its_own_first_component(outer: str) -> None:
    assert parse(f"{outer}{MODULE}.lora_A.default.weight").module == MODULE


@given(st.text(st.sampled_from("ab._")) | st.text())
def test_every_name_has_parts(name: str) -> None:
    assert parse(name, TAILS).canonical


pieces = st.sampled_from(
    ["base_model", "model", "x", "weight", "default", "base_layer", "modules_to_save", "original_module", *JUNK]
)


@given(st.lists(pieces, min_size=1), st.sampled_from(["", *ROLES, *ROLES.values()]))
def test_a_canonical_key_is_its_own_canonical_key(parts: list[str], tail: str) -> None:
    assume(parts.count("modules_to_save") < 2)  # PEFT does not nest them
    once = parse(".".join([*parts, *tail.split(".")] if tail else parts), TAILS).canonical
    assert parse(once, TAILS).canonical == once


@pytest.mark.parametrize(
    ("name", "module", "role", "param", "adapter"),
    [
        ("lm_head.modules_to_save.a.weight", "lm_head", "modules_to_save.weight", "weight", "a"),
        ("lm_head.original_module.weight", "lm_head", "original_module.weight", "weight", ""),
        ("proj.modules_to_save.a.fc.bias", "proj", "modules_to_save.fc.bias", "fc.bias", "a"),
        ("q.base_layer.weight", "q", "base_layer.weight", "weight", ""),
        ("q.base_layer.weight.absmax", "q", "base_layer.weight.absmax", "weight.absmax", ""),
        ("e.base_layer.base_layer.gate", "e", "base_layer.gate", "gate", ""),
        ("e.base_layer.lora_A.weight", "e.base_layer", "lora_A.weight", "", ""),
        ("mha.base_layer.out_proj.lora_B.a.weight", "mha.base_layer.out_proj", "lora_B.weight", "", "a"),
        ("mha.base_layer.out_proj.base_layer.bias", "mha.out_proj", "base_layer.bias", "bias", ""),
        ("t.token_adapter.base_layer.weight", "t", "token_adapter.base_layer.weight", "weight", ""),
        ("q.lora_magnitude_vector.weight", "q", "lora_magnitude_vector", "", ""),
        ("q.lora_magnitude_vector.a", "q", "lora_magnitude_vector", "", "a"),
        ("q.peanut_encoders.a.0.weight", "q", "peanut_encoders.0.weight", "", "a"),
        ("norm.weight", "norm", "full", "weight", ""),
        ("logit_scale", "", "full", "logit_scale", ""),
        ("q.hada_w1_a.lora_embedding_A", "q", "hada_w1_a", "", "lora_embedding_A"),
        ("lora_A.weight", "", "lora_A.weight", "", ""),
    ],
)
def test_a_name_has_these_parts(name: str, module: str, role: str, param: str, adapter: str) -> None:
    key = Key(module=module, role=role, param=param, adapter=adapter)
    assert parse(f"base_model.model.{name}", TAILS) == key


@pytest.mark.parametrize("name", ["base_model.vera_A", "base_model.vera_A.mine", "_orig_mod.base_model.vera_A.mine"])
def test_a_tensor_of_the_whole_model_is_shared(name: str) -> None:
    key = parse(name, TAILS)
    assert (key.shared, key.role, key.canonical) == (True, "vera_A", "base_model.vera_A")
    assert key.adapter == ("mine" if name.endswith("mine") else "")


def test_copies_and_full_tensors_tell_the_models_own_name() -> None:
    assert parse(f"{FULL}.base_layer.weight").tensor == f"{MODULE}.weight"
    assert parse("base_model.model.lm_head.modules_to_save.default.weight").tensor == "lm_head.weight"
    assert parse("base_model.model.model.norm.weight").tensor == "model.norm.weight"
    assert parse(f"{FULL}.lora_A.weight").tensor == ""
