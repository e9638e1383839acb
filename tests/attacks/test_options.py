"""Options that say what files do not: renamings, first adapters, pickles, scalings; each given with ill will."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distmerge import AdapterChoice
from distmerge.errors import UsageError
from tests.attacks.scene import CONFIG, FRONT, HEAD, TABLE, WEIGHTS, Q, Scene, failure
from tests.conftest import digests
from tests.factories import edit_json, load_folder, write_adapter

KEY = f"{FRONT}{Q}"
A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"


# -- --map


@pytest.mark.parametrize(
    "rule",
    [
        *("", "=>", "=>x", "a", "a=>b=>c", "(=>x", "*=>x", "a=>\\9", "a=>\\g<x>", "(?P<a>=>x", "a{99999999999}=>x"),
        *("x" * 2000 + "=>y", "(" * 500 + "=>x", "\x1b[31m(=>x"),
    ],
    ids=lambda rule: repr(rule)[:30],
)
def test_a_rule_that_cannot_be_used_is_refused_as_usage(small: Scene, rule: str) -> None:
    small.refuse("--map", error=UsageError, map=(rule,))


@pytest.mark.parametrize(
    "rule",
    [
        *("q_proj=>\x1b[31m", "q_proj=>\u202e", "q_proj=>\ud800", "q_proj=>" + "x" * 900, ".*=>", "model=>../../etc"),
        *("q_proj=>k_proj", "model=>", "weight=>", "\\.=>", "$=>.weight", "q_proj\\.weight=>q_proj.bias"),
        *("model.*=>lm_head.weight", "model.*=>model.norm.weight"),
    ],
    ids=lambda rule: repr(rule)[:30],
)
def test_a_rule_that_leads_nowhere_is_refused_with_the_name(small: Scene, rule: str) -> None:
    small.refuse(WEIGHTS, map=(rule,))


@pytest.mark.parametrize("rules", [("(.+)=>\\1\\1",) * 16, ("()=>x",) * 40])
@pytest.mark.timeout(30)
def test_rules_that_make_names_grow_are_refused(
    small: Scene, monkeypatch: pytest.MonkeyPatch, rules: tuple[str, ...]
) -> None:
    monkeypatch.setattr("distmerge.adapter.patterns._SECONDS", 0.3)
    small.refuse(map=rules)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.timeout(60)
def test_a_rule_that_takes_exponential_time_does_not_hang(
    small: Scene, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr("distmerge.adapter.patterns._SECONDS", 0.3)
    if whole:
        small.spoil_factors(lambda all_: {**all_, f"{FRONT}{HEAD}": torch.ones(20, 12)})
    small.refuse("CPU time", map=("((.*)*)*z=>x",))


def test_two_parameters_do_not_become_one(small: Scene) -> None:
    small.spoil_factors(lambda all_: {**all_, **{name.replace("q_proj", "x_proj"): t + 1 for name, t in all_.items()}})
    small.refuse(f"{Q}.weight", "both", map=("x_proj=>q_proj",))
    small.spoil_factors(
        lambda all_: {**all_, f"{FRONT}{HEAD}": torch.ones(20, 12), f"{FRONT}{TABLE}": torch.ones(20, 12)}
    )
    small.refuse("both", map=("model\\.embed_tokens=>lm_head",))


def test_a_rule_gives_the_bytes_of_the_right_name(small: Scene) -> None:
    small.merge(output=small.folder / "clean")
    small.rename_factors(lambda name: name.replace("model.layers", "strange.place"))
    small.refuse("strange.place", WEIGHTS, hint="--map")
    small.merge(map=("strange\\.place=>model.layers",))
    assert digests(small.output) == digests(small.folder / "clean")


# -- --initial-adapter


def begin(small: Scene, **fields: Any) -> Path:
    """Makes the adapter one that was trained beside a changed base, and returns what it began as."""
    small.spoil_config(init_lora_weights="corda")
    pair = (torch.randn(2, 12), torch.randn(8, 2))
    return write_adapter(small.folder / "began", {Q: pair}, alpha=4, **fields)


def with_initial(small: Scene, initial: Path, weight: float = 1.0) -> dict[str, Any]:
    return {"adapters": (AdapterChoice(folder=small.adapter, weight=weight, initial=initial),)}


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_what_an_adapter_began_as_is_taken_off(small: Scene, weight: float) -> None:
    initial = begin(small)
    small.merge(**with_initial(small, initial, weight))
    deltas = [
        tensors[B] @ tensors[A] for tensors in (load_file(folder / WEIGHTS) for folder in (small.adapter, initial))
    ]
    expected = load_folder(small.base)[f"{Q}.weight"] + weight * 4 / 2 * (deltas[0] - deltas[1])
    assert torch.allclose(load_folder(small.output)[f"{Q}.weight"], expected, atol=1e-4)


@pytest.mark.parametrize("init", [True, "gaussian", "eva", None, False, "mica"])
def test_nothing_is_taken_off_a_base_that_the_initialisation_left_alone(small: Scene, init: Any) -> None:
    initial = begin(small)
    small.spoil_config(init_lora_weights=init)
    small.refuse("--initial-adapter", small.adapter, **with_initial(small, initial))


@pytest.mark.parametrize(
    "fields",
    [
        *({"use_dora": True}, {"lora_alpha": 5}, {"use_rslora": True}, {"r": 3}, {"alpha_pattern": {"q_proj": 9}}),
        *(
            {"peft_type": "IA3"},
            {"peft_type": "LN_TUNING"},
            {"peft_type": "XLORA"},
            {"bias": "x"},
            {"kasa_config": {"a": 1}},
        ),
    ],
    ids=str,
)
def test_an_initial_adapter_of_another_kind_is_refused(small: Scene, fields: dict[str, Any]) -> None:
    initial = begin(small)
    edit_json(initial / CONFIG, **fields)
    small.refuse(initial, **with_initial(small, initial))


OTHERS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "module": lambda all_: {name.replace("q_proj", "k_proj"): t for name, t in all_.items()},
    "one more": lambda all_: {**all_, f"{FRONT}lm_head.lora_A.weight": torch.ones(2, 12)},
    "rank": lambda all_: {A: all_[A][:1], B: all_[B][:, :1]},
    "half": lambda all_: {A: all_[A]},
    "whole": lambda all_: {**all_, f"{FRONT}{HEAD}": torch.ones(20, 12)},
    "bias": lambda all_: {**all_, f"{KEY}.lora_B.bias": torch.ones(8)},
    "magnitude": lambda all_: {**all_, f"{KEY}.lora_magnitude_vector": torch.ones(8)},
    "rows": lambda all_: {**all_, f"{FRONT}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 12)},
    "not finite": lambda all_: {**all_, A: all_[A] * torch.nan},
    "other": lambda all_: {**all_, "extra": torch.ones(3)},
}


@pytest.mark.parametrize("change", OTHERS)
def test_an_initial_adapter_of_other_tensors_is_refused(small: Scene, change: str) -> None:
    initial = begin(small, trainable_token_indices=[1] if change == "rows" else None)
    changed = OTHERS[change](load_file(initial / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, initial / WEIGHTS)
    small.refuse(initial, **with_initial(small, initial))


def test_the_trained_adapter_is_not_what_it_began_as(small: Scene) -> None:
    begin(small)
    small.refuse(small.adapter, **with_initial(small, small.adapter))
    small.refuse("nowhere", **with_initial(small, small.folder / "nowhere"))


def test_magnitudes_are_not_taken_off(small: Scene) -> None:
    initial = begin(small)
    small.spoil_config(use_dora=True)
    small.spoil_factors(lambda all_: {**all_, f"{KEY}.lora_magnitude_vector": torch.ones(8)})
    small.refuse("use_dora", "init_lora_weights", **with_initial(small, initial))


# -- --allow-pickle


class Evil:
    """Makes a folder when it is unpickled by a reader that calls what it is told to."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


