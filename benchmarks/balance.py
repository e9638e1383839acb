"""How evenly the work is spread: the real claims over the real segments of large models, in simulated time.

Every rank is the generator that `distmerge.claim.claims` gives it, driven in the order of simulated time: no threads,
no bytes. A segment takes its bytes by the speed of the rank, and a turn of a counter in the store its round trip.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.shapes import DEEPSEEK_SHARD, HUB_SHARD, SHAPES, write_headers, write_lora
from distmerge.claim import claims
from distmerge.config import AdapterChoice, MergeConfig
from distmerge.plan import Plan, make_plan
from distmerge.world import Place, World

STORE_SECONDS = 64e-6  # a counter's round trip, with several clients on one machine
SEGMENT_SECONDS = 0.5e-3  # of a segment's record, apart from its bytes
NBYTES_PER_SECOND = 1e9
RANKS = (1, 2, 4, 8, 16, 32, 64)
LAYOUTS: dict[str, tuple[str, float]] = {
    "8B, 4 files": ("8B", HUB_SHARD),
    "8B, 1 file": ("8B", math.inf),
    "70B, 30 files": ("70B", HUB_SHARD),
    "70B, 3 files": ("70B", 50e9),
    "405B, 191 files": ("405B", HUB_SHARD),
    "671B, 163 files": ("671B", DEEPSEEK_SHARD),
}


class SimulatedWorld:
    """The counters of a run, as one rank sees them; `num_turns` counts its round trips to the store."""

    def __init__(self, place: Place, counters: Counter[str]) -> None:
        self.place, self._counters, self.num_turns = place, counters, 0

    def count(self, name: str) -> int:
        """Adds one to the counter and returns it."""
        self.num_turns += 1
        self._counters[name] += 1
        return self._counters[name]

    def counted(self, name: str) -> int:
        """The counter."""
        self.num_turns += 1
        return self._counters[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A simulated run: when each rank ended, and which segments it did; `longest` is the time of the longest one."""

    ends: tuple[float, ...]
    done: tuple[tuple[int, ...], ...]
    longest: float
    ideal: float

    @property
    def efficiency(self) -> float:
        """The time that evenly spread work would take, as a share of the time that it took."""
        return self.ideal / max(self.ends)

    @property
    def spread(self) -> float:
        """How much later than the first the last rank ended, in segments that take longest."""
        return (max(self.ends) - min(self.ends)) / self.longest


def simulate(plan: Plan, speeds: list[float], *, ranks_per_node: int | None = None) -> Outcome:
    """A run of `plan` on ranks of these `speeds`, relative to one another, by default all on one node."""
    local, counters = ranks_per_node or len(speeds), Counter[str]()
    places = [Place(rank=r, size=len(speeds), local_rank=r % local, local_size=local) for r in range(len(speeds))]
    worlds = [SimulatedWorld(place, counters) for place in places]
    shares = [claims(plan, cast(World, world)) for world in worlds]
    ends, longest = [0.0] * len(speeds), 0.0
    done: list[list[int]] = [[] for _ in speeds]
    queue = [(0.0, rank) for rank in range(len(speeds))]
    while queue:
        now, rank = heapq.heappop(queue)
        before = worlds[rank].num_turns
        number = next(shares[rank], None)
        now += (worlds[rank].num_turns - before) * STORE_SECONDS
        if number is None:
            ends[rank] = now
            continue
        seconds = plan.segments[number].nbytes / NBYTES_PER_SECOND / speeds[rank] + SEGMENT_SECONDS
        longest = max(longest, seconds)
        done[rank].append(number)
        heapq.heappush(queue, (now + seconds, rank))
    total = sum(segment.nbytes for segment in plan.segments)
    ideal = total / NBYTES_PER_SECOND / sum(speeds)
    return Outcome(ends=tuple(ends), done=tuple(map(tuple, done)), longest=longest, ideal=ideal)


def plan_of(folder: Path, model: str, shard_nbytes: float, **options: Any) -> Plan:
    """The plan of merging a LoRA on all linears but experts into `model`, whose headers alone are in `folder`."""
    base = write_headers(folder / "base", SHAPES[model], shard_nbytes=shard_nbytes)
    adapter = write_lora(folder / "adapter", SHAPES[model])
    choices = (AdapterChoice(folder=adapter, weight=1.0),)
    return make_plan(MergeConfig(base=base, adapters=choices, output=folder / "out", **options), "cpu")


def _speeds(kind: str, count: int) -> list[float]:
    if kind == "one at 0.4":
        return [0.4, *[1.0] * (count - 1)]
    return [1.0] * (count - count // 2) + [0.5 if kind == "half at 0.5" else 1.0] * (count // 2)


def _rows(name: str, plan: Plan, ranks: tuple[int, ...]) -> None:
    sizes = sorted(segment.nbytes for segment in plan.segments)
    print(
        f"\n{name}: {len(plan.files)} output files, {len(plan.segments)} segments, {sizes[len(sizes) // 2] >> 20} MiB"
    )
    print(f"  {'ranks':12}" + "".join(f"{count:>14}" for count in ranks))
    for kind in ("equal", "one at 0.4", "half at 0.5"):
        found = [simulate(plan, _speeds(kind, count)) for count in ranks]
        print(f"  {kind:12}" + "".join(f"{one.efficiency:>8.1%} {one.spread:5.2f}" for one in found))
    nodes = [count for count in ranks if count > 8]
    for kind in ("equal", "half at 0.5") if nodes else ():
        found = [simulate(plan, _speeds(kind, count), ranks_per_node=8) for count in nodes]
        pad = " " * 14 * (len(ranks) - len(nodes))
        label = "nodes of 8" if kind == "equal" else "  half 0.5"
        print(f"  {label:12}" + pad + "".join(f"{one.efficiency:>8.1%} {one.spread:5.1f}" for one in found))


def main() -> None:
    """Prints, for each model and layout, efficiency and by how many segments the last rank ended after the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name begins with this")
    parser.add_argument(
        "--max-shard-size", type=float, help="of the output's files, in bytes; else the base's own files"
    )
    options = parser.parse_args()
    limit = None if options.max_shard_size is None else int(options.max_shard_size)
    for name, (model, shard_nbytes) in LAYOUTS.items():
        if name.startswith(options.only):
            with tempfile.TemporaryDirectory() as folder:
                _rows(name, plan_of(Path(folder), model, shard_nbytes, max_shard_size=limit), RANKS)


if __name__ == "__main__":
    main()
