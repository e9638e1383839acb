"""Configurations and headers of tuners come from strangers: what does not fit is refused, what is accepted works."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftType

from distmerge.adapter.tuners.registry import TUNERS, UNMERGEABLE, Tuner
from distmerge.errors import InputError
from distmerge.numerics.tuners import LOW_RANK, OPERATORS, misplaced
from tests.tuners import CASES, Case, modules, train

Shapes = dict[str, tuple[int, ...]]
EVERY = pytest.mark.parametrize("case", [case for case in CASES if case.config != "LNTuning"], ids=str)
STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 2**70, -0.5, 1e-3, 10**400, math.nan, math.inf),
    *("", "x", "relu", "0.18.0.dev0", [], [0], [1.5], [True], {}, {"(": 1}, {"k_proj": True}, {"k_proj": 2}),
]


class Read(dict[str, Any]):
    """A configuration that remembers which fields were asked for."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.fields: set[str] = set()

    def get(self, field: str, default: Any = None) -> Any:
        self.fields.add(field)
        return super().get(field, default)


def example(case: Case) -> tuple[Tuner, dict[str, Any], str, Shapes, tuple[int, int], set[str]]:
    """A tuner, its configuration, a module, shapes, the weight's size, and the tensors that hold integers."""
    trained = train(case)
    found = modules(trained.base, trained.config, trained.tensors)
    tuned = next((tuned for tuned in found if tuned.name.endswith("k_proj")), found[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in tuned.tensors.items()}
    integers = {name for name, tensor in tuned.tensors.items() if not tensor.is_floating_point()}
    size = (tuned.weight.shape[0], tuned.weight.shape[1])
    return TUNERS[trained.config["peft_type"]], trained.config, tuned.name, shapes, size, integers


def assert_refused_or_works(
    tuner: Tuner, config: dict[str, Any], shapes: Shapes, size: tuple[int, int], integers: set[str]
) -> None:
    try:
        options = tuner.read_options(config, "model.layers.0.self_attn.k_proj", shapes, size)
    except InputError:
        return
    json.dumps(options, allow_nan=False)
    tensors = {
        name: torch.zeros(shape, dtype=torch.int64) if name in integers else torch.rand(shape)
        for name, shape in shapes.items()
    }
    weight = torch.rand(size)
    if not tuner.changes_weight:
        weight = weight[:, :1]
    if tuner.operator in LOW_RANK:
        b, a = LOW_RANK[tuner.operator](tensors, options)
        assert (b @ a).shape == weight.shape
    else:
        new = OPERATORS[tuner.operator].apply(weight, weight, tensors, options, slice(0, len(weight)))
        assert new.shape == weight.shape


def changed_shapes(shapes: Shapes) -> Iterator[Shapes]:
    for name, shape in shapes.items():
        rest = {key: value for key, value in shapes.items() if key != name}
        yield rest
        yield {**rest, name: ()}
        yield {**rest, name: (*shape, 1)}
        yield {**rest, name: shape[::-1]}
        for at, length in enumerate(shape):
            for other in (0, 1, length - 1, length + 1, 2 * length):
                yield {**rest, name: (*shape[:at], max(other, 0), *shape[at + 1 :])}


@EVERY
def test_a_tensor_of_another_shape_is_refused_or_can_be_computed_with(case: Case) -> None:
    tuner, config, _, shapes, size, integers = example(case)
    for changed in changed_shapes(shapes):
        assert_refused_or_works(tuner, config, changed, size, integers)


@EVERY
def test_a_weight_of_another_shape_is_refused_or_can_be_computed_with(case: Case) -> None:
    tuner, config, _, shapes, (out, into), integers = example(case)
    for size in ((into, out), (out + 1, into), (out, into - 1), (1, into), (out, 1), (1, 1), (2 * out, 2 * into)):
        assert_refused_or_works(tuner, config, shapes, size, integers)


@EVERY
def test_a_strange_value_in_the_configuration_is_refused_or_can_be_computed_with(case: Case) -> None:
    tuner, config, module, shapes, size, integers = example(case)
    read = Read(config)
    tuner.read_options(read, module, shapes, size)
    for field in sorted(read.fields):
        for value in STRANGE:
            assert_refused_or_works(tuner, {**config, field: value}, shapes, size, integers)
    assert_refused_or_works(tuner, {}, shapes, size, integers)


def first(config: str, **fields: Any) -> Case:
    """The first case of `config` that sets `fields`."""
    return next(case for case in CASES if case.config == config and fields.items() <= case.fields.items())


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        (first("LoHa"), "alpha", math.nan),
        (first("LoHa"), "alpha", "6"),
        (first("LoHa"), "alpha", None),
        (first("LoHa"), "alpha", True),
        (first("LoHa"), "alpha_pattern", {"k_proj": 1, ".*k_proj": 2}),
        (first("LoHa"), "alpha_pattern", {"(": 1}),
        (first("LoKr", r=16), "r", 0),
        (first("AdaLora"), "init_r", True),
        (first("AdaLora"), "init_r", 5),
        (first("AdaLora"), "lora_alpha", 10**400),
        (first("OFT"), "use_cayley_neumann", None),
        (first("OFT"), "num_cayley_neumann_terms", 10**6),
        (first("OFT"), "peft_version", "0.18.0.dev0@abc"),
        (first("OFT"), "peft_version", "new"),
        (first("OFT", coft=True), "eps", -1.0),
        (first("Pvera"), "sample_at_inference", True),
        (first("VBLoRA"), "topk", 17),
        (first("WaveFT"), "wavelet_family", "coif4"),
        (first("FourierFT"), "random_loc_seed", None),
        (first("FourierFT"), "random_loc_seed", 2**64),
        (first("Road"), "group_size", 7),
        (first("Miss", init_weights="bat"), "init_weights", "cat"),
        (first("Peanut", depth=2), "depth", 1),
        (first("Peanut", depth=2), "act_fn", "relu6"),
        (first("TrainableTokens"), "token_indices", [1, 1, 2]),
        (first("TrainableTokens"), "token_indices", [1, 96, 2]),
        (first("TrainableTokens"), "token_indices", [1, True, 2]),
        (first("Gralora", hybrid_r=3), "hybrid_r", 2),
        (first("Supertuning", r=4), "r", None),
    ],
    ids=str,
)
def test_a_value_that_changes_the_arithmetic_is_never_guessed(case: Case, field: str, value: Any) -> None:
    tuner, config, module, shapes, size, _ = example(case)
    tuner.read_options(config, module, shapes, size)
    with pytest.raises(InputError, match=field) as refused:
        tuner.read_options({**config, field: value}, module, shapes, size)
    assert refused.value.where


