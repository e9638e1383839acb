"""The pass over an output's blocks: merged ones against float64, all others byte for byte."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch

from distmerge.audit.findings import Request
from distmerge.audit.packed import Head
from distmerge.audit.pairs import Pairs, Recipe
from distmerge.checkpoint.packed_form import PackedForm
from distmerge.lanes import Lane, Lanes, memory_errors
from distmerge.layout import Segment, Task
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.noise import Exact, exactly
from distmerge.numerics.packed_distance import off_grid, off_scale, plain_error
from distmerge.numerics.rounding import distance, not_surely_nearest
from distmerge.progress import Counter


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A block, or several of one task: elements, how many are wrong, the largest errors in ulp, how many are not the
    nearest value; the sums of (out - base)^2, of out^2 and of the squares of each change; of a packed tensor also what
    is wrong with what stands beside its codes, and the squared error of its codes beside that of plain packing."""

    task: int
    numel: int
    num_wrong: int
    max_ulp: float = 0.0
    max_ulp_beyond_noise: float = 0.0
    num_not_nearest: int = 0
    applied_squared: float = 0.0
    stored_squared: float = 0.0
    delta_squared: tuple[float, ...] = ()
    faults: tuple[str, ...] = ()
    written_squared: float = 0.0
    plain_squared: float = 0.0

    def __add__(self, other: Checked) -> Checked:
        return Checked(
            task=self.task,
            numel=self.numel + other.numel,
            num_wrong=self.num_wrong + other.num_wrong,
            max_ulp=max(self.max_ulp, other.max_ulp),
            max_ulp_beyond_noise=max(self.max_ulp_beyond_noise, other.max_ulp_beyond_noise),
            num_not_nearest=self.num_not_nearest + other.num_not_nearest,
            applied_squared=self.applied_squared + other.applied_squared,
            stored_squared=self.stored_squared + other.stored_squared,
            delta_squared=tuple(a + b for a, b in zip_longest(self.delta_squared, other.delta_squared, fillvalue=0.0)),
            faults=(*self.faults, *other.faults),
            written_squared=self.written_squared + other.written_squared,
            plain_squared=self.plain_squared + other.plain_squared,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    task: int
    block: int
    recipe: Recipe | None
    head: Head | None


class Comparison:
    """Compares the tasks of a plan, by `lanes`; what is known of each task after a segment is added up."""

    def __init__(self, pairs: Pairs, lanes: Lanes, request: Request, counter: Counter) -> None:
        self._pairs, self._lanes, self._counter, self._request = pairs, lanes, counter, request
        self._buffers = pairs.reader.buffers()  # of the thread that loads
        self._recipe: tuple[int, Recipe] | None = None
        self._lock = threading.Lock()

    def run(self, only: Callable[[Task], bool] = lambda _: True) -> dict[int, Checked]:
        """What was found of each task that `only` lets through, by its number."""
        found: dict[int, Checked] = {}
        for segment in self._pairs.plan.segments:
            self._pairs.close_others("")
            for checked in self._lanes.each(self._blocks(segment, only), self._check, lambda: None):
                known = found.get(checked.task)
                found[checked.task] = checked if known is None else known + checked
        return found

    def _blocks(self, segment: Segment, only: Callable[[Task], bool]) -> Iterator[_Block]:
        for piece in segment.pieces:
            task = self._pairs.plan.tasks[piece.task]
            if not only(task):
                continue
            wanted = [number for number in range(piece.first, piece.last) if is_wanted(task, number, self._request)]
            recipe = self._load(piece.task) if task.changes and wanted else None
            head = self._pairs.head(task, task.form) if task.form and wanted else None
            self._counter.doing = task.name
            for number in wanted:
                yield _Block(task=piece.task, block=number, recipe=recipe, head=head)

    def _load(self, number: int) -> Recipe:
        """The recipe of a task; the last one is kept, since a task may go on in the next segment."""
        if self._recipe is None or self._recipe[0] != number:
            with memory_errors():
                self._recipe = number, self._pairs.recipe(self._pairs.plan.tasks[number], self._buffers)
        return self._recipe[1]

    def _check(self, lane: Lane, block: _Block) -> Checked:
        task = self._pairs.plan.tasks[block.task]
        with lane.work_order():
            if block.head is not None and task.form is not None:
                found = self._check_packed(lane, task, block, block.head)
            elif block.recipe is None:
                found = self._check_bytes(lane, task, block)
            else:
                found = self._check_merged(lane, task, block, block.recipe)
        self._counter.add(task.block_nbytes(block.block))
        return found

    def _check_bytes(self, lane: Lane, task: Task, block: _Block) -> Checked:
        expected = self._pairs.base_bytes(lane.buffers, task, block.block)
        stored = self._pairs.bytes(task, block.block)
        first, last = task.block(block.block)
        same = torch.equal(stored, expected)
        wrong = 0 if same else int((stored != expected).view(last - first, -1).any(dim=1).sum())
        return Checked(task=block.task, numel=last - first, num_wrong=wrong)

    def _check_packed(self, lane: Lane, task: Task, block: _Block, head: Head) -> Checked:
        """Every element must be the nearest that its block's scale allows, and the scale what packing gives it."""
        form = task.form
        if form is None or block.block not in task.dense_blocks:
            return Checked(task=block.task, numel=0, num_wrong=0, faults=head.faults)
        base = self._pairs.base(lane.buffers, task, block.block).double()
        exact = block.recipe.exact(base, block.block) if block.recipe else exactly(base)
        stored = self._pairs.stored(task, block.block, head)
        wrong = off_grid(stored, exact.values, exact.noise(), head.grid(task, form, block.block))
        num_wrong = int(wrong.sum())
        wide = stored.double()
        change = wide - base
        first, last = task.block(block.block)
        span = slice(first // form.blocksize, -(-last // form.blocksize))
        norms = block.recipe.delta_norms if block.recipe else ()
        if block.block != task.dense_blocks.start:
            norms = (0.0,) * len(norms)
        return Checked(
            task=block.task,
            numel=len(stored),
            num_wrong=num_wrong,
            applied_squared=float(change @ change),
            stored_squared=float(wide @ wide),
            delta_squared=tuple(norm**2 + one.squared for norm, one in zip(norms, exact.applied, strict=True)),
            faults=_scale_faults(head, exact, task, form, block.block),
            written_squared=float((wide - exact.values).square().sum()),
            plain_squared=plain_error(exact.values, stored.dtype, head.quant_map, form.blocksize)
            + form.blocksize * float(head.moved[span].double().square().sum()),
        )

    def _check_merged(self, lane: Lane, task: Task, block: _Block, recipe: Recipe) -> Checked:
        base = self._pairs.base(lane.buffers, task, block.block).double()
        exact = recipe.exact(base, block.block)
        stored = self._pairs.stored(task, block.block)
        wide = stored.double()
        norms = recipe.delta_norms if block.block == 0 else (0.0,) * len(recipe.delta_norms)
        operates = any(change.squared for change in exact.applied)
        squared = float(wide @ wide) if operates else 0.0
        change = wide.sub_(base)
        num_wrong, max_ulp, beyond, num_not_nearest = judge(stored, exact)
        return Checked(
            task=block.task,
            numel=len(stored),
            num_wrong=num_wrong,
            max_ulp=max_ulp,
            max_ulp_beyond_noise=beyond,
            num_not_nearest=num_not_nearest,
            applied_squared=float(change @ change),
            stored_squared=squared,
            delta_squared=tuple(norm**2 + change.squared for norm, change in zip(norms, exact.applied, strict=True)),
        )


def _scale_faults(head: Head, exact: Exact, task: Task, form: PackedForm, block: int) -> tuple[str, ...]:
    """What is wrong with the scales of a block, where they are not fitted."""
    if form.fitted:
        return ()
    grid = head.grid(task, form, block)
    dtype = torch_dtype(task.dtype)
    wrong = off_scale(grid.scales, exact.values, exact.noise(), grid.slack, blocksize=form.blocksize, dtype=dtype)
    if not (count := int(wrong.sum())):
        return ()
    first = task.block(block)[0] + int(wrong.nonzero()[0]) * form.blocksize
    return (f"{count} scales are not the largest magnitude of their elements, the first that of element {first}",)


def judge(stored: torch.Tensor, exact: Exact) -> tuple[int, float, float, int]:
    """How many elements of `stored` are wrong, the largest error in ulp, the largest beyond noise, and how many are not
    the nearest value. The noise of all elements is computed only where some lie so far off that it matters."""
    places = not_surely_nearest(stored, exact.values)
    half = 0.5 if len(stored) > len(places) else 0.0  # the others are off by no more, and rarely by less
    some, oracle = stored[places], exact.values[places]
    found = distance(some, oracle, exact.floor(places))
    if found.num_beyond:
        found = distance(some, oracle, exact.noise()[places])
    beyond = found.max_ulp_beyond_noise
    return found.num_beyond, max(half, found.max_ulp), max(half, beyond), found.num_not_nearest


def is_wanted(task: Task, block: int, request: Request) -> bool:
    """True if an audit looks at this block; the same ones on every machine."""
    if request.depth != "sample" or block in (0, task.num_blocks - 1):
        return True
    digest = hashlib.sha256(f"{request.seed}\0{task.name}\0{block}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < request.share * 2.0**64
