"""What is left of a change: sums against float64, singular values against those of the dense delta."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from distmerge.numerics import compiled, survival
from distmerge.numerics.apply import Loaded, apply_changes
from distmerge.numerics.lora import Factors
from distmerge.numerics.spectrum import whole_of
from distmerge.numerics.survival import Sums, measure, squared, summarize, survival_of, total


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every law holds with the compiled sums and without them."""
    if request.param == "torch":
        monkeypatch.setattr(survival, "measure_block", lambda *blocks: None)
    elif compiled.arithmetic("cpu") == "torch":
        pytest.skip("installed without a C compiler")


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def scratch(numel: int) -> tuple[Tensor, Tensor]:
    return torch.full((numel,), torch.nan), torch.full((numel,), torch.nan)


def exact(base: Tensor, delta: Tensor, out: Tensor) -> dict[str, float]:
    """The sums, one element at a time."""
    rows = list(zip(base.double().tolist(), delta.double().tolist(), out.double().tolist(), strict=True))
    return {
        "unchanged": sum(o == w for w, _, o in rows),
        "largest_delta": max(abs(d) for _, d, _ in rows),
        "base_squared": math.fsum(w * w for w, _, _ in rows),
        "delta_squared": math.fsum(d * d for _, d, _ in rows),
        "applied_squared": math.fsum((o - w) ** 2 for w, _, o in rows),
        "product": math.fsum((o - w) * d for w, d, o in rows),
    }


def block(dtype: torch.dtype, *, size: float, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Base, float32 sum and rounded sum of 1000 elements, some of which are zero or get nothing added."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(1000, generator=generator) * size).to(dtype)
    base[::50] = 0
    added = torch.randn(1000, generator=generator) * delta
    added[::7] = 0
    work = base.float() + added
    return base, work, work.to(dtype)


@DTYPES
@pytest.mark.parametrize("delta", [1e-1, 1e-4])
@pytest.mark.parametrize("step", [1, 300, 1000, 4096])
def test_the_sums_of_a_block_are_those_of_float64(dtype: torch.dtype, delta: float, step: int) -> None:
    base, work, out = block(dtype, size=0.02, delta=delta)
    expected = exact(base, work.double() - base.double(), out)
    found = asdict(measure(base, work.clone(), out, scratch(step)))
    assert found["numel"] == 1000
    assert found["unchanged"] == expected["unchanged"] > 0
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    again = asdict(survival_of(base, work.double() - base.double(), out))
    assert {key: again[key] for key in expected} == pytest.approx(expected, rel=1e-12)


@DTYPES
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 17, 4096, 10_007])
def test_the_sums_are_those_of_float64_for_every_pair_of_dtypes(
    dtype: torch.dtype, out_dtype: torch.dtype, numel: int
) -> None:
    generator = torch.Generator().manual_seed(numel)
    sizes = 10.0 ** torch.randint(-9, 3, (numel,), generator=generator)
    base = (torch.randn(numel, generator=generator) * sizes).to(dtype)
    work = base.float() * 1.01
    out = work.to(out_dtype)
    expected = asdict(survival_of(base, work.double() - base.double(), out))
    found = asdict(measure(base, work.clone(), out, scratch(4096)))
    assert found["unchanged"] == expected["unchanged"]
    known = {key: value for key, value in expected.items() if value is not None}
    assert {key: found[key] for key in known} == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e30])
def test_not_more_is_in_float64_at_once_than_the_scratch_holds(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def noted(base: Tensor, delta: Tensor, out: Tensor) -> Sums:
        lengths.append(len(base))
        return survival_of(base, delta, out)

    monkeypatch.setattr(survival, "survival_of", noted)
    base, work, out = block(torch.bfloat16, size=size, delta=size / 30)
    step = len(base) // 3
    measure(base, work, out, scratch(step))
    assert sum(lengths) == len(base)
    assert max(lengths) == step


@pytest.mark.parametrize("size", [1e-25, 1e30])
def test_sums_that_float32_cannot_hold_are_those_of_float64(size: float) -> None:
    base, work, out = block(torch.bfloat16, size=size, delta=size / 30)
    expected = exact(base, work.double() - base.double(), out)
    found = asdict(measure(base, work.clone(), out, scratch(256)))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert found["applied_squared"] > 0


@pytest.mark.parametrize("where", ["base", "out"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sums_over_values_that_are_not_finite_say_so(where: str, value: float) -> None:
    base, work, out = block(torch.bfloat16, size=0.02, delta=0.01)
    assert measure(base, work.clone(), out, scratch(300)).is_finite
    {"base": base, "out": out}[where][777] = value
    assert not measure(base, work, out, scratch(300)).is_finite


def test_the_sums_of_a_tensor_do_not_depend_on_the_order_of_its_parts() -> None:
    one = measure(*block(torch.bfloat16, size=1.0, delta=0.1), scratch(1000))
    parts = [replace(one, product=value, base_squared=abs(value)) for value in (1e16, 1.0, -1e16, 1.0, 0.1)]
    assert {total(order) for order in permutations(parts)} == {total(parts)}
    assert total(parts).product == math.fsum([1.0, 1.0, 0.1])
    assert total(parts).numel == 5000


@DTYPES
def test_norms_cosine_and_shares_are_those_of_the_dense_tensors(dtype: torch.dtype) -> None:
    base, work, out = block(dtype, size=0.02, delta=1e-4)
    delta, applied = work.double() - base.double(), out.double() - base.double()
    found = summarize(measure(base, work.clone(), out, scratch(300)))
    assert found.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert found.applied_norm == pytest.approx(float(applied.norm()), rel=1e-5)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(delta, applied, dim=0)), abs=1e-5)
    assert found.kept == pytest.approx(float(delta @ applied / (delta @ delta)), rel=1e-4)
    assert found.noise == pytest.approx(float((applied - delta).norm() / delta.norm()), abs=1e-3)
    assert found.unchanged == pytest.approx(float((out == base).double().mean()), rel=1e-6)


def test_nothing_added_has_no_share_and_of_all_that_is_lost_nothing_is_left() -> None:
    base = torch.ones(8, dtype=torch.bfloat16)
    nothing = summarize(measure(base, base.float(), base, scratch(8)))
    assert (nothing.cosine, nothing.kept, nothing.noise, nothing.unchanged) == (None, None, None, 1.0)
    lost = summarize(measure(base, base.float() + 1e-4, base, scratch(8)))
    assert (lost.cosine, lost.kept, lost.noise, lost.unchanged) == (None, 0.0, 1.0, 1.0)
    assert lost.delta_norm == pytest.approx(1e-4 * math.sqrt(8), rel=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1.0, 1e18, 1e25, 3e38])
