"""Keys of an adapter: understood as they were meant, or refused by name, and never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distmerge.errors import InputError
from tests.attacks.scene import Scene, crafted, entry, failure, header_of
from tests.conftest import digests
from tests.factories import KEY, edit_json, load_folder, merge

A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
FRONT = "base_model.model."
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def clean(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the weights that the adapter under its own names gives."""
    return digests(merge(base, adapter, tmp_path_factory.mktemp("clean") / "out"))


def test_the_scene_itself_merges(scene: Scene) -> None:
    assert scene.merge().num_adapter_tensors == 28


UNDERSTOOD = [
    (FRONT, f"_orig_mod.{FRONT}"),
    (FRONT, f"{FRONT}_orig_mod."),
    (FRONT, f"module.{FRONT}"),
    (FRONT, f"model.{FRONT}"),
    (FRONT, f"_forward_module.{FRONT}"),
    (FRONT, f"_fsdp_wrapped_module._checkpoint_wrapped_module.{FRONT}"),
    (f"{FRONT}model.", f"{FRONT}model._orig_mod."),
    (".self_attn.", ".self_attn._orig_mod."),
    ("_proj.lora", "_proj._checkpoint_wrapped_module.lora"),
    (".lora_A.weight", ".lora_A._orig_mod.weight"),
    (".weight", ".default.weight"),
    (FRONT, ""),
    (FRONT, "module.module."),
    (FRONT, "model."),
    (FRONT, "base_model."),
    (f"{FRONT}model.", FRONT),
    (f"{FRONT}model.", f"{FRONT}model.model."),
    (f"{FRONT}model.", f"{FRONT}model.language_model."),
    (f"{FRONT}model.", f"{FRONT}language_model.model."),
]
MANGLED = [
    (FRONT, f"{FRONT}{FRONT}"),
    (FRONT, FRONT.upper()),
    (FRONT, FRONT.removesuffix(".")),
    (f"{FRONT}model.", "lora_unet_"),
    ("model.layers.", "transformer.h."),
    (".layers.", ".Layers."),
    ("layers.0.", "layers.00."),
    ("layers.0.", "layers.0 ."),
    ("layers.0.", "layers..0."),
    ("layers.0.", "layers.\uff19."),
    ("layers.0.", "layers.-1."),
    ("self_attn", "SELF_ATTN"),
    ("q_proj", "qproj"),
    ("q_proj", "k_proj.."),
    (".lora_", ".base_layer.lora_"),
    ("lora_A.weight", "lora_a.weight"),
    ("lora_A.weight", "lora_A"),
    ("lora_A.weight", "lora_A.default.x.weight"),
    ("lora_A.weight", "lora_A.bias"),
    ("lora_A.weight", "lora_A.weight "),
    ("lora_A.weight", "lora_A.weight.weight"),
    ("lora_A.weight", "lora_embedding_A"),
    ("lora_A", "lora_A.lora_A"),
    ("lora_A", "lora_C"),
    (".weight", ".default"),
]


@pytest.mark.parametrize(("old", "new"), UNDERSTOOD)
def test_a_key_that_wrappers_renamed_gives_the_bytes_of_the_clean_one(
    scene: Scene, clean: dict[str, str], old: str, new: str
) -> None:
    scene.rename_factors(lambda name: name.replace(old, new, 1))
    scene.merge()
    assert digests(scene.output) == clean


@pytest.mark.parametrize(("old", "new"), MANGLED)
def test_mangled_keys_are_refused_by_name(scene: Scene, old: str, new: str) -> None:
    names: list[str] = []

    def mangle(name: str) -> str:
        names.append(name.replace(old, new, 1))
        return names[-1]

    scene.rename_factors(mangle)
    message = scene.refuse(ADAPTER)
    modules = [name.rpartition(".lora_")[0].removeprefix(FRONT) for name in names]
    assert "several adapters" in message or any(name in message for name in (*names, *modules)), message


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("old", [FRONT, ".self_attn.", ".lora_A.", ".weight", "model.", "layers."])
@pytest.mark.parametrize("new", ["x.", "_orig_mod.", "base_model.model.", "lora_A.", "base_layer.", "default.", "."])
def test_no_name_put_into_some_keys_changes_what_is_merged(
    scene: Scene, clean: dict[str, str], layer: int, old: str, new: str
) -> None:
    scene.rename_factors(
        lambda name: name.replace(old, old.removesuffix(".") + f".{new}", 1) if f".{layer}." in name else name
    )
    error = failure(scene.merge)
    assert isinstance(error, InputError) or (error is None and digests(scene.output) == clean), error


def test_one_mangled_module_among_good_ones_is_refused(scene: Scene) -> None:
    scene.rename_factors(lambda name: name.replace(KEY, KEY.replace("layers.0", "layers.9")))
    scene.refuse("1 of 14 modules", "layers.9.self_attn.q_proj", ADAPTER, hint="layers.")


