"""Which rank does which segment: atomic counters over lists that every rank derives from the plan alone."""

from __future__ import annotations

from collections.abc import Iterator

from distmerge.plan import Plan
from distmerge.world import World


def file_order(plan: Plan) -> list[int]:
    """The numbers of the output files in the order in which they are taken: largest first, equal ones as they stand."""
    return sorted(range(len(plan.files)), key=lambda number: -plan.files[number].nbytes)


def claims(plan: Plan, world: World) -> Iterator[int]:
    """The numbers of the segments that this rank gets: over all ranks each number exactly once.

    A rank takes a file and claims its segments in the order of their bytes, so that one file after another is whole
    and can be hashed while others are written. When none is left to take it helps with those that were taken last,
    which have most left, until no segment is left. Across nodes a file stays on the node of the rank that took it:
    network file systems do not keep the pages of several writers of one file apart.
    """
    place, order = world.place, file_order(plan)

    def rest(file: int) -> Iterator[int]:
        segments = plan.segments_of(file)
        while (turn := world.count(f"claim/{file}") - 1) < len(segments):
            yield segments[turn]

    def taken(file: int) -> str:
        return f"taken/{place.node}/{file}"

    while (turn := world.count("take") - 1) < len(order):
        if place.num_nodes > 1:
            world.count(taken(order[turn]))
        yield from rest(order[turn])
    for file in reversed(order):
        if place.num_nodes == 1 or world.counted(taken(file)):
            yield from rest(file)
