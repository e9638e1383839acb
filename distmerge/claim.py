"""Which rank does which segment: one atomic counter over a list that every rank derives from the plan alone."""

from __future__ import annotations

from collections.abc import Iterator

from distmerge.plan import Plan
from distmerge.world import World


def claim_order(plan: Plan, num_nodes: int) -> list[tuple[int, ...]]:
    """Groups of segment numbers, largest first; a rank claims a whole group.

    On one node a group is one segment, so that ranks share files. Across nodes it is all segments of a file: network
    file systems do not keep the pages of several writers of one file apart.
    """
    if num_nodes == 1:
        groups: list[tuple[int, ...]] = [(number,) for number in range(len(plan.segments))]
    else:
        by_file: dict[int, list[int]] = {}
        for number, segment in enumerate(plan.segments):
            by_file.setdefault(segment.file, []).append(number)
        groups = [tuple(numbers) for numbers in by_file.values()]
    return sorted(groups, key=lambda group: -sum(plan.segments[number].nbytes for number in group))


def claims(plan: Plan, world: World) -> Iterator[int]:
    """The numbers of the segments that this rank gets: over all ranks each number exactly once."""
    order = claim_order(plan, world.place.num_nodes)
    while (turn := world.count("claim") - 1) < len(order):
        yield from order[turn]