@pytest.mark.parametrize(
    "name",
    [
        "extra.weight",
        "lora_A.weight",
        "base_model.vera_A",
        "base_model.extra",
        f"{FRONT}extra",
        f"{FRONT}model.layers.0.self_attn.q_proj.extra",
        f"{FRONT}model.layers.0.self_attn.q_proj.bias",
        f"{FRONT}model.layers.0.self_attn.q_proj.base_layer.bias",
        f"{FRONT}model.layers.0.self_attn.q_proj.weight",
        f"{FRONT}model.layers.0.self_attn.q_proj.modules_to_save.default.weight",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_C.weight",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_A.weight.extra",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_A.bias",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_B.bias",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_E",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_diag",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        f"{FRONT}model.layers.0.self_attn.q_proj.lora_embedding_A",
        f"{FRONT}model.layers.0.self_attn.q_proj.hada_w1_a",
        f"{FRONT}model.layers.0.self_attn.q_proj.trainable_tokens_delta",
        f"{FRONT}model.layers.0.input_layernorm.ln_tuning_layers.weight",
        f"{FRONT}model.embed_tokens.lora_embedding_A",
        f"{FRONT}model.embed_tokens.lora_embedding_B",
        f"{FRONT}model.embed_tokens.token_adapter.trainable_tokens_delta",
        f"{FRONT}model.layers.0.self_attn.rotary_emb.inv_freq",
        f"{FRONT}lm_head.modules_to_save.weight",
        f"{FRONT}lm_head.modules_to_save.default.weight",
        f"{FRONT}lm_head.original_module.weight",
    ],
)
@pytest.mark.parametrize("shape", [(5, 63), (), (7,)], ids=str)
def test_a_tensor_that_belongs_to_nothing_is_refused_by_name(scene: Scene, name: str, shape: tuple[int, ...]) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, name: torch.ones(shape)})
    message = scene.refuse(scene.adapter if "token_adapter" in name else ADAPTER)
    module = name.removeprefix(FRONT).rpartition(".")[0].removesuffix(".token_adapter")
    named = any(f"'{part}'" in message for part in (name, module, name.removeprefix(FRONT)) if part)
    assert named or "several adapters" in message, message


@pytest.mark.parametrize(("lost", "left", "letter"), [(A, B, "A"), (B, A, "B")])
def test_a_factor_without_its_other_half_is_refused(scene: Scene, lost: str, left: str, letter: str) -> None:
    scene.spoil_factors(lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    scene.refuse(left, f"no lora_{letter}")


@pytest.mark.parametrize(
    "twin", [f"_orig_mod.{A}", f"model.{A}", A.removeprefix(FRONT), A.replace(".lora", "._orig_mod.lora")]
)
def test_the_same_factor_under_two_spellings_is_refused(scene: Scene, twin: str) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, twin: tensors[A].clone()})
    scene.refuse("twice", A, twin)


def test_the_same_factor_with_and_without_an_adapters_name_is_refused(scene: Scene) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, A.replace("lora_A", "lora_A.default"): tensors[A].clone()})
    scene.refuse("several adapters", "default")


def test_two_adapters_in_one_file_are_refused(scene: Scene) -> None:
    def name_by_layer(name: str) -> str:
        return name.replace(".weight", ".first.weight" if "layers.0" in name else ".second.weight")

    scene.rename_factors(name_by_layer)
    scene.refuse("several adapters", "first", "second")


def test_a_named_and_an_unnamed_adapter_in_one_file_are_refused(scene: Scene) -> None:
    scene.rename_factors(lambda name: name.replace(".weight", ".default.weight") if "layers.0" in name else name)
    scene.refuse("several adapters", "default")


@pytest.mark.parametrize("stored", [True, False], ids=["stored head", "no head"])
@pytest.mark.parametrize("side", ["lm_head", "model.embed_tokens"])
def test_a_lora_on_one_side_of_a_tie_changes_that_side_alone_and_unties(scene: Scene, side: str, stored: bool) -> None:
    def tie(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        if stored:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    scene.single(tie)
    edit_json(scene.base / "config.json", tie_word_embeddings=True)
    a, b = torch.randn(4, 64), torch.randn(96, 4)
    factors = {"lora_A.weight": a, "lora_B.weight": b}
    if side != "lm_head":
        factors = {"lora_embedding_A": b.T, "lora_embedding_B": a.T}
    scene.spoil_factors(lambda tensors: {**tensors, **{f"{FRONT}{side}.{tail}": t for tail, t in factors.items()}})
    scene.merge()
    merged, table = load_folder(scene.output), load_folder(scene.base)["model.embed_tokens.weight"]
    changed = (table.float() + 6 / 4 * (b @ a)).bfloat16()
    expected = {"lm_head": table, "model.embed_tokens": table, side: changed}
    for module, tensor in expected.items():
        assert (merged[f"{module}.weight"].float() - tensor.float()).abs().max() < 0.05
        assert torch.equal(merged[f"{module}.weight"], tensor) or module == side
    assert '"tie_word_embeddings": false' in (scene.output / "config.json").read_text()


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\x00b", "a\nb", "a\u202eb", "x" * 600, ""])
def test_a_key_with_control_characters_or_without_measure_is_refused_and_shown_safely(scene: Scene, name: str) -> None:
    key = f"{FRONT}{name}.lora_A.weight" if name else ""
    data = crafted(header_of({key: entry(shape=[2, 2])}), bytes(16))
    (scene.adapter / ADAPTER).write_bytes(data)
    scene.refuse(ADAPTER, "name")


@pytest.mark.parametrize("parts", [100, 250])
def test_a_key_of_a_great_many_components_is_refused_in_no_time(scene: Scene, parts: int) -> None:
    scene.rename_factors(lambda name: name.replace(FRONT, FRONT + "a." * parts, 1)[-512:] if name == A else name)
    scene.refuse(ADAPTER)