PICKLES: dict[str, Callable[[Path], Any]] = {
    "code among tensors": lambda marker: {A: torch.ones(2, 12), "x": Evil(marker)},
    "expanded": lambda _: {A: torch.ones(1).expand(1 << 34)},
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(small: Scene, kind: str) -> None:
    marker = small.folder / "evil"
    (small.adapter / WEIGHTS).unlink()
    torch.save(PICKLES[kind](marker), small.adapter / "adapter_model.bin")
    small.refuse("adapter_model.bin", "pickle", hint="--allow-pickle")
    small.refuse("adapter_model.bin", allow_pickle=True)
    assert not marker.exists()


def test_a_fifo_in_place_of_a_pickle_does_not_hang(small: Scene) -> None:
    (small.adapter / WEIGHTS).unlink()
    os.mkfifo(small.adapter / "adapter_model.bin")
    small.refuse("adapter_model.bin", allow_pickle=True)


@pytest.mark.parametrize("change", ["same", "misshapen", "not finite"])
def test_a_pickle_is_checked_as_any_adapter_and_leaves_no_trace(small: Scene, change: str) -> None:
    tensors = load_file(small.adapter / WEIGHTS)
    small.merge(output=small.folder / "clean")
    (small.adapter / WEIGHTS).unlink()
    tensors[A] = {
        "same": tensors[A],
        "misshapen": tensors[A][:, 1:],
        "not finite": tensors[A] * torch.inf,
    }[change]
    torch.save(tensors, small.adapter / "adapter_model.bin")
    if change != "same":
        small.refuse("q_proj", "adapter_model.bin", allow_pickle=True)
        return
    names = {path.name for path in small.folder.iterdir()}
    small.merge(allow_pickle=True)
    assert digests(small.output) == digests(small.folder / "clean")
    assert {path.name for path in small.folder.iterdir()} == names | {small.output.name}


# -- scalings


@pytest.mark.parametrize(("told", "given"), [(False, True), (True, False), (None, True)])
def test_use_rslora_replaces_that_of_the_configuration(small: Scene, told: Any, given: bool) -> None:
    small.spoil_config(use_rslora=given)
    small.merge(output=small.folder / "told")
    small.spoil_config(use_rslora=told)
    small.merge(use_rslora=given)
    assert digests(small.output) == digests(small.folder / "told")


@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
@pytest.mark.parametrize("value", [1e300, 1e-300, -1e40, 10**40])
def test_a_scaling_beyond_float32_is_refused(small: Scene, field: str, value: float) -> None:
    small.spoil_config(**{field: {"q_proj": value} if field == "alpha_pattern" else value})
    small.refuse("scaling", Q, WEIGHTS)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_an_alpha_that_is_no_number_is_refused_as_usage(small: Scene, value: float) -> None:
    error = failure(lambda: small.merge(lora_alpha=value))
    assert type(error) is UsageError
    assert "lora-alpha" in str(error)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_as_usage(small: Scene, weight: float) -> None:
    error = failure(lambda: small.merge(adapters=(AdapterChoice(folder=small.adapter, weight=weight),)))
    assert type(error) is UsageError


@pytest.mark.parametrize(("weight", "alpha"), [(1e39, 4), (-1e300, 4), (1e-300, 4), (1e20, 1e20), (-1e-20, 1e-20)])
def test_a_weight_beyond_float32_is_refused(small: Scene, weight: float, alpha: float) -> None:
    small.spoil_config(lora_alpha=alpha)
    small.refuse("scaling", Q, WEIGHTS, adapters=(AdapterChoice(folder=small.adapter, weight=weight),))
