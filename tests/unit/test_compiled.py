"""Compiled kernels: the bits of a merged block depend on its values alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distmerge.numerics import compiled, nf4
from distmerge.numerics.compiled import Product, add_product, merge_block, panels_of, unpack_codes

pytestmark = pytest.mark.skipif(compiled.arithmetic("cpu") == "torch", reason="installed without a C compiler")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PAIRS = pytest.mark.parametrize(("base_dtype", "out_dtype"), [(b, o) for b in DTYPES for o in DTYPES], ids=str)
LEVELS = compiled._levels()


@pytest.fixture(autouse=True, params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every law holds with each level of instructions that this machine has."""
    monkeypatch.setattr(compiled, "_levels", lambda: (request.param,))
    compiled._function.cache_clear()
    yield
    compiled._function.cache_clear()


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def product_of(a: Tensor, b: Tensor, scaling: float) -> Product:
    panels = panels_of(a[None])
    assert panels is not None
    return Product(b=b, panels=panels[0], scaling=scaling)


def chained(base: Tensor, product: Product, cols: int) -> Tensor:
    """Every element by one fused operation after another: float64 holds a product of two float32 exactly, and so its
    sum with a third where their exponents are near, as they are here."""
    a = product.panels.transpose(0, 1).reshape(product.panels.shape[1], -1)[:, :cols].double()
    total = torch.zeros(len(base), cols, dtype=torch.float32)
    for k in range(len(a)):
        total = (total.double() + product.b[:, k, None].double() * a[k]).float()
    return (base.double() + total.double() * torch.tensor(product.scaling).float().double()).float()


