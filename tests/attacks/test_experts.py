"""LoRA on expert parameters: nesting that does not fit, factors of other shapes, square experts, orders of columns."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distmerge
from tests.attacks.scene import FRONT, WEIGHTS, Scene
from tests.conftest import digests
from tests.factories import load_folder, write_base

EXPERTS = "model.layers.0.mlp.experts"
UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
KEY = f"{FRONT}{EXPERTS}"
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []}
CONFIG |= {"target_parameters": TARGETS, "peft_version": "0.21.2"}


def factors(inner: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(inner))
    keys = {f"{KEY}{inner}.lora_A.weight": a, f"{KEY}{inner}.lora_B.weight": b}
    return {key: torch.randn(shape, generator=generator) for key, shape in keys.items()}


UP_FACTORS, DOWN_FACTORS = factors(".base_layer", (6, 6), (10, 6)), factors("", (6, 5), (6, 6))
BOTH = {**UP_FACTORS, **DOWN_FACTORS}


@pytest.fixture
def experts(tmp_path: Path) -> Scene:
    """Three experts, (10, 6) up and (6, 5) down, and the factors of rank 2 of both."""
    generator = torch.Generator().manual_seed(0)
    shapes = {UP: (3, 10, 6), DOWN: (3, 6, 5), "model.norm.weight": (6,)}
    base = write_base(tmp_path / "base", {n: torch.randn(s, generator=generator) for n, s in shapes.items()})
    (tmp_path / "lora").mkdir()
    scene = Scene(folder=tmp_path, base=base, adapter=tmp_path / "lora", output=tmp_path / "out")
    scene.write(BOTH, **CONFIG)
    return scene


def delta(tensors: dict[str, Tensor], inner: str, *, expert_major: bool = False) -> Tensor:
    a, b = (tensors[f"{KEY}{inner}.lora_{side}.weight"] for side in "AB")
    columns = b.reshape(len(b), 3, -1).mT if expert_major else b.reshape(len(b), -1, 3)
    return 2 * torch.einsum("ore,eri->eoi", columns, a.reshape(3, -1, a.shape[1]))


def test_the_experts_themselves_merge(experts: Scene) -> None:
    warnings = distmerge.plan(experts.config()).warnings
    assert not any("r is larger" in text for text in warnings), "lora_A has r rows for each expert"
    experts.merge()
    merged, base = load_folder(experts.output), load_folder(experts.base)
    assert torch.allclose(merged[UP], base[UP] + delta(BOTH, ".base_layer"), atol=1e-5)
    assert torch.allclose(merged[DOWN], base[DOWN] + delta(BOTH, ""), atol=1e-5)


def test_the_order_of_target_parameters_means_nothing(experts: Scene) -> None:
    experts.merge()
    for number, names in enumerate(permutations(TARGETS)):
        experts.spoil_config(target_parameters=[*names])
        experts.merge(output=experts.folder / str(number))
        assert digests(experts.folder / str(number)) == digests(experts.output)


@pytest.mark.parametrize("lost", sorted(BOTH))
def test_half_a_pair_is_refused_by_name(experts: Scene, lost: str) -> None:
    experts.write({key: t for key, t in BOTH.items() if key != lost}, **CONFIG)
    experts.refuse(EXPERTS, "lora_", WEIGHTS)


@pytest.mark.parametrize("left", [UP_FACTORS, DOWN_FACTORS], ids=["inner", "outer"])
def test_one_wrapper_of_two_is_refused(experts: Scene, left: dict[str, Tensor]) -> None:
    experts.write(left, **CONFIG)
    experts.refuse(EXPERTS, WEIGHTS)


@pytest.mark.parametrize(
    ("inner", "a", "b"),
    [
        *((".base_layer", (6, 6), shape) for shape in [(10, 4), (10, 5), (9, 6), (10,), (), (10, 6, 1), (20, 3)]),
        *((".base_layer", shape, (10, 6)) for shape in [(6, 5), (5, 6), (4, 6), (6,), (), (6, 6, 1), (36,)]),
        *(
            (".base_layer", a, b)
            for a, b in [((6, 12), (5, 6)), ((6, 60), (1, 6)), ((6, 20), (9, 6)), ((7, 6), (10, 7))]
        ),
        *(("", a, b) for a, b in [((6, 10), (3, 6)), ((6, 15), (2, 6)), ((6, 6), (6, 6)), ((4, 5), (6, 4))]),
        *((".base_layer.base_layer", a, b) for a, b in [((6, 6), (10, 6)), ((6, 5), (6, 6))]),
        *((".other", a, b) for a, b in [((6, 6), (10, 6))]),
    ],
)
def test_factors_that_are_of_no_parameter_are_refused_by_name(
    experts: Scene, inner: str, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    experts.write({**BOTH, **factors(inner, a, b)}, **CONFIG)
    experts.refuse("experts", WEIGHTS)


@pytest.mark.parametrize(
    "shape", [(3, 6), (3, 10, 6, 1), (30, 6), (), (60,), (3, 12, 5), (1, 10, 6), (6, 10, 6)], ids=str
)
def test_experts_of_another_shape_are_refused(experts: Scene, shape: tuple[int, ...]) -> None:
    experts.single(lambda tensors: {**tensors, UP: torch.ones(shape)})
    experts.refuse("experts", experts.adapter)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
@pytest.mark.parametrize("key", sorted(BOTH))
def test_factors_that_are_no_floats_are_refused_by_name(experts: Scene, key: str, dtype: torch.dtype) -> None:
    experts.write({**BOTH, key: BOTH[key].to(dtype)}, **CONFIG)
    experts.refuse(key, WEIGHTS)


@pytest.mark.parametrize("role", ["lora_magnitude_vector", "lora_B.bias", "lora_diag", "lora_embedding_A", "hada_w1_a"])
@pytest.mark.parametrize("inner", ["", ".base_layer"])
def test_what_no_training_makes_of_parameters_is_refused(experts: Scene, role: str, inner: str) -> None:
    experts.write({**BOTH, f"{KEY}{inner}.{role}": torch.ones(10)}, **CONFIG)
    experts.refuse(EXPERTS, role.partition(".")[0], WEIGHTS)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_variants_that_parameters_do_not_have_are_refused(experts: Scene, fields: dict[str, Any]) -> None:
    experts.spoil_config(**fields)
    experts.refuse(*fields)


@pytest.mark.parametrize(
    "targets",
    [
        *([], None, ["experts.gate_up_proj"], ["experts.down_proj"], ["mlp.gate_up_proj"], ["experts"], ["experts."]),
        *(["experts.gate_up_proj", "experts.x"], ["xperts.gate_up_proj"]),
    ],
    ids=str,
)
def test_target_parameters_that_do_not_name_the_wrapped_ones_are_refused(experts: Scene, targets: Any) -> None:
    experts.spoil_config(target_parameters=targets)
    experts.refuse("experts", WEIGHTS)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_patterns_for_a_parameter_count(experts: Scene, pattern: str) -> None:
    experts.spoil_config(**{pattern: {".*\\.gate_up_proj": 3}})
    if pattern == "rank_pattern":
        experts.refuse("experts.base_layer.lora_A", "'3'")
        return
    experts.merge()
    changed = load_folder(experts.output)[UP] - load_folder(experts.base)[UP]
    assert torch.allclose(changed, delta(BOTH, ".base_layer") * 3 / 4, atol=1e-5)


# -- square experts, whose shapes do not tell how they lie


@pytest.fixture
def square(experts: Scene) -> Scene:
    experts.single(lambda tensors: {**tensors, DOWN: torch.randn(3, 6, 6)})
    experts.write({**UP_FACTORS, **factors("", (6, 6), (6, 6))}, **CONFIG)
    return experts


@pytest.mark.parametrize(
    "version", [None, "", "x", 5, True, ["0.18.0"], "0", "99999999.1", "v0.18", "0.19.1", "0.21.2"]
)
def test_square_experts_are_not_guessed(square: Scene, version: Any) -> None:
    square.spoil_config(peft_version=version)
    square.refuse("square", "(3, 6, 6)")


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0"])
def test_square_experts_of_old_versions_are_known(square: Scene, version: str) -> None:
    square.spoil_config(peft_version=version)
    square.merge()
    changed = load_folder(square.output)[DOWN] - load_folder(square.base)[DOWN]
    tensors = factors("", (6, 6), (6, 6))
    assert torch.allclose(changed, delta(tensors, "").mT, atol=1e-5)


# -- the order of lora_B's columns


@pytest.mark.parametrize("told", ["unsloth/gpt-oss-20b", "/models/Unsloth-x"])
def test_the_order_of_columns_is_not_guessed_for_unsloth(experts: Scene, told: str) -> None:
    experts.spoil_config(base_model_name_or_path=told)
    experts.refuse("Unsloth", WEIGHTS, hint="--expert-b-order")
    for order in ("peft", "expert-major"):
        experts.merge(expert_b_order=order, output=experts.folder / order)
        changed = load_folder(experts.folder / order)[UP] - load_folder(experts.base)[UP]
        expected = delta(BOTH, ".base_layer", expert_major=order == "expert-major")
        assert torch.allclose(changed, expected, atol=1e-5)


def test_an_order_means_nothing_for_what_has_no_experts(small: Scene) -> None:
    small.merge(output=small.folder / "peft", expert_b_order="peft")
    small.merge(expert_b_order="expert-major")
    assert digests(small.output) == digests(small.folder / "peft")


@pytest.mark.timeout(60)
def test_a_great_many_wrappers_do_not_hang(experts: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmerge.adapter.patterns._SECONDS", 0.5)
    names = [f"w{number}" for number in range(14)]
    experts.single(lambda _: {f"{EXPERTS}.{name}": torch.ones(3, 10, 6) for name in names})
    tensors: dict[str, Tensor] = {}
    for depth in range(14):
        tensors |= factors(".base_layer" * depth, (6, 6), (10, 6))
    experts.write(tensors, **{**CONFIG, "target_parameters": [f"experts.{name}" for name in names]})
    experts.refuse()
