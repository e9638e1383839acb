"""Claiming: every segment in exactly one group, whatever the number of nodes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from distmerge.claim import claim_order, claims
from distmerge.layout import pack_shards
from distmerge.world import Place, World
from tests.factories import plan_of, wanted

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=12)
LIMIT = st.sampled_from([1, 10**7, 10**8, 10**12])


def plan_with(sizes: list[int], limit: int) -> Any:
    """A plan of matrices of `sizes` million elements."""
    return plan_of(pack_shards([wanted(f"t{i}", (n * 1000, 1000), r=2) for i, n in enumerate(sizes)], limit))


@pytest.mark.parametrize("num_nodes", [1, 3])
@given(sizes=SIZES, limit=LIMIT)
def test_every_segment_is_in_exactly_one_group(num_nodes: int, sizes: list[int], limit: int) -> None:
    plan = plan_with(sizes, limit)
    groups = claim_order(plan, num_nodes)
    assert sorted(number for group in groups for number in group) == list(range(len(plan.segments)))


@given(SIZES, LIMIT)
def test_across_nodes_no_file_is_shared_by_two_groups(sizes: list[int], limit: int) -> None:
    plan = plan_with(sizes, limit)
    files = [{plan.segments[number].file for number in group} for group in claim_order(plan, 3)]
    assert all(len(group) == 1 for group in files)
    assert len(files) == len(plan.files)


@pytest.mark.parametrize("num_nodes", [1, 3])
@given(sizes=SIZES, limit=LIMIT)
def test_the_largest_groups_come_first(num_nodes: int, sizes: list[int], limit: int) -> None:
    plan = plan_with(sizes, limit)
    nbytes = [sum(plan.segments[n].nbytes for n in group) for group in claim_order(plan, num_nodes)]
    assert all(one >= other for one, other in pairwise(nbytes))


@pytest.mark.parametrize("places", [[(0, 2, 2), (1, 2, 2)], [(0, 3, 1), (1, 3, 1), (2, 3, 1)]], ids=["1node", "3nodes"])
def test_ranks_that_take_turns_get_each_segment_once(places: list[tuple[int, int, int]]) -> None:
    plan, store = plan_with([300, 20, 150, 90], 10**8), HashStore()
    worlds = [
        World(Place(rank=rank, size=size, local_rank=0, local_size=local), store, timeout=60)
        for rank, size, local in places
    ]
    shares, taken = [claims(plan, world) for world in worlds], []
    while shares:
        for share in list(shares):
            number = next(share, None)
            shares.remove(share) if number is None else taken.append(number)
    assert sorted(taken) == list(range(len(plan.segments)))
    assert len(taken) > len(places)