@PAIRS
@pytest.mark.parametrize(
    ("rows", "cols", "r"), [(1, 1, 1), (3, 5, 2), (8, 32, 4), (13, 77, 16), (21, 300, 70), (9, 64, 256)]
)
def test_a_merged_element_is_a_chain_of_fused_operations_rounded_once(
    rows: int, cols: int, r: int, base_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    base = random(rows, cols, seed=1, size=0.02).to(base_dtype)
    product = product_of(random(r, cols, seed=2), random(rows, r, seed=3, size=0.01), 1.7)
    out, work = torch.empty(rows, cols, dtype=out_dtype), torch.empty(rows, cols)
    found = merge_block(base, product, out, work=work)
    assert found is not None
    assert torch.equal(work, chained(base.float(), product, cols))
    assert torch.equal(out, work.to(out_dtype))
    w, delta, left = base.double(), work.double() - base.double(), out.double() - base.double()
    sums = [(w * w).sum(), (delta * delta).sum(), (left * left).sum(), (delta * left).sum()]
    assert found == pytest.approx([*map(float, sums), int((left == 0).sum()), float(delta.abs().max())], rel=1e-4)
    again = torch.empty_like(out)
    assert merge_block(base, product, again) == found
    assert torch.equal(again, out)


def test_rows_and_columns_have_the_same_bits_in_blocks_of_any_shape() -> None:
    base, a, b = random(37, 192, seed=1).bfloat16(), random(24, 192, seed=2), random(37, 24, seed=3)
    product = product_of(a, b, 0.3)
    whole = base.float()
    add_product(whole, product)
    for top, bottom in ((0, 1), (1, 4), (4, 13), (13, 37)):
        for left, right in ((0, 32), (32, 192)):
            part = base[top:bottom, left:right].contiguous()
            inner = Product(b=b[top:bottom], panels=product.panels[left // 32 : right // 32], scaling=0.3)
            out, work = torch.empty_like(part), torch.empty(part.shape)
            merge_block(part, inner, out, work=work)
            assert torch.equal(work, whole[top:bottom, left:right])
    strided = base.float()
    add_product(strided[5:30, 64:160], Product(b=b[5:30], panels=product.panels[2:5], scaling=0.3))
    assert torch.equal(strided[5:30, 64:160], whole[5:30, 64:160])
    assert torch.equal(strided[:5], base[:5].float())
    assert torch.equal(strided[:, 160:], base[:, 160:].float())


def test_all_levels_of_instructions_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    base, a, b = random(19, 131, seed=1).half(), random(33, 131, seed=2), random(19, 33, seed=3)
    found = []
    for level in LEVELS:
        monkeypatch.setattr(compiled, "_levels", lambda level=level: (level,))
        compiled._function.cache_clear()
        out = torch.empty_like(base)
        merge_block(base, product_of(a, b, 0.1), out)
        found.append(out)
    assert all(torch.equal(out, found[0]) for out in found)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_every_value_is_rounded_as_torch_rounds_it(out_dtype: torch.dtype) -> None:
    """Of all float32 numbers those with few bits set, and their neighbours: ties, subnormals and the largest ones."""
    exponents, tails = torch.arange(256) << 23, torch.tensor([0, 1, 2, 3, 5, 7, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000])
    tails = torch.cat([tails, torch.tensor([0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x18001, 0x7FFFFF, 0x7FF000])])
    bits = (exponents[:, None] + tails).view(-1)
    values = torch.cat([bits, bits + (1 << 31)]).to(torch.int64)
    values = torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32).view(torch.float32)
    values = values[~values.isnan()][None]
    nothing = product_of(torch.zeros(1, values.shape[1]), torch.zeros(1, 1), 0.0)
    out = torch.empty(values.shape, dtype=out_dtype)
    merge_block(values, nothing, out)
    expected = (values + 0.0).to(out_dtype)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_stored_value_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    base = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    base = base[~base.isnan()].view(1, -1)
    out = torch.empty(base.shape)
    merge_block(base, product_of(torch.zeros(1, base.shape[1]), torch.zeros(1, 1), 1.0), out)
    assert torch.equal(out, base.float())


@PAIRS
def test_what_is_not_finite_is_in_the_sums(base_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        base = torch.ones(9, 70, dtype=base_dtype)
        base[8, 69] = bad
        found = merge_block(
            base, product_of(torch.ones(2, 70), torch.ones(9, 2), 1.0), torch.empty(9, 70, dtype=out_dtype)
        )
        assert found is not None
        assert not math.isfinite(sum(found[:3]))


def test_overflow_of_the_output_is_in_the_sums() -> None:
    base = torch.full((1, 40), 60000.0)
    product = product_of(torch.full((1, 40), 100.0), torch.full((1, 1), 100.0), 1.0)
    found = merge_block(base, product, torch.empty(1, 40, dtype=torch.float16))
    assert found is not None
    assert found[2] == math.inf


@pytest.mark.parametrize(
    "change",
    [
        lambda p: Product(b=p.b[:-1], panels=p.panels, scaling=1.0),
        lambda p: Product(b=p.b.T, panels=p.panels, scaling=1.0),
        lambda p: Product(b=p.b, panels=p.panels[:1], scaling=1.0),
        lambda p: Product(b=p.b, panels=p.panels[..., :31], scaling=1.0),
        lambda p: Product(b=p.b.double(), panels=p.panels, scaling=1.0),
        lambda p: Product(b=p.b[:, :0].contiguous(), panels=p.panels[:, :0].contiguous(), scaling=1.0),
    ],
)
def test_factors_that_do_not_fit_are_refused(change: object) -> None:
    product = product_of(random(4, 64), random(4, 4), 1.0)
    assert callable(change)
    with pytest.raises(ValueError, match="fit"):
        merge_block(torch.zeros(4, 64), change(product), torch.zeros(4, 64))
    with pytest.raises(ValueError, match="rows"):
        merge_block(torch.zeros(4, 64), product, torch.zeros(64, 4).T)
    with pytest.raises(ValueError, match="float64"):
        add_product(torch.zeros(4, 64, dtype=torch.float64), product)


def test_large_factors_empty_ones_and_other_dtypes_are_left_to_torch() -> None:
    for shape in ((1, 0, 8), (1, 4, 0), (0, 4, 8)):
        assert panels_of(torch.zeros(shape)) is None
    assert panels_of(torch.zeros(1, compiled.LARGEST_R + 1, 8)) is None
    assert panels_of(torch.zeros(1, 4, 8, dtype=torch.float64)) is None
    product = product_of(torch.zeros(1, 8), torch.zeros(2, 1), 1.0)
    assert merge_block(torch.zeros(2, 8, dtype=torch.float64), product, torch.zeros(2, 8)) is None


def four_bit(first: int, numel: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of elements [first, first + numel)."""
    generator = torch.Generator().manual_seed(first + numel)
    nbytes, blocks = (first + numel + 1) // 2 - first // 2, (first + numel - 1) // blocksize + 1 - first // blocksize
    codes = torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8)
    return codes, torch.randn(blocks, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_an_unpacked_element_is_its_code_times_its_blocks_scale_rounded_once(
    blocksize: int, kind: str, dtype: torch.dtype
) -> None:
    table = nf4.TABLES[kind]
    for first in (0, 1, 32, 63, 64, 77, 1000):
        for numel in (1, 2, 31, 32, 64, 65, 1000, 2048):
            codes, scales = four_bit(first, numel, blocksize)
            index = first % 2 + torch.arange(numel)
            each = torch.where(index % 2 == 0, codes[index // 2] >> 4, codes[index // 2] & 15)
            block = (first + torch.arange(numel)) // blocksize - first // blocksize
            out = torch.full((numel + 4,), 7.0, dtype=dtype)
            assert unpack_codes(codes, nf4.pair_table(table), scales, out[:numel], first=first, blocksize=blocksize), (
                "not compiled"
            )
            assert torch.equal(out[:numel], (table[each.int()] * scales[block]).to(dtype))
            assert out[numel:].tolist() == [7.0] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scale_or_a_code_that_is_not_finite_is_left_to_torch(value: float) -> None:
    codes, scales = four_bit(0, 128, 64)
    out = torch.full((128,), 7.0, dtype=torch.bfloat16)
    table = nf4.NF4.clone()
    table[3] = value
    assert not unpack_codes(codes, nf4.pair_table(table), scales, out, first=0, blocksize=64)
    scales[1] = value
    assert not unpack_codes(codes, nf4.pair_table(nf4.NF4), scales, out, first=0, blocksize=64)
    assert (out == 7).all()


def test_codes_and_scales_of_other_lengths_or_dtypes_are_refused() -> None:
    codes, scales = four_bit(0, 128, 64)
    table, out = nf4.pair_table(nf4.NF4), torch.empty(128)
    for wrong in (
        (codes[:-1], table, scales),
        (codes, table, scales[:-1]),
        (codes, table[:-1], scales),
        (codes.int(), table, scales),
        (codes, table.float(), scales),
        (codes, table, scales.double()),
    ):
        with pytest.raises(ValueError, match="scales"):
            unpack_codes(*wrong, out, first=0, blocksize=64)
    assert not unpack_codes(codes, table, scales, out.double(), first=0, blocksize=64)
