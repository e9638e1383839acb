"""Factors whose values, shapes or files cannot be what training saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import distmerge
from tests.attacks.scene import Scene
from tests.conftest import digests
from tests.factories import KEY, load_folder

A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
WEIGHTS = "adapter_model.safetensors"


def test_factors_of_unequal_r_are_refused(scene: Scene) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, B: torch.ones(64, 8)})
    scene.refuse("(4, 64)", "(64, 8)", KEY.removeprefix("base_model.model."), WEIGHTS)


@pytest.mark.parametrize(
    ("a", "b", "delta"),
    [((4, 32), (64, 4), "(64, 32)"), ((4, 64), (32, 4), "(32, 64)"), ((4, 160), (96, 4), "(96, 160)")],
)
def test_a_delta_of_another_shape_than_the_base_is_refused(
    scene: Scene, a: tuple[int, int], b: tuple[int, int], delta: str
) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, A: torch.ones(a), B: torch.ones(b)})
    scene.refuse(delta, "(64, 64)", "q_proj", WEIGHTS)


def test_swapped_factors_are_refused(scene: Scene) -> None:
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    scene.rename_factors(lambda name: name.replace(name.split(".")[-2], swap[name.split(".")[-2]]))
    scene.refuse(WEIGHTS)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0), (0, 0)])
def test_factors_that_zero_3_did_not_gather_are_refused(scene: Scene, shape: tuple[int, ...]) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, A: torch.ones(shape)})
    scene.refuse(A, shape, WEIGHTS, hint="gather")


@pytest.mark.parametrize("key", [A, B])
@pytest.mark.parametrize("shape", [(), (1,), (256,)])
def test_factors_without_two_dimensions_are_refused(scene: Scene, key: str, shape: tuple[int, ...]) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, key: torch.ones(shape)})
    scene.refuse(key, shape, WEIGHTS)


@pytest.mark.parametrize(
    ("key", "shape"),
    [(A, (4, 16, 2, 2)), (A, (4, 64, 2)), (A, (1, 4, 64)), (B, (64, 2, 2)), (B, (64, 4, 1, 3)), (B, (1, 64, 4))],
)
def test_a_kernel_that_the_base_does_not_have_is_refused(scene: Scene, key: str, shape: tuple[int, ...]) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, key: torch.ones(shape)})
    scene.refuse(key, shape, WEIGHTS)


@pytest.mark.parametrize("ones", [1, 2, 3])
def test_a_kernel_of_one_element_is_the_matrix_that_it_is(scene: Scene, ones: int) -> None:
    scene.merge(output=scene.folder / "flat")
    kernel = (1,) * ones
    scene.spoil_factors(lambda tensors: {name: t.view(*t.shape, *kernel) for name, t in tensors.items()})
    scene.merge()
    assert digests(scene.output) == digests(scene.folder / "flat")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int64, "I64"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.float64, "F64"),
        (torch.complex64, "C64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_factors_that_are_no_floats_are_refused(scene: Scene, dtype: torch.dtype, name: str) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, A: torch.ones(4, 64).to(dtype)})
    scene.refuse(A, name, WEIGHTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", [A, B])
def test_a_value_that_is_not_finite_is_refused_with_its_place(
    scene: Scene, key: str, dtype: torch.dtype, value: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key].to(dtype)
        tensors[key][-1, 1] = value

    scene.spoil_factors(spoil)
    rows = 4 if key == A else 64
    scene.refuse(key, f"holds {value}", f"[{rows - 1}, 1]", WEIGHTS)


@pytest.mark.parametrize("place", [0, (4 << 20) // 4 - 1, (4 << 20) // 4, -1], ids=["first", "end", "next", "last"])
def test_no_value_of_a_large_factor_escapes_the_finite_check(tmp_path: Path, place: int) -> None:
    in_features = 600_000  # 2.4 MB a row: two rows cross the 4 MiB that are checked at a time
    base, adapter = tmp_path / "base", tmp_path / "lora"
    base.mkdir()
    adapter.mkdir()
    save_file({"m.weight": torch.zeros(2, in_features, dtype=torch.bfloat16)}, base / "model.safetensors")
    a = torch.full((2, in_features), 0.5)
    a.view(-1)[place] = float("nan")
    key = "base_model.model.m"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": torch.ones(2, 2)}, adapter / WEIGHTS)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    where = divmod(place % a.numel(), in_features)
    Scene(folder=tmp_path, base=base, adapter=adapter, output=tmp_path / "out").refuse(
        f"{key}.lora_A.weight", "nan", str(list(where))
    )


def test_an_adapter_that_changes_nothing_is_refused_unless_allowed(scene: Scene) -> None:
    scene.spoil_factors(lambda ts: {name: t * 0 if "lora_B" in name else t for name, t in ts.items()})
    scene.refuse("zero", "down_proj", WEIGHTS, hint="--allow-zero-delta")
    scene.merge(allow_zero_delta=True)
    merged = load_folder(scene.output)
    assert all(torch.equal(merged[name], tensor) for name, tensor in load_folder(scene.base).items())


def test_an_adapter_that_is_zero_in_a_alone_is_refused_too(scene: Scene) -> None:
    scene.spoil_factors(lambda ts: {name: t * -0.0 if "lora_A" in name else t for name, t in ts.items()})
    scene.refuse("zero", hint="--allow-zero-delta")


def test_a_nan_beside_zeros_is_refused_even_where_zero_is_allowed(scene: Scene) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[A].zero_()
        tensors[B][3, 3] = float("nan")

    scene.spoil_factors(spoil)
    scene.refuse(B, "nan", allow_zero_delta=True)


@pytest.mark.parametrize(("a", "b"), [(1e-30, 1e-35), (1e-38, 1e-38), (1e-45, 1e-45), (1e18, 1e18)])
def test_factors_whose_product_float32_does_not_hold_are_merged_or_refused_in_words(
    small: Scene, a: float, b: float
) -> None:
    small.spoil_factors(lambda ts: {name: torch.full_like(t, a if "lora_A" in name else b) for name, t in ts.items()})
    small.merge()
    assert distmerge.verify(small.output, base=small.base, adapters=small.config().adapters).num_adapter_tensors == 2


def test_one_zero_delta_is_a_warning(scene: Scene) -> None:
    scene.spoil_factors(lambda tensors: {**tensors, B: tensors[B] * 0})
    warnings = distmerge.plan(scene.config()).warnings
    assert any("zero" in text and "layers.0.self_attn.q_proj" in text for text in warnings), warnings
    scene.merge()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_target_that_is_no_supported_float_is_refused(scene: Scene, dtype: torch.dtype) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    scene.single(lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    scene.refuse(name, hint="BF16")


def test_a_target_with_another_number_of_dimensions_is_refused(scene: Scene) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    scene.single(lambda tensors: {**tensors, name: tensors[name].view(1, 64, 64)})
    scene.refuse("(1, 64, 64)", "q_proj")


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("adapter_model.bin", "pickle", "--allow-pickle"),
        ("adapter_model.pt", "pickle", "--allow-pickle"),
        ("some.ckpt", "pickle", "--allow-pickle"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "FSDP", "accelerate merge-weights"),
        ("__0_0.distcp", "FSDP", "accelerate merge-weights"),
        ("zero_to_fp32.py", "DeepSpeed", "zero_to_fp32"),
        ("global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt", "DeepSpeed", "zero_to_fp32"),
        ("iter_0000010/mp_rank_00", "Megatron", "Megatron-Bridge"),
        ("adapters.safetensors", "only 2 bytes", "download"),
        ("checkpoint-10/adapter_model.safetensors", f"{WEIGHTS} is missing", "checkpoint-10"),
        ("optimizer.pt", f"{WEIGHTS} is missing", "--adapter"),
    ],
)
def test_a_folder_that_training_left_unfinished_is_refused_with_the_way_on(
    scene: Scene, name: str, what: str, hint: str
) -> None:
    (scene.adapter / WEIGHTS).unlink()
    (scene.adapter / name).parent.mkdir(exist_ok=True)
    (scene.adapter / name).write_bytes(b"\x80\x04")
    scene.refuse(what, scene.adapter, hint=hint)


def test_of_several_weight_files_none_is_guessed(scene: Scene) -> None:
    (scene.adapter / WEIGHTS).rename(scene.adapter / "one.safetensors")
    (scene.adapter / "two.safetensors").write_bytes((scene.adapter / "one.safetensors").read_bytes())
    scene.refuse("one.safetensors", "two.safetensors", scene.adapter, hint="name the file")


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "new_embeddings.safetensors"])
def test_trained_weights_beside_the_adapter_are_refused(scene: Scene, name: str) -> None:
    (scene.adapter / name).write_bytes(b"x")
    scene.refuse(name, scene.adapter)


def test_an_adapter_that_is_not_there_is_refused(scene: Scene) -> None:
    scene.refuse("nowhere", adapters=(scene.folder / "nowhere",), hint="--adapter")


def test_the_weight_file_itself_means_what_its_folder_means(scene: Scene) -> None:
    scene.merge(output=scene.folder / "by folder")
    scene.merge(adapters=(scene.adapter / WEIGHTS,))
    assert digests(scene.output) == digests(scene.folder / "by folder")


@pytest.mark.parametrize("name", ["adapter_config.json", "README.md", "tokenizer.json"])
def test_a_file_that_holds_no_weights_is_no_adapter(scene: Scene, name: str) -> None:
    (scene.adapter / name).write_text("{}" * 40)
    scene.refuse(name, adapters=(scene.adapter / name,))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
@pytest.mark.timeout(10)
def test_a_fifo_in_place_of_a_file_of_the_adapter_does_not_hang(scene: Scene, name: str) -> None:
    (scene.adapter / name).unlink()
    os.mkfifo(scene.adapter / name)
    scene.refuse(name, "regular file")


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_a_folder_in_place_of_a_file_of_the_adapter_is_refused(scene: Scene, name: str) -> None:
    (scene.adapter / name).unlink()
    (scene.adapter / name).mkdir()
    scene.refuse(name)


def test_the_second_of_two_adapters_is_checked_as_the_first(scene: Scene, adapter: Path) -> None:
    scene.rename_factors(lambda name: name.replace("layers.1", "layers.7"))
    scene.refuse("layers.7", scene.adapter, adapters=(adapter, scene.adapter))
