"""Merged weights as functions of vectors: what a probe tells of a tensor, for every place a change may have in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmerge.numerics.apply import Loaded
from distmerge.numerics.lora import Factors
from distmerge.numerics.probing import NUM_RANDOM, Response, respond, respond_to_given, used_of_bound, vectors_for

MATRICES, HEIGHT, COLS = 3, 20, 32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def change(matrices: tuple[int, int], rows: tuple[int, int], cols: tuple[int, int], *, seed: int) -> Loaded:
    n, out, width = (last - first for first, last in (matrices, rows, cols))
    factors = Factors(a=random(n, 3, width, seed=seed), b=random(n, out, 3, seed=seed + 1), scaling=0.07)
    return Loaded(
        height=HEIGHT, matrices=matrices, rows=rows, cols=cols, factors=factors, tensors={}, options={}, weight=1.0,
        transposed=False,
    )  # fmt: skip


CHANGES = {
    "whole": (change((0, 3), (0, 20), (0, 32), seed=1),),
    "one matrix": (change((1, 2), (0, 20), (0, 32), seed=3),),
    "parts of rows and columns": (change((0, 3), (4, 11), (6, 30), seed=5),),
    "several": (change((0, 3), (0, 10), (0, 32), seed=7), change((0, 2), (10, 20), (8, 32), seed=9)),
}


def delta_of(changes: tuple[Loaded, ...]) -> Tensor:
    """The whole delta, put together by hand."""
    total = torch.zeros(MATRICES, HEIGHT, COLS, dtype=torch.float64)
    for one in changes:
        assert one.factors is not None
        for number, matrix in enumerate(range(*one.matrices)):
            product = one.factors.scaling * one.factors.b[number] @ one.factors.a[number]
            total[matrix, slice(*one.rows), slice(*one.cols)] += product
    return total


def probed(base: Tensor, stored: Tensor, changes: tuple[Loaded, ...], *, step: int = 60) -> Response:
    generator = torch.Generator().manual_seed(0)
    vectors = vectors_for(changes, MATRICES, COLS, generator)
    flat, held = base.view(-1, COLS), stored.view(-1, COLS)
    parts = [respond(flat[n : n + step], held[n : n + step], changes, vectors, top=n) for n in range(0, 60, step)]
    return sum(parts, Response())


@pytest.mark.parametrize("step", [60, 13, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CHANGES)
def test_what_was_rounded_once_is_clear_and_its_coefficient_is_the_projection(
    name: str, dtype: torch.dtype, step: int
) -> None:
    base, delta = random(MATRICES, HEIGHT, COLS).to(dtype).double(), delta_of(CHANGES[name])
    stored = (base + delta).to(dtype)
    found = probed(base, stored, CHANGES[name], step=step)
    projection = float(((stored.double() - base) * delta).sum() / delta.square().sum())
    assert found.coefficient == pytest.approx(projection, rel=1e-9)
    assert found.delta == pytest.approx(float(delta.square().sum()), rel=1e-9)
    assert not found.is_doubtful
    assert 0 < found.bound_used < 1
    assert found.numel == base.numel()


@pytest.mark.parametrize("times", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", CHANGES)
def test_a_delta_that_was_not_added_once_is_doubted(name: str, times: float) -> None:
    base, delta = random(MATRICES, HEIGHT, COLS).bfloat16().double(), delta_of(CHANGES[name])
    found = probed(base, (base + times * delta).bfloat16(), CHANGES[name])
    assert found.is_doubtful
    assert found.coefficient == pytest.approx(times, abs=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 40.0])
def test_one_value_that_is_far_off_is_doubted(value: float) -> None:
    base, changes = random(MATRICES, HEIGHT, COLS).bfloat16().double(), CHANGES["whole"]
    stored = (base + delta_of(changes)).bfloat16()
    stored[2, 3, 4] = value
    assert probed(base, stored, changes).is_doubtful


def test_the_random_vectors_are_those_of_the_generator_and_the_others_a_basis() -> None:
    vectors = vectors_for(CHANGES["several"], MATRICES, COLS, torch.Generator().manual_seed(4)).columns
    again = vectors_for(CHANGES["several"], MATRICES, COLS, torch.Generator().manual_seed(4)).columns
    assert torch.equal(vectors, again)
    for matrix, rank in enumerate((6, 6, 3)):
        basis = vectors[matrix, :, NUM_RANDOM:]
        gram = basis.T @ basis
        assert torch.allclose(gram, torch.diag((torch.arange(6) < rank).double()), atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True], ids=["out x in", "in x out"])
@pytest.mark.parametrize("step", [60, 7])
@pytest.mark.parametrize("name", CHANGES)
def test_given_vectors_get_the_layers_own_output_its_error_and_a_bound(name: str, step: int, transposed: bool) -> None:
    base, delta = random(MATRICES, HEIGHT, COLS).bfloat16().double(), delta_of(CHANGES[name])
    stored = (base + delta).bfloat16()
    x = random(HEIGHT if transposed else COLS, 5, seed=3)
    ways = (base + delta, stored.double())
    right, merged = (torch.cat([(w.T if transposed else w) @ x for w in way]) for way in ways)
    sums = torch.zeros(3, *right.shape, dtype=torch.float64)
    for top in range(0, 60, step):
        rows = slice(top, top + step)
        flat, held = base.view(-1, COLS)[rows], stored.view(-1, COLS)[rows]
        for first, part in respond_to_given(flat, held, CHANGES[name], x, top=top, transposed=transposed):
            sums[:, first : first + part.shape[1]] += part
    error, reference, allowed = sums
    assert torch.allclose(reference, right, atol=1e-12)
    assert torch.allclose(error, merged - right, atol=1e-12)
    assert 0 < used_of_bound(error, allowed) <= 1
