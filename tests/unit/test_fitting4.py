"""Fitted scales: no block is worse off, a tensor is better off, and double quantization does not undo it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distmerge.numerics import fitting4, nf4, packing4

KINDS = ["nf4", "fp4"]


def noise(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 0.03


def errors(values: Tensor, found: Tensor, absmax: Tensor, table: Tensor, blocksize: int) -> Tensor:
    """The squared error of each block in float64, element by element."""
    scale = absmax.double().repeat_interleave(blocksize)[: len(values)]
    squared = (table.double()[found.long()] * scale - values.double()).square()
    return torch.nn.functional.pad(squared, (0, -len(values) % blocksize)).view(-1, blocksize).sum(1)


def plain_errors(values: Tensor, table: Tensor, blocksize: int, read: Tensor | None = None) -> Tensor:
    absmax = packing4.block_absmax(values, blocksize)
    found = packing4.codes(values, absmax, table, first=0, blocksize=blocksize, numel=len(values))
    return errors(values, found, absmax if read is None else read, table, blocksize)


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.sampled_from([32, 64, 512, 4096]),
    st.integers(1, 9000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1.0, 1e-39, 1e30, 0.0]),
)
def test_no_block_is_worse_off_with_fitted_scales(
    kind: str, blocksize: int, numel: int, dtype: torch.dtype, factor: float
) -> None:
    values, table = (noise(numel, numel) * factor).to(dtype), nf4.TABLES[kind]
    values = values.nan_to_num(posinf=1.0, neginf=-1.0)
    values[40:200] = 0
    absmax = packing4.block_absmax(values, blocksize)
    plain, fitted = fitting4.fit(values, absmax, table, blocksize=blocksize)
    found = packing4.codes_for(values, fitted.absmax, table, first=0, blocksize=blocksize)
    before = plain_errors(values, table, blocksize)
    after = errors(values, found, fitted.absmax, table, blocksize)
    assert torch.equal(plain.absmax, absmax)
    assert kind == "nf4" or bool((fitted.absmax >= 0).all())
    assert bool((after <= before * (1 + 1e-6)).all())


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.925), ("fp4", 0.999)])
def test_noise_loses_less_of_its_squares(kind: str, most: float, double: bool) -> None:
    values, table = noise(300_000), nf4.TABLES[kind]
    absmax = packing4.block_absmax(values, 64)
    plain, fitted = fitting4.fit(values, absmax, table, blocksize=64)
    settled = fitting4.settle(plain, fitted, double=double)
    found = packing4.codes_for(values, settled.absmax, table, first=0, blocksize=64)
    before = plain_errors(values, table, 64, packing4.unnest(packing4.nest(absmax)) if double else None)
    after = errors(values, found, settled.absmax, table, 64)
    assert settled.fitted
    assert (settled.nested is not None) == double
    assert float(after.sum() / before.sum()) < most


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_value_of_a_block_is_kept_as_it_is(kind: str) -> None:
    values, table = noise(64 * 500), nf4.TABLES[kind]
    absmax = packing4.block_absmax(values, 64)
    fitted = fitting4.fit(values, absmax, table, blocksize=64)[1]
    found = packing4.codes_for(values, fitted.absmax, table, first=0, blocksize=64)
    read = (table[found.int()].view(-1, 64) * fitted.absmax[:, None]).view(-1)
    largest = values.view(-1, 64).abs().argmax(1) + torch.arange(500) * 64
    assert torch.allclose(read[largest], values[largest], rtol=1e-6, atol=0)
    assert int((fitted.absmax != absmax).sum()) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_that_scales_tell_is_that_of_the_elements(kind: str) -> None:
    values, table = noise(5000), nf4.TABLES[kind]
    absmax = packing4.block_absmax(values, 64)
    plain, _ = fitting4.fit(values, absmax, table, blocksize=64)
    own = torch.nn.functional.pad(values.double().square(), (0, -5000 % 64)).view(-1, 64).sum(1)
    other = absmax * 0.97
    expected = plain_errors(values, table, 64, other)
    assert torch.allclose(plain.error(other) + own, expected, rtol=1e-9, atol=0)


def test_a_tensor_whose_scales_only_rounding_decides_is_no_worse_than_plain() -> None:
    # One huge block makes 8-bit steps that are larger than the scales of the others.
    for seed in range(40):
        values, table = noise(64 * 256, seed), nf4.NF4
        values[:64] *= 10.0 ** (seed % 8)
        absmax = packing4.block_absmax(values, 64)
        settled = fitting4.settle(*fitting4.fit(values, absmax, table, blocksize=64), double=True)
        found = packing4.codes_for(values, settled.absmax, table, first=0, blocksize=64)
        before = plain_errors(values, table, 64, packing4.unnest(packing4.nest(absmax)))
        after = errors(values, found, settled.absmax, table, 64)
        assert float(after.sum()) <= float(before.sum()) * (1 + 1e-6)


def test_scales_whose_advantage_rounding_takes_are_not_settled_on() -> None:
    absmax = torch.rand(700, generator=torch.Generator().manual_seed(0)) + 0.5

    def scales(absmax: Tensor, error: float) -> fitting4.Scales:
        square = -error / absmax.double() ** 2
        return fitting4.Scales(absmax=absmax, product=absmax.double() * square, square=square)

    plain = scales(torch.ones(700), -100.0)  # all equal: stored exactly
    for error, better in ((-100.000001, False), (-101.0, True)):
        fitted = scales(absmax, error)
        assert float(fitted.error(absmax).sum()) < float(plain.error(plain.absmax).sum())
        settled = fitting4.settle(plain, fitted, double=True)
        assert settled.fitted == better
        assert settled.nested is not None
        assert torch.equal(settled.absmax, packing4.unnest(settled.nested))
        assert bool((settled.absmax == 1).all()) != better


def test_a_block_is_fitted_by_itself_wherever_it_lies() -> None:
    values = noise(64 * 3000).bfloat16()
    absmax = packing4.block_absmax(values, 64)
    whole = fitting4.fit(values, absmax, nf4.NF4, blocksize=64)[1]
    part = fitting4.fit(values[64 * 1111 :], absmax[1111:], nf4.NF4, blocksize=64)[1]
    assert torch.equal(part.absmax, whole.absmax[1111:])


def test_an_empty_tensor_is_fitted_by_nothing() -> None:
    plain, fitted = fitting4.fit(torch.empty(0), torch.empty(0), nf4.NF4, blocksize=64)
    assert len(plain.absmax) == len(fitted.absmax) == 0
    assert fitting4.settle(plain, fitted, double=True).absmax.numel() == 0