@pytest.mark.parametrize("shape", [(3, 2, 32, 32), (2, 64, 1, 1), (99, 16, 4, 4), (2, 8, 4, 4)])
def test_rotations_that_make_no_butterfly_are_refused(shape: tuple[int, ...]) -> None:
    tuner, config, module, shapes, size, _ = example(first("BOFT"))
    tuner.read_options(config, module, {**shapes, "boft_R": (2, 16, 4, 4)}, size)
    with pytest.raises(InputError, match="butterfly"):
        tuner.read_options(config, module, {**shapes, "boft_R": shape}, size)


def test_projections_that_were_not_saved_are_asked_for() -> None:
    for config in ("Vera", "RandLora"):
        tuner, raw, module, shapes, size, _ = example(first(config))
        own = {name: shape for name, shape in shapes.items() if name not in tuner.shared}
        with pytest.raises(InputError, match="save_projection=True"):
            tuner.read_options(raw, module, own, size)


@pytest.mark.parametrize(
    ("version", "halves"), [(None, False), ("0.17.1", False), ("0.18.0", True), ("0.21.2", True), ("1.0", True)]
)
def test_the_series_of_oft_is_that_of_the_version_that_trained_it(version: str | None, halves: bool) -> None:
    tuner, config, module, shapes, size, _ = example(first("OFT"))
    assert tuner.read_options({**config, "peft_version": version}, module, shapes, size)["halves_last"] is halves


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (first("Shira"), "shira_indices"),
        (first("Supertuning"), "supertuning_indices"),
        (first("UniLora"), "unilora_indices_B"),
        (first("VBLoRA", topk=3), "vblora_logits_A_topk_indices"),
    ],
    ids=str,
)
def test_an_index_that_points_outside_is_found(case: Case, name: str) -> None:
    trained = train(case)
    tuned = modules(trained.base, trained.config, trained.tensors)[0]
    size = (tuned.weight.shape[0], tuned.weight.shape[1])
    assert misplaced(tuned.tensors, size) == []
    for value in (-1, 100 if tuned.tensors[name].dtype == torch.uint8 else 2**30):
        indices = tuned.tensors[name].clone().long()
        indices.view(-1)[-1] = value
        assert misplaced({**tuned.tensors, name: indices}, size) == [name]


def test_modules_that_adalora_pruned_to_nothing_are_kept_as_they_are() -> None:
    tuner, config, module, _, (out, into), _ = example(first("AdaLora"))
    shapes: Shapes = {"lora_A": (0, into), "lora_B": (out, 0), "lora_E": (0, 1)}
    options = tuner.read_options(config, module, shapes, (out, into))
    b, a = LOW_RANK["adalora"]({name: torch.zeros(shape) for name, shape in shapes.items()}, options)
    assert torch.equal(b @ a, torch.zeros(out, into))


def test_bone_is_miss_under_its_old_name() -> None:
    for case in (first("Miss", r=7), first("Miss", init_weights="bat")):
        tuner, config, module, shapes, size, _ = example(case)
        renamed = {"bone_block": shapes["miss_block"]}
        block = torch.rand(shapes["miss_block"], dtype=torch.float64)
        weight = torch.rand(size, dtype=torch.float64)
        options = TUNERS["BONE"].read_options({**config, "peft_type": "BONE"}, module, renamed, size)
        new, expected = (
            OPERATORS[one.operator].apply(weight, weight, {name: block}, options, slice(0, len(weight)))
            for one, name in ((TUNERS["BONE"], "bone_block"), (tuner, "miss_block"))
        )
        assert torch.equal(new, expected)


def test_every_type_of_peft_can_be_merged_or_has_a_reason_why_not() -> None:
    known = {"LORA"} | TUNERS.keys() | UNMERGEABLE.keys()
    assert {kind.value for kind in PeftType} <= known
    assert not TUNERS.keys() & UNMERGEABLE.keys()
    assert known - {kind.value for kind in PeftType} <= {"BONE"}


def test_the_registry_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, distmerge.adapter.tuners.registry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
