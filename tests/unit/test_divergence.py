"""How far predictions lie apart, against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from distmerge.numerics.divergence import Divergence, divergence


def test_the_sums_are_those_of_the_definitions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    found = divergence(p.log() + 3, q.log() - 5, torch.tensor([0, 2]))
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert (found.num_tokens, found.num_agreeing) == (2, 1)
    assert found.kl == pytest.approx(kl, rel=1e-6)
    assert found.max_kl == pytest.approx(kl, rel=1e-6)
    assert found.reference_nll == pytest.approx(-math.log(0.5) - math.log(0.1), rel=1e-6)
    assert found.other_nll == pytest.approx(-math.log(0.25) - math.log(0.1), rel=1e-6)


def test_parts_add_up_and_equal_logits_are_at_distance_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(9, 50, generator=generator) * 4 for _ in range(2))
    targets = torch.randint(0, 50, (9,), generator=generator)
    whole = divergence(p, q, targets)
    parts = sum((divergence(p[n : n + 2], q[n : n + 2], targets[n : n + 2]) for n in range(0, 9, 2)), Divergence())
    assert parts.kl == pytest.approx(whole.kl)
    assert (parts.max_kl, parts.num_agreeing) == (whole.max_kl, whole.num_agreeing)
    assert whole.kl > 1
    assert divergence(p, p, targets).kl == 0


def test_a_token_that_is_impossible_to_the_reference_weighs_nothing() -> None:
    p = torch.tensor([[0.0, 0.0, -math.inf]])
    assert divergence(p, torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([0])).kl == 0
    assert divergence(p, torch.zeros(1, 3), torch.tensor([0])).kl == pytest.approx(math.log(1.5))
    assert divergence(torch.zeros(1, 3), p, torch.tensor([0])).kl == math.inf


def test_a_prediction_that_is_not_a_number_never_passes_for_close() -> None:
    bad = torch.tensor([[math.nan, 0.0]])
    good = divergence(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    found = divergence(torch.zeros(1, 2), bad, torch.tensor([0]))
    assert math.isnan(found.kl)
    assert math.isnan((found + good).max_kl)
    assert math.isnan((good + found).max_kl)
