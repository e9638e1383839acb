"""The probe: merged linears as functions, `W_merged x` against `W x + sum scaling B (A x)`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.audit.findings import Probed
from distmerge.audit.pairs import Pairs
from distmerge.audit.vectors import Activations, inputs_of, is_product, is_transposed
from distmerge.lanes import Lane, Lanes
from distmerge.layout import Task
from distmerge.numerics.apply import Loaded, as_rows
from distmerge.numerics.probing import (
    NUM_RANDOM,
    Response,
    Vectors,
    respond,
    respond_to_given,
    used_of_bound,
    vectors_for,
)
from distmerge.progress import Counter


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a layer made of given vectors: |error|^2, |unmerged output|^2, and the share of the bound that is used."""

    error: float
    reference: float
    bound_used: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a merged tensor made of random vectors, of those that its adapter looks at, and of given ones."""

    response: Response
    given: Given | None

    @property
    def is_doubtful(self) -> bool:
        return self.response.is_doubtful or (self.given is not None and not self.given.bound_used <= 1)

    @property
    def relative_error(self) -> float:
        """Of given vectors where there are some."""
        if self.given is None or not self.given.reference:
            return self.response.relative_error
        return math.sqrt(self.given.error / self.given.reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    task: Task
    block: int
    changes: tuple[Loaded, ...]
    vectors: Vectors
    given: Tensor | None


class Probing:
    """Probes the merged tensors of a plan that are products, each as a whole, its blocks spread over lanes."""

    def __init__(self, pairs: Pairs, activations: Activations, seed: int) -> None:
        self._pairs, self._activations, self._seed = pairs, activations, seed
        self._taken = {number for number, task in enumerate(pairs.plan.tasks) if is_product(task, pairs.plan)}
        self._names = {pairs.plan.tasks[number].name for number in self._taken}

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors and of what comes out, for the largest tensor, and of an orthonormal basis' making."""
        tasks = [self._pairs.plan.tasks[number] for number in self._taken]
        return max((self._nbytes(task) for task in tasks), default=0)

    def _nbytes(self, task: Task) -> int:
        matrices, _, cols = task.changes[0].shape
        inner = sum(change.tensors["a"].size[1] if "a" in change.tensors else 64 for change in task.changes)
        spec = self._activations.specs.get(task.name)
        outs = matrices * (cols if is_transposed(task) else 1) + task.largest_block_numel // cols
        given = 0 if spec is None else 4 * spec.shape[0] * (inputs_of(task) + 3 * outs)
        return 8 * (3 * matrices * cols * (NUM_RANDOM + inner) + given)

    def takes(self, task: Task) -> bool:
        """True if `task` is probed, and not compared element by element."""
        return task.name in self._names

    def run(self, lanes: Lanes, counter: Counter) -> dict[int, Probe]:
        """What was found of each tensor that is probed, by its number."""
        found = {}
        for number in sorted(self._taken):
            task = self._pairs.plan.tasks[number]
            self._pairs.close_others(self._pairs.file_of(task))
            counter.doing = task.name
            found[number] = self._probe(lanes, task, counter)
        return found

    def _probe(self, lanes: Lanes, task: Task, counter: Counter) -> Probe:
        given = self._activations.load(task)
        transposed = is_transposed(task)
        matrices, rows, cols = task.changes[0].shape
        outs = matrices * (cols if transposed else rows)
        # Errors and bounds of sums over several blocks are known when all of them are done.
        sums = None if given is None or not transposed else torch.zeros(3, outs, given.shape[1], dtype=torch.float64)
        response, told = Response(), Given(error=0.0, reference=0.0, bound_used=0.0)
        for one, parts in lanes.each(self._blocks(task, given), self._respond, _tick):
            response += one
            for first, part in parts:
                if sums is None:
                    told = _add(told, part)
                else:
                    sums[:, first : first + part.shape[1]] += part
        if sums is not None:
            told = _add(told, sums)
        counter.add(task.nbytes)
        return Probe(response=response, given=None if given is None else told)

    def _blocks(self, task: Task, given: Tensor | None) -> Iterator[_Block]:
        changes = self._pairs.reader.load_changes(task, torch.float64)
        digest = hashlib.sha256(f"{self._seed}\0{task.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        matrices, _, cols = task.changes[0].shape
        vectors = vectors_for(changes, matrices, cols, generator)
        moved = None if given is None else given.to(self._pairs.device)
        for block in range(task.num_blocks):
            yield _Block(task=task, block=block, changes=changes, vectors=vectors, given=moved)

    def _respond(self, lane: Lane, block: _Block) -> tuple[Response, list[tuple[int, Tensor]]]:
        task = block.task
        with lane.work_order():
            first = task.block(block.block)[0]
            flat = self._pairs.base(lane.buffers, task, block.block).double()
            base, top, _ = as_rows(flat, first, task.row_numel)
            stored = self._pairs.stored(task, block.block).view(base.shape)
            response = respond(base, stored, block.changes, block.vectors, top=top)
            if block.given is None:
                return response, []
            parts = respond_to_given(base, stored, block.changes, block.given, top=top, transposed=is_transposed(task))
            return response, [(number, part.cpu()) for number, part in parts]

    def summary(self, probes: dict[int, Probe]) -> Probed:
        """The figures over all tensors that were probed."""
        tasks = self._pairs.plan.tasks
        worst = max(probes, key=lambda number: probes[number].relative_error, default=None)
        used = [probe.response.bound_used for probe in probes.values()]
        given = [probe.given.bound_used for probe in probes.values() if probe.given is not None]
        deviations = [abs(probe.response.coefficient - 1) for probe in probes.values()]
        return Probed(
            num_tensors=len(probes),
            num_vectors=NUM_RANDOM,
            relative_error=0.0 if worst is None else probes[worst].relative_error,
            worst_tensor="" if worst is None else tasks[worst].name,
            bound_used=max([*used, *given], default=0.0),
            max_deviation=max(deviations, default=0.0),
            given=tuple(sorted(self._activations.specs)),
            by_blocks=tuple(task.name for task in tasks if task.changes and not self.takes(task)),
            doubted=tuple(tasks[number].name for number, probe in probes.items() if probe.is_doubtful),
        )


def _add(told: Given, part: Tensor) -> Given:
    """`told` with the outputs of `part`, (3, out, n): error, reference, and what is allowed."""
    error, reference, allowed = part
    return Given(
        error=told.error + float(error.square().sum()),
        reference=told.reference + float(reference.square().sum()),
        bound_used=max(told.bound_used, used_of_bound(error, allowed)),
    )


def _tick() -> None:
    """Nothing else waits while lanes work."""