def test_a_sum_of_squares_is_that_of_float64_whatever_the_size(size: float) -> None:
    values = (torch.rand(70_000, generator=torch.Generator().manual_seed(0)) - 0.5) * size
    assert squared(values) == pytest.approx(math.fsum(value * value for value in values.tolist()), rel=1e-5, abs=0.0)


def test_errors_of_rounding_on_purpose_are_summed_where_they_are_known() -> None:
    known = Sums(
        numel=1,
        unchanged=0,
        largest_delta=1.0,
        base_squared=1.0,
        delta_squared=1.0,
        applied_squared=1.0,
        product=1.0,
        quant_squared=9.0,
    )
    found = summarize(total([known, known, known, known]))
    assert (found.quant_error, found.pack_error) == (6.0, None)


# -- singular values


def change(
    shape: tuple[int, int],
    r: int,
    *,
    seed: int,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    matrices: tuple[int, int] = (0, 1),
    scaling: float = 1.5,
) -> Loaded:
    """A product of random factors on a part of each of `matrices`, of `shape`."""
    rows, cols = rows or (0, shape[0]), cols or (0, shape[1])
    count, generator = matrices[1] - matrices[0], torch.Generator().manual_seed(seed)
    a = torch.randn(count, r, cols[1] - cols[0], generator=generator)
    b = torch.randn(count, rows[1] - rows[0], r, generator=generator)
    return Loaded(
        height=shape[0],
        matrices=matrices,
        rows=rows,
        cols=cols,
        factors=Factors(a=a, b=b, scaling=scaling),
        tensors={},
        options={},
        weight=1.0,
        transposed=False,
    )


def dense(changes: tuple[Loaded, ...], shape: tuple[int, int], *, count: int = 1) -> Tensor:
    """The deltas (count, rows, cols), float64."""
    wide = [
        Loaded(
            **{
                **{name: getattr(one, name) for name in one.__slots__},
                "factors": Factors(a=f.a.double(), b=f.b.double(), scaling=f.scaling),
            }
        )
        for one in changes
        if (f := one.factors) is not None
    ]
    whole = torch.zeros(count * shape[0], shape[1], dtype=torch.float64)
    apply_changes(whole, tuple(wide), top=0, left=0)
    return whole.view(count, *shape)


@pytest.mark.parametrize("r", [1, 4, 16, 40])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (6, 90)])
def test_singular_values_are_those_of_the_dense_delta(shape: tuple[int, int], r: int) -> None:
    changes = (change(shape, r, seed=0, scaling=-0.7),)
    expected = torch.linalg.svdvals(dense(changes, shape)[0])[: min(16, r)]
    assert len(whole_of(changes, max_r=64).singular) == min(16, r)
    assert whole_of(changes, max_r=64).singular[: len(expected)] == pytest.approx(expected.tolist(), rel=1e-8)


def test_singular_values_of_several_changes_are_those_of_their_sum_wherever_they_lie() -> None:
    shape = (60, 70)
    changes = (
        change(shape, 3, seed=0),
        change(shape, 2, seed=1, rows=(10, 30), scaling=-2.0),
        change(shape, 4, seed=2, rows=(25, 60), cols=(5, 50)),
        change(shape, 1, seed=3, rows=(0, 8), cols=(60, 70)),
    )
    expected = torch.linalg.svdvals(dense(changes, shape)[0])[:10]
    assert whole_of(changes, max_r=10).singular == pytest.approx(expected.tolist(), rel=1e-8)


def test_singular_values_of_a_stack_are_the_root_mean_square_over_its_changed_matrices() -> None:
    shape = (20, 30)
    changes = (change(shape, 3, seed=0, matrices=(1, 5)), change(shape, 2, seed=1, matrices=(2, 3)))
    stack = torch.linalg.svdvals(dense(changes, shape, count=6)[1:5])[:, :5]
    expected = stack.square().mean(0).sqrt().tolist()
    assert whole_of(changes, max_r=5).singular == pytest.approx(expected, rel=1e-8)


def test_values_that_gram_matrices_cannot_tell_from_zero_are_zero() -> None:
    one = change((40, 50), 3, seed=0)
    assert one.factors is not None
    one.factors.b[:, :, 2] = one.factors.b[:, :, 1]
    found = whole_of((one,), max_r=3).singular
    assert found[2] == 0.0
    assert found[1] > 0


def test_there_are_no_singular_values_beyond_the_largest_r_and_for_operators() -> None:
    product = change((10, 20), 3, seed=0)
    operator = Loaded(**{**{name: getattr(product, name) for name in product.__slots__}, "factors": None})
    assert whole_of((product, product), max_r=5).singular == ()
    assert len(whole_of((product, product), max_r=6).singular) == 6
    assert whole_of((product, operator), max_r=64).singular == ()
    assert whole_of((), max_r=64).singular == ()
