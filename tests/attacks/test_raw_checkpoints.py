"""Training checkpoints that hold base and adapter in one: nothing trained is lost, nothing strange is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distmerge.inspection import inspect
from tests.attacks.scene import CONFIG, FRONT, HEAD, NORM, TABLE, WEIGHTS, Q, Scene, failure
from tests.conftest import digests
from tests.factories import edit_json, load_folder

KEY = f"{FRONT}{Q}"
A, B = f"{KEY}.lora_A.default.weight", f"{KEY}.lora_B.default.weight"
COPIES = [f"{KEY}.base_layer.weight", f"{KEY}.base_layer.bias", f"{FRONT}{TABLE}", f"{FRONT}{NORM}", f"{FRONT}{HEAD}"]


def state(scene: Scene, prefix: str = "") -> dict[str, Tensor]:
    """The state of the PEFT model: the base under its wrappers, and the factors under the adapter's name."""
    factors = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(scene.adapter / WEIGHTS).items()
    }
    base = {
        f"{FRONT}{name}".replace(KEY, f"{KEY}.base_layer"): tensor for name, tensor in load_folder(scene.base).items()
    }
    return {prefix + name: tensor for name, tensor in {**base, **factors}.items()}


@pytest.fixture
def raw(small: Scene) -> Scene:
    """The small scene with the adapter as training saved it; `clean` beside it is what it must give."""
    small.merge(output=small.folder / "clean")
    small.write(state(small), **json.loads((small.adapter / CONFIG).read_text()))
    return small


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "_forward_module.", "module._orig_mod."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_raw_checkpoint_gives_the_bytes_of_its_adapter(raw: Scene, prefix: str, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: t if "lora_" in name else t.to(dtype) for name, t in tensors.items()}

    raw.spoil_factors(spoil)
    raw.merge()
    assert digests(raw.output) == digests(raw.folder / "clean")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.safetensors", "mine.safetensors"])
def test_a_raw_checkpoint_is_read_under_any_name(raw: Scene, name: str) -> None:
    (raw.adapter / WEIGHTS).rename(raw.adapter / name)
    raw.merge()
    assert digests(raw.output) == digests(raw.folder / "clean")


@pytest.mark.parametrize("key", COPIES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_copy_that_is_not_the_bases_is_refused_by_name(raw: Scene, key: str, place: int) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[place] += 1

    raw.spoil_factors(spoil)
    raw.refuse(key, WEIGHTS)


@pytest.mark.parametrize("key", COPIES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (20, 12, 1), (12, 8)], ids=str)
def test_a_copy_of_another_shape_is_refused_by_name(raw: Scene, key: str, shape: tuple[int, ...]) -> None:
    raw.spoil_factors(lambda tensors: {**tensors, key: torch.ones(shape)})
    raw.refuse(key, WEIGHTS)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int16, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("key", COPIES)
def test_a_copy_that_is_no_float_is_refused_by_name(raw: Scene, key: str, dtype: torch.dtype) -> None:
    raw.spoil_factors(lambda tensors: {**tensors, key: tensors[key].to(dtype)})
    raw.refuse(key, WEIGHTS)


@pytest.mark.parametrize("key", [COPIES[0], COPIES[-1]])
@pytest.mark.parametrize("kind", ["zeros", "noise", "short", "long", "column of floats", "flat"])
def test_packed_bytes_that_are_not_the_bases_are_refused_by_name(raw: Scene, key: str, kind: str) -> None:
    numel = load_file(raw.adapter / WEIGHTS)[key].numel() // 2
    packed = {
        "zeros": torch.zeros(numel, 1, dtype=torch.uint8),
        "noise": torch.randint(0, 256, (numel, 1), dtype=torch.uint8),
        "short": torch.zeros(numel - 1, 1, dtype=torch.uint8),
        "long": torch.zeros(numel + 1, 1, dtype=torch.uint8),
        "column of floats": torch.rand(numel // 2, 1),
        "flat": torch.zeros(numel, dtype=torch.uint8),
    }[kind]
    raw.spoil_factors(lambda tensors: {**tensors, key: packed})
    raw.refuse(key, WEIGHTS)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "v_head.summary.weight",
            f"{FRONT}v_head.weight",
            f"{FRONT}model.extra.weight",
            f"{FRONT}model.layers.7.x.weight",
        ),
        *(f"{KEY}.base_layer.extra", f"{KEY}.extra", f"{KEY}.lora_C.default.weight", f"{KEY}.lora_A.default.bias"),
        *(f"{FRONT}{NORM}.absmax", f"{KEY}.base_layer.weight.quant_map", "extra.absmax", f"{FRONT}extra.SCB"),
        *("extra", f"{FRONT}{Q}.lora_diag.default", f"{FRONT}{Q}.hada_w1_a.default"),
        *(f"{FRONT}lm_head.original_module.weight.x", f"{FRONT}model.norm.base_layer.base_layer.weight"),
    ],
)
def test_a_tensor_that_is_neither_of_the_base_nor_of_the_adapter_is_refused_by_name(raw: Scene, name: str) -> None:
    raw.spoil_factors(lambda tensors: {**tensors, name: torch.ones(8)})
    message = raw.refuse(WEIGHTS)
    assert any(f"'{part}'" in message for part in (name, name.removeprefix(FRONT), Q)) or "several" in message, message


