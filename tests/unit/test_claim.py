"""Claiming: every segment exactly once, one file after another, and no rank idle while a segment is left."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from distmerge.claim import claims, file_order
from distmerge.layout import pack_shards
from distmerge.world import Place, World
from tests.factories import plan_of, wanted

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=12)
LIMIT = st.sampled_from([1, 10**7, 10**8, 10**12])
NODES = st.sampled_from([(1, 1), (2, 1), (5, 1), (4, 2), (6, 3), (3, 3)])  # ranks, and nodes that they stand on


def plan_with(sizes: list[int], limit: int) -> Any:
    """A plan of matrices of `sizes` million elements."""
    return plan_of(pack_shards([wanted(f"t{i}", (n * 1000, 1000), r=2) for i, n in enumerate(sizes)], limit))


class Counters:
    """A world of which only the place and the counters are there, `store`, which all of its ranks share."""

    def __init__(self, place: Place, store: Counter[str]) -> None:
        self.place, self.store = place, store

    def count(self, name: str) -> int:
        self.store[name] += 1
        return self.store[name]

    def counted(self, name: str) -> int:
        return self.store[name]


def shares(plan: Any, num_ranks: int, num_nodes: int) -> list[Any]:
    """The claims of every rank, on counters that all share."""
    local, store = num_ranks // num_nodes, Counter[str]()
    places = [Place(rank=rank, size=num_ranks, local_rank=rank % local, local_size=local) for rank in range(num_ranks)]
    return [claims(plan, cast(World, Counters(place, store))) for place in places]


def interleaved(plan: Any, nodes: tuple[int, int], draw: Any) -> list[list[int]]:
    """What each rank gets where `draw` chooses who claims next."""
    running = dict(enumerate(shares(plan, *nodes)))
    taken: list[list[int]] = [[] for _ in running]
    while running:
        rank = draw(st.sampled_from(sorted(running)))
        number = next(running[rank], None)
        if number is None:
            del running[rank]
        else:
            taken[rank].append(number)
    return taken


@settings(max_examples=60)
@given(sizes=SIZES, limit=LIMIT, nodes=NODES, data=st.data())
def test_in_any_order_of_claims_every_segment_is_done_exactly_once(
    sizes: list[int], limit: int, nodes: tuple[int, int], data: Any
) -> None:
    plan = plan_with(sizes, limit)
    taken = interleaved(plan, nodes, data.draw)
    assert sorted(number for share in taken for number in share) == list(range(len(plan.segments)))


@settings(max_examples=60)
@given(sizes=SIZES, limit=LIMIT, nodes=NODES, data=st.data())
def test_a_file_stays_on_one_node_and_its_segments_are_claimed_in_their_order(
    sizes: list[int], limit: int, nodes: tuple[int, int], data: Any
) -> None:
    plan = plan_with(sizes, limit)
    num_ranks, num_nodes = nodes
    taken = interleaved(plan, nodes, data.draw)
    homes: dict[int, set[int]] = {}
    for rank, share in enumerate(taken):
        files = [plan.segments[number].file for number in share]
        for file in set(files):
            homes.setdefault(file, set()).add(rank // (num_ranks // num_nodes))
            mine = [number for number in share if plan.segments[number].file == file]
            assert mine == sorted(mine)
        runs = [file for file, before in zip(files, [None, *files], strict=False) if file != before]
        assert len(runs) == len(set(runs)), "a rank stays with a file until it is exhausted"
    assert all(len(nodes_of_file) == 1 for nodes_of_file in homes.values())


def finish_times(plan: Any, nodes: tuple[int, int], speeds: list[float]) -> list[float]:
    """When each rank ends if it does `speeds` bytes a second and claims anew whenever it is done."""
    running = dict(enumerate(shares(plan, *nodes)))
    clocks = [0.0] * len(running)
    while running:
        rank = min(running, key=lambda number: (clocks[number], number))
        number = next(running[rank], None)
        if number is None:
            del running[rank]
        else:
            clocks[rank] += plan.segments[number].nbytes / speeds[rank]
    return clocks


@settings(max_examples=60)
@given(sizes=SIZES, limit=LIMIT, speeds=st.lists(st.sampled_from([1.0, 0.9, 0.4, 0.1]), min_size=1, max_size=9))
def test_on_one_node_the_first_rank_ends_at_most_one_segment_before_the_last(
    sizes: list[int], limit: int, speeds: list[float]
) -> None:
    plan = plan_with(sizes, limit)
    clocks = finish_times(plan, (len(speeds), 1), speeds)
    largest = max(segment.nbytes for segment in plan.segments)
    for first in clocks:
        for last, speed in zip(clocks, speeds, strict=True):
            assert last - first <= largest / speed * (1 + 1e-9)


@given(SIZES, LIMIT)
def test_files_are_taken_from_the_largest_on_and_a_lone_rank_ends_one_before_the_next(
    sizes: list[int], limit: int
) -> None:
    plan = plan_with(sizes, limit)
    order = file_order(plan)
    assert sorted(order) == list(range(len(plan.files)))
    assert order == sorted(order, key=lambda number: (-plan.files[number].nbytes, number))
    (share,) = shares(plan, 1, 1)
    assert list(share) == [number for file in order for number in plan.segments_of(file)]


def test_threads_that_claim_from_one_store_get_each_segment_once() -> None:
    plan, store = plan_with([300, 20, 150, 90, 5, 400], 10**8), HashStore()
    taken: list[list[int]] = [[] for _ in range(4)]
    start = threading.Barrier(4)

    def work(rank: int) -> None:
        world = World(Place(rank=rank, size=4, local_rank=rank, local_size=4), store, timeout=60)
        start.wait()
        taken[rank] += claims(plan, world)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for share in taken for number in share) == list(range(len(plan.segments)))


@pytest.mark.parametrize(
    ("place", "node"),
    [((5, 8, 1, 4), 4), ((3, 8, 3, 4), 0), ((6, 7, 6, 7), 0), ((2, 3, 2, 1), 2), ((9, 12, 1, 4), 8)],
)
def test_a_node_is_named_after_its_first_rank(place: tuple[int, int, int, int], node: int) -> None:
    rank, size, local_rank, local_size = place  # a launcher that tells no local size may put each rank on its own node
    assert Place(rank=rank, size=size, local_rank=local_rank, local_size=local_size).node == node
