"""Balance, simulated: real claims over real segments, ranks of any speed, one node."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balance import simulate
from benchmarks.shapes import DEEPSEEK_SHARD, HUB_SHARD, SHAPES, cut_shards
from distmerge.layout import pack_shards
from tests.factories import plan_of, wanted

SIZES = st.lists(st.integers(1, 600), min_size=1, max_size=14)
SPEEDS = st.lists(st.sampled_from([1.0, 0.9, 0.5, 0.4, 0.1]), min_size=1, max_size=64)


@given(SIZES, st.sampled_from([10**7, 10**8, 10**9, 10**12]), SPEEDS)
@settings(max_examples=60)
def test_the_last_rank_ends_within_one_segment_of_the_first(sizes: list[int], limit: int, speeds: list[float]) -> None:
    plan = plan_of(pack_shards([wanted(f"t{i}", (n * 1000, 1000)) for i, n in enumerate(sizes)], limit))
    found = simulate(plan, speeds)
    assert sorted(number for mine in found.done for number in mine) == list(range(len(plan.segments)))
    idle = 1e-3 * (len(plan.files) + len(speeds))  # turns of counters that find nothing left
    assert (max(found.ends) - min(found.ends)) <= found.longest + idle


def _plan(model: str, shard_nbytes: float) -> Any:
    shards = cut_shards(SHAPES[model].tensors(), shard_nbytes)
    return plan_of({f"{i:05}": [wanted(name, shape) for name, _, shape in shard] for i, shard in enumerate(shards)})


@pytest.mark.parametrize(
    ("model", "shard_nbytes", "floor"),
    [
        ("8B", HUB_SHARD, {8: 0.95, 64: 0.85}),
        ("8B", 1e12, {8: 0.95, 64: 0.85}),
        ("70B", 50e9, {8: 0.98, 64: 0.93}),
        ("405B", HUB_SHARD, {8: 0.98, 64: 0.97}),
    ],
)
def test_real_models_keep_all_ranks_of_a_node_busy_in_few_files_and_in_many(
    model: str, shard_nbytes: float, floor: dict[int, float]
) -> None:
    plan = _plan(model, shard_nbytes)
    for num_ranks, least in floor.items():
        assert simulate(plan, [1.0] * num_ranks).efficiency > least


@pytest.mark.parametrize("model", ["8B", "70B", "405B"])
def test_segments_are_of_16_to_128_mib_and_of_equal_size_but_for_the_ends_of_files(model: str) -> None:
    plan = _plan(model, DEEPSEEK_SHARD)
    sizes = sorted(segment.nbytes for segment in plan.segments)
    typical = sizes[len(sizes) // 2]
    assert 15 << 20 <= typical <= 130 << 20
    assert sizes[-1] < 1.1 * typical
    assert sum(size < 0.9 * typical for size in sizes) <= len(plan.files)