def test_what_lies_beside_packed_bytes_is_no_parameter(raw: Scene) -> None:
    from distmerge.numerics.nf4 import NF4
    from distmerge.numerics.packing4 import pack

    weight = load_folder(raw.base)[HEAD]
    packed = pack(weight.view(-1), NF4, blocksize=64)[0][:, None]
    companions = {f"{FRONT}{HEAD}.{tail}": torch.ones(4) for tail in ("absmax", "quant_map")}
    raw.spoil_factors(lambda tensors: {**tensors, **companions, f"{FRONT}{HEAD}": packed})
    raw.merge()
    assert digests(raw.output) == digests(raw.folder / "clean")


@pytest.mark.parametrize("key", [A, B])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (24,), (2, 12, 3)], ids=str)
@pytest.mark.parametrize("config", [True, False], ids=["config", "no config"])
def test_a_factor_of_another_shape_is_refused_by_name(
    raw: Scene, key: str, shape: tuple[int, ...], config: bool
) -> None:
    raw.spoil_factors(lambda tensors: {**tensors, key: torch.ones(shape)})
    if not config:
        (raw.adapter / CONFIG).unlink()
    raw.refuse(Q, WEIGHTS, lora_alpha=None if config else 4.0)
    assert failure(lambda: inspect(raw.adapter)) is None


