"""Combined deltas: PEFT's own functions on the same deltas, thresholds exact in every corner, masks by name alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from distmerge.config import AdapterChoice, MergeConfig
from distmerge.errors import UsageError
from distmerge.numerics.apply import Loaded, as_rows
from distmerge.numerics.combine import (
    Combination,
    Delta,
    Part,
    choose,
    combine_changes,
    deltas_of,
    draw,
    find_thresholds,
    histograms,
    magnitude_of,
    mixed,
)
from distmerge.numerics.lora import Factors
from distmerge.numerics.methods import Combine
from distmerge.numerics.noise import recompute_combined
from distmerge.numerics.rounding import distance

WEIGHTS = (0.7, -0.4, 1.3)
SHAPE = (24, 40)


def loaded(values: Tensor, weight: float = 1.0) -> Loaded:
    """A change that adds exactly `values`: the product of the unit matrix and the values."""
    rows, cols = values.shape
    factors = Factors(a=values[None], b=torch.eye(rows, dtype=values.dtype)[None], scaling=1.0)
    return Loaded(
        height=rows,
        matrices=(0, 1),
        rows=(0, rows),
        cols=(0, cols),
        factors=factors,
        tensors={},
        options={},
        weight=weight,
        transposed=False,
    )


def parts_of(values: Sequence[Tensor]) -> tuple[Part, ...]:
    return tuple(
        Part(adapter=number, weight=WEIGHTS[number - 1], sign=1.0, changes=(loaded(each),))
        for number, each in enumerate(values, start=1)
    )


def streamed(values: Sequence[Tensor], combine: Combine, *, step: int, order: int = 1) -> tuple[int, ...]:
    """The thresholds of flat deltas that are gone through in blocks of `step` elements, forwards or backwards."""
    numel = values[0].numel()

    def counted(uppers: tuple[int, ...] | None) -> Tensor:
        blocks = [
            [Delta(adapter=n, weight=1.0, values=each.view(-1)[first : first + step]) for n, each in enumerate(values)]
            for first in range(0, numel, step)
        ]
        return torch.stack([histograms(block, uppers) for block in blocks[::order]]).sum(0)

    return find_thresholds(numel, Combination(combine=combine, name="t", parts=parts_of(values)), counted)


def combined(values: Sequence[Tensor], combine: Combine) -> Tensor:
    """What is added to a base of zeros."""
    thresholds = streamed(values, combine, step=7) if combine.prunes else ()
    combination = Combination(combine=combine, name="t", parts=parts_of(values), thresholds=thresholds)
    work = torch.zeros(SHAPE)
    combine_changes(work, combination, block=0, top=0, left=0)
    return work


def random_deltas(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(SHAPE, generator=generator) for _ in range(count)]
    assert all(each.abs().unique().numel() == each.numel() for each in values)
    return values


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("density", [0.0005, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_on_whole_deltas_it_is_what_peft_makes_of_them(method: str, density: float, count: int) -> None:
    values = random_deltas(count)
    theirs = getattr(merge_utils, method)(values, torch.tensor(WEIGHTS[:count]), max(density, 1.01 / values[0].numel()))
    ours = combined(values, Combine(method=method, density=density))
    assert torch.equal(ours != 0, theirs != 0)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_what_chance_leaves_is_combined_as_peft_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, combine = random_deltas(3), Combine(method=method, density=0.3, seed=5)
    masks = [draw(combine, adapter=n, name="t", block=0, numel=SHAPE[0] * SHAPE[1]).view(SHAPE) for n in (1, 2, 3)]
    drawn = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(drawn).float())
    theirs = getattr(merge_utils, method)(values, torch.tensor(WEIGHTS), 0.3)
    assert torch.allclose(combined(values, combine), theirs, rtol=1e-6, atol=1e-6)


def test_a_density_of_one_keeps_everything() -> None:
    values = random_deltas(2)
    total = 0.7 * values[0] - 0.4 * values[1]
    for method in ("magnitude_prune", "dare_linear"):
        assert torch.allclose(combined(values, Combine(method=method, density=1.0)), total, atol=1e-6)


def test_a_sum_of_zero_counts_as_plus_and_zeros_do_not_vote() -> None:
    first, second = torch.zeros(SHAPE), torch.zeros(SHAPE)
    first[0, :3] = torch.tensor([2.0, 1.0, 3.0])
    second[0, :3] = torch.tensor([-2.0, 0.0, 1.0])
    found = combined([first, second], Combine(method="ties", density=1.0))
    # 2 - 2 is plus: the first alone; 1 + 0: the first alone; 3 + 1: the mean of both
    assert found[0, :3].tolist() == pytest.approx([0.7 * 2, 0.7 * 1, (0.7 * 3 - 0.4 * 1) / 2])
    assert not found[1:].any()


FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 1.4e-45, -1.4e-45, 1.1754942106924411e-38, 2.0**-126, 3.4028234663852886e38]
    ),
)


@given(
    values=st.lists(FLOATS, min_size=1, max_size=60),
    density=st.floats(0.001, 1.0),
    step=st.integers(1, 70),
    order=st.sampled_from([1, -1]),
)
def test_the_threshold_is_the_kth_largest_magnitude_exactly(
    values: list[float], density: float, step: int, order: int
) -> None:
    delta = torch.tensor([values])
    k = max(1, int(density * len(values)))
    (bits,) = streamed([delta], Combine(method="ties", density=density), step=step, order=order)
    expected = float(delta.abs().view(-1).topk(k).values[-1])
    combination = Combination(
        combine=Combine(method="ties", density=density), name="t", parts=parts_of([delta]), thresholds=(bits,)
    )
    kept = choose([Delta(adapter=1, weight=1.0, values=delta)], combination, block=0).counted[0]
    if k < len(values):
        assert magnitude_of(bits) == expected
    assert torch.equal(kept, (delta.abs() >= expected) & (delta != 0))  # ties, of which zeros are no part


def test_elements_of_the_same_magnitude_as_the_threshold_are_all_kept() -> None:
    delta = torch.tensor([[3.0, -2.0, 2.0, 2.0, 1.0, 0.0, -1.0, 0.5]])
    (bits,) = streamed([delta], Combine(method="magnitude_prune", density=0.25), step=3)
    assert magnitude_of(bits) == 2.0
    assert int((delta.abs() >= 2.0).sum()) == 4


def test_a_large_delta_has_the_same_threshold_in_blocks_of_every_size() -> None:
    delta = torch.randn(1, 300_000, generator=torch.Generator().manual_seed(3)) * 1e-3
    expected = float(delta.abs().view(-1).topk(60_000).values[-1])
    for step in (1 << 12, 77_777, 1 << 19):
        (bits,) = streamed([delta], Combine(method="ties", density=0.2), step=step)
        assert magnitude_of(bits) == expected


def test_a_mask_goes_by_seed_adapter_tensor_and_block_and_by_nothing_else() -> None:
    def mask(seed: int = 1, adapter: int = 1, name: str = "a.weight", block: int = 0) -> Tensor:
        combine = Combine(method="dare_ties", density=0.4, seed=seed)
        return draw(combine, adapter=adapter, name=name, block=block, numel=5000)

    torch.manual_seed(11)
    forwards = [mask(block=block) for block in range(4)]
    torch.manual_seed(12)
    backwards = [mask(block=block) for block in reversed(range(4))]
    assert all(torch.equal(x, y) for x, y in zip(forwards, reversed(backwards), strict=True))
    others = [mask(), mask(seed=2), mask(adapter=2), mask(name="b.weight"), mask(block=1)]
    for number, one in enumerate(others):
        assert abs(float(one.float().mean()) - 0.4) < 0.04
        assert not any(torch.equal(one, other) for other in others[number + 1 :])


def test_the_bits_of_a_mask_are_these() -> None:
    combine = Combine(method="dare_linear", density=0.5, seed=0)
    kept = draw(combine, adapter=1, name="model.layers.0.mlp.up_proj.weight", block=0, numel=24)
    assert "".join(str(int(bit)) for bit in kept) == "101101101110110001111100"


def test_an_adapter_and_what_it_began_as_are_one_delta() -> None:
    grown, before, other = random_deltas(3)
    parts = (
        Part(adapter=1, weight=0.5, sign=1.0, changes=(loaded(grown),)),
        Part(adapter=1, weight=0.5, sign=-1.0, changes=(loaded(before),)),
        Part(adapter=3, weight=2.0, sign=1.0, changes=(loaded(other),)),
    )
    deltas, applied = deltas_of(torch.zeros(SHAPE), parts, top=0, left=0)
    assert [(delta.adapter, delta.weight) for delta in deltas] == [(1, 0.5), (3, 2.0)]
    assert torch.equal(deltas[0].values, grown - before)
    assert [one.numel for one in applied] == [grown.numel()] * 3
    alone, _ = deltas_of(torch.zeros(SHAPE), parts[1:], top=0, left=0)
    assert torch.equal(alone[0].values, -before)


def test_a_value_that_is_not_finite_is_never_pruned_away() -> None:
    values = random_deltas(2)
    values[0][3, 3] = float("nan")
    values[1][4, 4] = float("inf")
    for combine in (
        Combine(method="ties", density=0.1),
        Combine(method="magnitude_prune", density=0.1),
        Combine(method="dare_linear", density=0.001),
        Combine(method="dare_ties", density=0.001),
    ):
        deltas = [Delta(adapter=n, weight=1.0, values=each) for n, each in enumerate(values, start=1)]
        thresholds = streamed(values, combine, step=50) if combine.prunes else ()
        combination = Combination(combine=combine, name="t", parts=parts_of(values), thresholds=thresholds)
        found = mixed(deltas, choose(deltas, combination, block=0), combine)
        assert not found[3, 3].isfinite()
        assert not found[4, 4].isfinite()


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_ties", "dare_linear"])
def test_float64_with_the_decisions_of_float32_is_within_its_noise_and_has_no_room_for_others(method: str) -> None:
    values, combine = random_deltas(3, seed=4), Combine(method=method, density=0.4)
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    thresholds = streamed(values, combine, step=7) if combine.prunes else ()
    combination = Combination(combine=combine, name="t", parts=parts_of(values), thresholds=thresholds)
    wide = parts_of([each.double() for each in values])
    out = base.clone()
    combine_changes(out, combination, block=0, top=0, left=0)
    again = {"first": 0, "row_numel": SHAPE[1]}
    exact = recompute_combined(base.double().view(-1), combination, wide, block=0, **again)
    oracle, noise = exact.values, exact.noise()
    assert distance(out.view(-1), oracle, noise).num_beyond == 0
    changed = (values[0] - 3e-3).view(-1)  # far more than noise, far less than most elements
    off = out.view(-1) + 1e-2 * changed
    assert distance(off, oracle, noise).num_beyond > 0.95 * off.numel()


def test_where_float32_noise_could_decide_otherwise_either_decision_is_accepted() -> None:
    values, combine = random_deltas(1), Combine(method="magnitude_prune", density=0.5)
    (bits,) = streamed(values, combine, step=64)
    at = int((values[0].view(-1).abs() == magnitude_of(bits)).nonzero())
    combination = Combination(combine=combine, name="t", parts=parts_of(values), thresholds=(bits,))
    exact = values[0].double()
    exact.view(-1)[at] *= 1 - 1e-7  # as if float32 had rounded it up
    base = torch.zeros(exact.numel(), dtype=torch.float64)
    again = recompute_combined(base, combination, parts_of([exact]), block=0, first=0, row_numel=SHAPE[1])
    oracle, noise = again.values, again.noise()
    either = oracle.clone().float()
    either[at] = 0.0
    assert distance(either, oracle, noise).num_beyond == 0
    kept = int(oracle.abs().argmax())
    either[kept] = 0.0
    assert distance(either, oracle, noise).num_beyond == 1


def test_blocks_of_a_long_row_are_rows_of_one() -> None:
    rows, top, left = as_rows(torch.arange(6.0), 26, 10)
    assert (tuple(rows.shape), top, left) == ((1, 6), 2, 6)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"combine": "mean"}, "'mean' is none of sum, ties"),
        ({"combine": "ties"}, "'ties' needs a density"),
        ({"density": 0.5}, "a sum keeps everything"),
        ({"seed": 1}, "'sum' leaves nothing to chance"),
        ({"combine": "ties", "density": 0.5, "seed": 1}, "'ties' leaves nothing to chance"),
        *(({"combine": "dare_ties", "density": density}, "density") for density in (0.0, -0.1, 1.01, float("nan"))),
        ({"combine": "dare_ties", "density": 0.5, "seed": -1}, "seed -1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_each_other_are_usage_errors(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        MergeConfig(base=Path("b"), adapters=(AdapterChoice(folder=Path("a")),), output=Path("o"), **fields)


def test_the_options_go_to_the_ranks() -> None:
    fields: dict[str, Any] = {"combine": "dare_linear", "density": 0.1, "seed": 7}
    config = MergeConfig(base=Path("b"), adapters=(AdapterChoice(folder=Path("a")),), output=Path("o"), **fields)
    argv = config.to_argv()
    told = {name: argv[argv.index(name) + 1] for name in ("--combine", "--density", "--seed")}
    assert told == {"--combine": "dare_linear", "--density": "0.1", "--seed": "7"}
    assert "--density" not in MergeConfig(base=Path("b"), adapters=config.adapters, output=Path("o")).to_argv()
