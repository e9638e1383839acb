"""LoRA arithmetic: float32, the same bits however it is cut, norms without the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distmerge.numerics.lora import Factors, add_delta, delta_norm

ALL = slice(None)
SHAPES = pytest.mark.parametrize(("rows", "cols"), [(64, 64), (96, 40), (33, 257)])


def add_deltas(weight: torch.Tensor, deltas: tuple[Factors, ...], *, rows: slice, cols: slice) -> None:
    for delta in deltas:
        add_delta(weight, delta, 0, rows=rows, cols=cols)


def factors(rows: int, cols: int, r: int, *, scaling: float = 1.5, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, cols, generator=generator), torch.randn(rows, r, generator=generator)
    return Factors(a=a[None], b=b[None], scaling=scaling)


@SHAPES
@pytest.mark.parametrize("r", [1, 7, 64])
def test_a_delta_is_scaling_times_b_times_a(rows: int, cols: int, r: int) -> None:
    factor, base = factors(rows, cols, r, scaling=-0.75), torch.randn(rows, cols)
    weight = base.clone()
    add_deltas(weight, (factor,), rows=ALL, cols=ALL)
    exact = base.double() - 0.75 * (factor.b[0].double() @ factor.a[0].double())
    bound = base.double().abs() + 0.75 * (factor.b[0].double().abs() @ factor.a[0].double().abs())
    assert ((weight.double() - exact).abs() <= bound * (r + 3) * 2.0**-24).all()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 24), st.integers(1, 60), st.integers(1, 60))
def test_every_part_gets_its_own_rows_and_columns_of_the_delta(
    rows: int, cols: int, r: int, height: int, width: int
) -> None:
    deltas = (factors(rows, cols, r), factors(rows, cols, 2 * r, scaling=-0.4, seed=1))
    whole, parts = torch.zeros(rows, cols), torch.zeros(rows, cols)
    add_deltas(whole, deltas, rows=ALL, cols=ALL)
    for top in range(0, rows, height):
        for left in range(0, cols, width):
            across, down = slice(left, left + width), slice(top, top + height)
            add_deltas(parts[down, across], deltas, rows=down, cols=across)
    # Not bit for bit: a product of few rows takes another kernel. Blocks have one size everywhere for that reason.
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 24), st.integers(0, 60))
def test_equal_blocks_have_equal_bits_whatever_the_buffers(rows: int, cols: int, r: int, top: int) -> None:
    first, second = factors(rows + top, cols, r), factors(rows + top, cols, r)
    block = torch.randn(rows * cols)
    roomy = torch.full((rows * cols + 1000,), torch.nan)
    roomy[: rows * cols] = block
    add_deltas(block.view(rows, cols), (first,), rows=slice(top, top + rows), cols=ALL)
    add_deltas(roomy[: rows * cols].view(rows, cols), (second,), rows=slice(top, top + rows), cols=ALL)
    assert torch.equal(roomy[: rows * cols], block)


@SHAPES
def test_bands_of_many_rows_give_the_bits_of_the_whole(rows: int, cols: int) -> None:
    factor, whole = factors(4 * rows, cols, 16), torch.randn(4 * rows, cols)
    bands = whole.clone()
    add_deltas(whole, (factor,), rows=ALL, cols=ALL)
    for top in range(0, 4 * rows, rows):
        add_deltas(bands[top : top + rows], (factor,), rows=slice(top, top + rows), cols=ALL)
    assert torch.equal(bands, whole)


def test_deltas_are_added_in_float32_even_where_bfloat16_would_lose_them() -> None:
    tiny = Factors(a=torch.full((1, 1, 8), 2.0**-10), b=torch.ones(1, 4, 1), scaling=1.0)
    weight = torch.ones(4, 8)
    add_deltas(weight, (tiny,) * 16, rows=ALL, cols=ALL)
    assert torch.equal(weight, torch.full((4, 8), 1 + 2.0**-6))


def test_a_zero_b_leaves_every_bit_unchanged() -> None:
    factor = factors(8, 12, 3)
    weight = torch.randn(8, 12)
    before = weight.clone()
    add_deltas(weight, (Factors(a=factor.a, b=torch.zeros_like(factor.b), scaling=2.0),), rows=ALL, cols=ALL)
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


@SHAPES
@pytest.mark.parametrize(("r", "scaling"), [(1, 2.0), (4, -0.3), (48, 1e-4)])
def test_the_norm_of_a_delta_is_that_of_the_product(rows: int, cols: int, r: int, scaling: float) -> None:
    factor = factors(rows, cols, r, scaling=scaling)
    direct = float(torch.linalg.norm(scaling * (factor.b[0].double() @ factor.a[0].double())))
    assert delta_norm(factor) == pytest.approx(direct, rel=1e-9)


def test_the_norm_of_a_delta_that_cancels_is_zero_and_never_nan() -> None:
    row = torch.randn(1, 16)
    factor = Factors(a=torch.cat([row, -row])[None], b=torch.ones(1, 8, 2), scaling=3.0)
    assert delta_norm(factor) == pytest.approx(0.0, abs=1e-6)
