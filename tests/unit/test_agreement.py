"""By which multiple of its delta a tensor was changed, and whether by that alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distmerge.numerics.agreement import Agreement, agreement
from distmerge.numerics.rounding import half_ulp


def random(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("times", [-1.0, 0.5, 1.0, 2.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_rounded_multiple_of_a_delta_is_recognised(dtype: torch.dtype, times: float) -> None:
    base, delta = random(0).to(dtype), random(1, 0.1)
    stored = (base.double() + times * delta).to(dtype)
    found = agreement(stored.double() - base.double(), delta, half_ulp(stored))
    assert found.is_multiple
    assert found.coefficient == pytest.approx(times, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_delta_is_no_multiple(dtype: torch.dtype) -> None:
    base, delta, other = random(0).to(dtype), random(1, 0.1), random(2, 0.1)
    stored = (base.double() + other).to(dtype)
    found = agreement(stored.double() - base.double(), delta, half_ulp(stored))
    assert not found.is_multiple
    assert abs(found.cosine) < 0.2


def test_values_that_are_not_finite_stand_in_no_sum() -> None:
    change = random(0)
    change[0, 0], change[3, 4] = float("nan"), float("inf")
    found = agreement(change, random(1), torch.ones_like(change))
    assert (found.numel, found.num_not_finite) == (1198, 2)
    assert found.change_squared == pytest.approx(float(change[change.isfinite()].square().sum()))


@given(st.integers(1, 39))
def test_the_agreement_of_parts_adds_up_to_that_of_the_whole(rows: int) -> None:
    change, delta, room = random(0), random(1), random(2).abs()
    change[change.abs() < 0.1] = 0
    whole = agreement(change, delta, room)
    parts = agreement(change[:rows], delta[:rows], room[:rows]) + agreement(change[rows:], delta[rows:], room[rows:])
    assert (parts.numel, parts.num_unchanged) == (whole.numel, whole.num_unchanged)
    assert parts.coefficient == pytest.approx(whole.coefficient)
    assert parts.room_squared == pytest.approx(whole.room_squared)


def test_nothing_agrees_with_a_delta_of_zero() -> None:
    assert (Agreement().coefficient, Agreement().cosine, Agreement().is_multiple) == (0.0, 0.0, False)
