"""Keys of an adapter that do not say, without doubt, which base tensor they belong to."""

from __future__ import annotations

import pytest
import torch

from tests.attacks.scene import Scene
from tests.factories import KEY

A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
FRONT = "base_model.model."


def test_the_scene_itself_merges(scene: Scene) -> None:
    assert scene.merge().num_adapter_tensors == 28


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FRONT, f"_orig_mod.{FRONT}"),
        (FRONT, f"{FRONT}_orig_mod."),
        (f"{FRONT}model.", f"{FRONT}model._orig_mod."),
        (".self_attn.", ".self_attn._orig_mod."),
        (f"{FRONT}model.", FRONT),
        (f"{FRONT}model.", f"{FRONT}model.model."),
        (f"{FRONT}model.", f"{FRONT}model.language_model."),
        (f"{FRONT}model.", f"{FRONT}language_model.model."),
        (FRONT, ""),
        (FRONT, "model."),
        (FRONT, "base_model."),
        (FRONT, f"module.{FRONT}"),
        (".layers.", ".Layers."),
        ("lora_A.weight", "lora_a.weight"),
        ("lora_A.weight", "lora_A"),
        ("lora_A.weight", "lora_A.weight "),
        ("lora_A.weight", "lora_A.default.x.weight"),
        ("layers.0.", "layers.00."),
        ("layers.0.", "layers.0 ."),
        ("layers.0.", "layers..0."),
        ("layers.0.", "layers.\uff19."),
    ],
)
def test_mangled_keys_are_refused_by_name(scene: Scene, old: str, new: str) -> None:
    mangled: list[str] = []

    def mangle(name: str) -> str:
        if old in name:
            mangled.append(name.replace(old, new, 1))
        return name.replace(old, new, 1)

    scene.rename_factors(mangle)
    message = scene.refuse("adapter_model.safetensors")
    assert any(name in message or name.rsplit(".lora_A", 1)[0] in message for name in mangled), message


def test_one_mangled_module_among_good_ones_is_refused(scene: Scene) -> None:
    scene.rename_factors(lambda name: name.replace(KEY, KEY.replace("layers.0", "layers.9")))
    scene.refuse("1 of 14 modules", "layers.9.self_attn.q_proj", "adapter_model.safetensors", hint="layers.")


@pytest.mark.parametrize(
    "name",
    [
        "extra.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "lora_A.weight",
    ],
)
def test_a_key_that_is_no_factor_of_a_linear_layer_is_refused_by_name(scene: Scene, name: str) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, name: torch.ones(4, 64)})
    scene.refuse(name, "adapter_model.safetensors")


@pytest.mark.parametrize(("lost", "left", "letter"), [(A, B, "A"), (B, A, "B")])
def test_a_factor_without_its_other_half_is_refused(scene: Scene, lost: str, left: str, letter: str) -> None:
    scene.spoil_factors(lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    scene.refuse(left, f"no lora_{letter}")


def test_the_same_factor_under_two_spellings_is_refused(scene: Scene) -> None:
    twin = A.replace("lora_A.weight", "lora_A.default.weight")
    scene.spoil_factors(lambda tensors: {**tensors, twin: tensors[A].clone()})
    scene.refuse("twice", A, twin)


def test_two_adapters_in_one_file_are_refused(scene: Scene) -> None:
    def name_by_layer(name: str) -> str:
        return name.replace(".weight", ".first.weight" if "layers.0" in name else ".second.weight")

    scene.rename_factors(name_by_layer)
    scene.refuse("several adapters", "first", "second")


def test_a_named_and_an_unnamed_adapter_in_one_file_are_refused(scene: Scene) -> None:
    scene.rename_factors(lambda name: name.replace(".weight", ".default.weight") if "layers.0" in name else name)
    scene.refuse("several adapters", "default")


def test_a_lora_on_tied_embeddings_is_refused(scene: Scene) -> None:
    from tests.factories import edit_json

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]

    scene.single(untie)
    edit_json(scene.base / "config.json", tie_word_embeddings=True)
    head = "base_model.model.lm_head"
    factors = {f"{head}.lora_A.weight": torch.ones(4, 64), f"{head}.lora_B.weight": torch.ones(96, 4)}
    scene.spoil_factors(lambda tensors: {**tensors, **factors})
    scene.refuse("tied", "lm_head")


def test_a_lora_on_a_stored_head_that_the_configuration_ties_is_refused(scene: Scene) -> None:
    from tests.factories import edit_json

    edit_json(scene.base / "config.json", tie_word_embeddings=True)
    head = "base_model.model.lm_head"
    factors = {f"{head}.lora_A.weight": torch.ones(4, 64), f"{head}.lora_B.weight": torch.ones(96, 4)}
    scene.spoil_factors(lambda tensors: {**tensors, **factors})
    scene.refuse("tied", "lm_head", "tie_word_embeddings")


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\x00b", "a\nb", "a\u202eb", "x" * 600, ""])
def test_a_key_with_control_characters_or_without_measure_is_refused_and_shown_safely(scene: Scene, name: str) -> None:
    from tests.attacks.scene import crafted, entry, header_of

    key = f"{FRONT}{name}.lora_A.weight" if name else ""
    data = crafted(header_of({key: entry(shape=[2, 2])}), bytes(16))
    (scene.adapter / "adapter_model.safetensors").write_bytes(data)
    scene.refuse("adapter_model.safetensors", "name")
