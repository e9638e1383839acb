"""What one rounding can cost, against every value there is."""

from __future__ import annotations

import pytest
import torch

from distmerge.numerics.rounding import distance, half_ulp, not_surely_nearest, ulp

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
ANY = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a 16-bit dtype."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[torch.isfinite(values)]


def samples(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit dtype; of float32 random bits and all powers of two."""
    if dtype != torch.float32:
        return every_value(dtype)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    powers = torch.ldexp(torch.ones(276), torch.arange(-149, 127))
    edges = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    return torch.cat([bits[torch.isfinite(bits)], powers, -powers, edges])


@ANY
def test_an_ulp_is_the_step_to_the_next_value_away_from_zero(dtype: torch.dtype) -> None:
    values = samples(dtype).abs()
    values = values[values < torch.finfo(dtype).max]
    following = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert torch.equal(ulp(values.double(), dtype), following.double() - values.double())
    assert torch.equal(ulp(-values.double(), dtype), ulp(values.double(), dtype))


@HALF
def test_the_ulp_of_a_value_between_two_of_a_dtype_is_the_gap_that_it_lies_in(dtype: torch.dtype) -> None:
    values = every_value(dtype).double().abs().unique()
    middles = (values[:-1] + values[1:]) / 2
    assert torch.equal(ulp(middles, dtype), values[1:] - values[:-1])


@HALF
def test_every_value_is_at_distance_zero_from_itself(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    found = distance(values, values.double(), torch.zeros(len(values), dtype=torch.float64))
    assert (found.max_ulp, found.num_not_nearest, found.num_beyond) == (0.0, 0, 0)


@ANY
def test_what_torch_rounds_to_nearest_counts_as_nearest(dtype: torch.dtype) -> None:
    values = samples(dtype).double()
    generator = torch.Generator().manual_seed(1)
    oracle = values + (torch.rand(len(values), generator=generator, dtype=torch.float64) - 0.5) * ulp(values, dtype)
    # torch takes float64 to 16 bits by way of float32, and so rounds twice; from float32 it rounds once.
    oracle = oracle if dtype == torch.float32 else oracle.float().double()
    stored = oracle.to(dtype)
    oracle = oracle[torch.isfinite(stored)]
    found = distance(stored[torch.isfinite(stored)], oracle, torch.zeros_like(oracle))
    assert (found.num_not_nearest, found.num_beyond) == (0, 0)
    assert 0.49 < found.max_ulp <= 0.5


@HALF
def test_not_nearest_is_counted_as_a_search_over_all_values_counts_it(dtype: torch.dtype) -> None:
    values = every_value(dtype).double().unique()[1:-1]
    oracle = values[:-1] + (values[1:] - values[:-1]) * torch.linspace(0, 1, len(values) - 1, dtype=torch.float64)
    low, high = (oracle - values[:-1]).abs(), (values[1:] - oracle).abs()
    zeros = torch.zeros_like(oracle)
    assert distance(values[:-1].to(dtype), oracle, zeros).num_not_nearest == int((low > high).sum())
    assert distance(values[1:].to(dtype), oracle, zeros).num_not_nearest == int((high > low).sum())


@ANY
def test_one_step_off_is_beyond_half_an_ulp(dtype: torch.dtype) -> None:
    values = samples(dtype).abs().unique()
    values = values[values < torch.finfo(dtype).max]
    following = torch.nextafter(values, torch.full_like(values, torch.inf))
    found = distance(following, values.double(), torch.zeros(len(values), dtype=torch.float64))
    assert found.num_not_nearest == len(values)
    # Just above a power of two the step below is half an ulp, and so within it.
    assert found.num_beyond == int((ulp(following.double(), dtype) == following.double() - values.double()).sum())


def test_noise_is_forgiven_and_nothing_more() -> None:
    oracle, noise = torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0**-10], dtype=torch.float64)
    step = 2.0**-7  # of bfloat16 at 1
    for off, beyond in ((step / 2 + 2.0**-10, 0), (step / 2 + 2.0**-9, 1)):
        assert distance(torch.tensor([1.0]).bfloat16(), oracle + off, noise).num_beyond == beyond


@ANY
def test_a_value_that_is_not_finite_is_beyond_everything(dtype: torch.dtype) -> None:
    one = torch.ones(1, dtype=torch.float64)
    for value in (torch.nan, torch.inf, -torch.inf):
        found = distance(torch.tensor([value], dtype=dtype), one, one)
        assert (found.num_beyond, found.num_not_nearest) == (1, 1)


@ANY
def test_half_an_ulp_of_a_stored_value_is_half_the_spacing_above_it(dtype: torch.dtype) -> None:
    values = samples(dtype)
    expected = ulp(values.double(), dtype) / 2
    assert torch.equal(half_ulp(values), expected)


@ANY
def test_an_element_that_is_not_the_nearest_value_is_always_among_the_doubtful_ones(dtype: torch.dtype) -> None:
    values = samples(dtype)
    values = values[values.abs() < torch.finfo(dtype).max / 2]
    generator = torch.Generator().manual_seed(2)
    wide = values.double()
    # Right at the middle between two values, and a hair beside it, where two roundings go wrong.
    hair = torch.randint(-1, 2, (len(values),), generator=generator).double() * 1e-9
    oracle = wide + ulp(wide, dtype) * (0.5 + hair) * wide.sign()
    noise = torch.zeros(len(values), dtype=torch.float64)
    sure = torch.ones(len(values), dtype=torch.bool)
    sure[not_surely_nearest(values, oracle)] = False
    assert distance(values[sure], oracle[sure], noise[sure]).max_ulp <= 0.5
    assert distance(values[sure], oracle[sure], noise[sure]).num_not_nearest == 0
    clear = values[values.abs() >= torch.finfo(dtype).tiny]
    assert not_surely_nearest(clear, clear.double() * (1 + 2.0**-26)).numel() == 0
    assert torch.tensor(float("nan")).to(dtype).view(1)[not_surely_nearest(values[:1] * torch.nan, wide[:1])].isnan()
