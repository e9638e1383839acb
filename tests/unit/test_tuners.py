"""The arithmetic of every tuner: PEFT's own models say what is right."""

from __future__ import annotations

import pytest
from torch import Tensor

from distmerge.adapter.tuners.registry import TUNERS
from distmerge.numerics.tuners import LOW_RANK, OPERATORS
from tests.tuners import CASES, Case, logits, merge, train

EVERY = pytest.mark.parametrize("case", CASES, ids=str)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


@EVERY
def test_the_files_alone_give_the_logits_of_the_unmerged_model(case: Case) -> None:
    trained = train(case)
    weights = merge(trained.base, trained.base, trained.config, trained.tensors)
    assert largest(logits(weights, case.biases) - trained.logits) < case.logits_tolerance
    assert largest(trained.base_logits - trained.logits) > 100 * max(case.logits_tolerance, 1e-4)


@EVERY
def test_the_files_alone_give_the_weights_that_peft_merges(case: Case) -> None:
    trained = train(case)
    weights = merge(trained.base, trained.base, trained.config, trained.tensors)
    assert weights.keys() == trained.merged.keys()
    for name, weight in weights.items():
        assert largest(weight - trained.merged[name]) < case.tolerance, name


def test_every_tuner_of_the_registry_has_a_case_and_an_operator() -> None:
    tried = {train(case).config["peft_type"] for case in CASES}
    assert TUNERS.keys() - tried == {"BONE"}
    assert {tuner.operator for tuner in TUNERS.values()} - {""} <= OPERATORS.keys() | LOW_RANK.keys()