@pytest.mark.parametrize("lost", [A, B])
def test_half_a_pair_is_refused_by_name(raw: Scene, lost: str) -> None:
    raw.spoil_factors(lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    raw.refuse(Q, "lora_", WEIGHTS)


def test_alpha_is_asked_for_where_nothing_tells_it(raw: Scene) -> None:
    (raw.adapter / CONFIG).unlink()
    raw.refuse("alpha", raw.adapter, hint="--lora-alpha")
    raw.merge(lora_alpha=4.0)
    assert digests(raw.output) == digests(raw.folder / "clean")


def test_a_configuration_far_away_is_not_that_of_the_checkpoint(raw: Scene) -> None:
    deep = raw.folder / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (raw.adapter / CONFIG).rename(raw.folder / "a" / CONFIG)
    (raw.adapter / WEIGHTS).rename(deep / WEIGHTS)
    raw.refuse("alpha", adapters=(deep,), hint="--lora-alpha")


def test_two_adapters_in_a_checkpoint_are_refused(raw: Scene) -> None:
    raw.spoil_factors(
        lambda all_: {**all_, **{n.replace("default", "other"): t + 1 for n, t in all_.items() if "lora_" in n}}
    )
    raw.refuse("several adapters", "default", "other")


# -- trained copies


@pytest.mark.parametrize(
    ("fields", "trained", "frozen"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight", "lm_head.original_module.weight"),
        ({}, "lm_head.modules_to_save.default.weight", "lm_head.original_module.weight"),
        ({"modules_to_save": ["lm_head"]}, HEAD, ""),
        ({"bias": "all"}, f"{Q}.base_layer.bias", ""),
        ({"bias": "lora_only"}, f"{Q}.base_layer.bias", ""),
    ],
    ids=str,
)
def test_what_was_trained_as_a_whole_takes_the_place_of_the_bases(
    raw: Scene, fields: dict[str, Any], trained: str, frozen: str
) -> None:
    name = f"{Q}.bias" if "bias" in trained else HEAD
    values = torch.full_like(load_folder(raw.base)[name], 7.0)

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        original = tensors.pop(f"{FRONT}{HEAD}" if "bias" not in trained else f"{KEY}.base_layer.bias")
        return {**tensors, **({f"{FRONT}{frozen}": original} if frozen else {}), f"{FRONT}{trained}": values}

    raw.spoil_config(**fields)
    raw.spoil_factors(spoil)
    raw.merge()
    assert torch.equal(load_folder(raw.output)[name], values)


@pytest.mark.parametrize("fields", [{}, {"bias": "none"}, {"modules_to_save": ["norm"]}], ids=str)
@pytest.mark.parametrize("key", [f"{FRONT}{HEAD}", f"{KEY}.base_layer.bias"])
def test_what_was_trained_and_no_configuration_names_is_refused(raw: Scene, fields: dict[str, Any], key: str) -> None:
    raw.spoil_config(**fields)
    raw.spoil_factors(lambda tensors: {**tensors, key: torch.full_like(tensors[key], 7.0)})
    raw.refuse(key, WEIGHTS)


def test_an_original_that_is_not_the_bases_is_refused(raw: Scene) -> None:
    raw.spoil_config(modules_to_save=["lm_head"])
    head, frozen = f"{FRONT}{HEAD}", f"{FRONT}lm_head.original_module.weight"

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensor = tensors.pop(head)
        return {**tensors, f"{FRONT}lm_head.modules_to_save.default.weight": tensor + 1, frozen: tensor + 2}

    raw.spoil_factors(spoil)
    raw.refuse(frozen, WEIGHTS)


def test_a_trained_copy_under_two_names_is_refused(raw: Scene) -> None:
    raw.spoil_config(modules_to_save=["lm_head"])
    twin = f"{FRONT}lm_head.modules_to_save.default.weight"
    raw.spoil_factors(lambda tensors: {**tensors, twin: tensors[f"{FRONT}{HEAD}"] + 1})
    raw.refuse("twice", f"{FRONT}{HEAD}", twin)


@pytest.mark.parametrize("stored", [True, False], ids=["stored head", "no head"])
def test_a_tied_head_is_held_against_the_embedding(raw: Scene, stored: bool) -> None:
    edit_json(raw.base / "config.json", tie_word_embeddings=True)

    def tie(tensors: dict[str, Tensor]) -> None:
        del tensors[HEAD]
        if stored:
            tensors[HEAD] = tensors[TABLE].clone()

    raw.single(tie)
    raw.spoil_factors(lambda tensors: {**tensors, f"{FRONT}{HEAD}": tensors[f"{FRONT}{TABLE}"].clone()})
    raw.merge(output=raw.folder / "tied")
    raw.spoil_factors(lambda tensors: {**tensors, f"{FRONT}{HEAD}": tensors[f"{FRONT}{TABLE}"] + 1})
    raw.refuse(f"{FRONT}{HEAD}", WEIGHTS)


def test_copies_that_training_rounded_are_still_the_bases(raw: Scene) -> None:
    raw.spoil_factors(
        lambda tensors: {name: t if "lora_" in name else t.bfloat16().float() for name, t in tensors.items()}
    )
    raw.merge()
    assert digests(raw.output) == digests(raw.folder / "clean")


@pytest.mark.parametrize(
    "text", ["", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', "[]", "nul"]
)
def test_an_index_that_is_none_is_refused(raw: Scene, text: str) -> None:
    (raw.adapter / WEIGHTS).unlink()
    (raw.adapter / "model.safetensors.index.json").write_text(text)
    raw.refuse("model.safetensors.index.json")


def test_a_tensor_in_two_shards_is_refused(raw: Scene, tmp_path: Path) -> None:
    data = (raw.adapter / WEIGHTS).read_bytes()
    (raw.adapter / WEIGHTS).unlink()
    for name in ("one.safetensors", "two.safetensors"):
        (raw.adapter / name).write_bytes(data)
    weight_map = {A: "one.safetensors", B: "two.safetensors"}
    (raw.adapter / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    raw.refuse("two files", "one.safetensors", "two.safetensors")
