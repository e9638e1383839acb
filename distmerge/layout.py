"""Where every output byte goes: tensors into files, files into segments, tensors into blocks. Integers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from distmerge.adapter.changes import Change
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec, build_header
from distmerge.checkpoint.packed_form import PackedForm, Part
from distmerge.checkpoint.packing import Stored
from distmerge.grid import BLOCK_NUMEL, Grid, grid_of
from distmerge.storage.sharing import BLOCK_NBYTES, whole_blocks

MEASURED_NUMEL = BLOCK_NUMEL // 2  # elements of which is measured at once what is left of a change
KEPT_STACKS = 2  # of experts' factors: those of the projections up and down
LARGEST_SPECTRUM = 256  # the largest r of a delta whose singular values are computed
_SEGMENT_NBYTES = (16 << 20, 128 << 20)
_SEGMENTS_WANTED = 512


Kind = Literal["copy", "convert", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An output tensor: `kind` is `copy` (the bytes of its source), `convert` (dequantized or cast) or `merge`
    (changed).

    Its source lies in the base's folder, `origin` 0, or in that of adapter number `origin`, counted from 1. `also`
    names tensors of that adapter that are the same once more, for a parameter that is tied to this one. `twin` names
    the tensor that this one is tied and equal to, if the output holds both. With `form` it is rounded to `dtype` and
    then packed.
    """

    kind: Kind
    name: str
    source: Stored
    origin: int
    dtype: str
    changes: tuple[Change, ...]
    also: tuple[str, ...] = ()
    twin: str = ""
    form: PackedForm | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors of the output's files that this one is, in the order of their bytes."""
        if self.form is not None:
            return self.form.parts(self.name, self.source.shape, self.dtype)
        return (Part(name=self.name, dtype=self.dtype, shape=self.source.shape),)

    @property
    def nbytes(self) -> int:
        if self.form is not None:
            return sum(part.nbytes for part in self.parts)
        return self.source.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Task(Wanted):
    """An output tensor in its place: its bytes begin at byte `begin` of output file number `file`."""

    file: int
    begin: int

    @property
    def adapter_keys(self) -> tuple[tuple[int, str], ...]:
        """The adapters' tensors that go into this one: the adapter's number from 0, and the name in its file."""
        if not self.origin and not self.changes:
            return ()
        own = [(self.origin - 1, key) for key in (self.source.data.name, *self.also)] if self.origin else []
        return tuple(dict.fromkeys([*own, *((c.adapter, key) for c in self.changes for key in c.keys)]))

    @cached_property
    def _grid(self) -> Grid:
        """The blocks that hold its elements."""
        return grid_of(
            self.source.numel,
            self.row_numel,
            matrix_numel=self._matrix_numel,
            whole=any(change.whole for change in self.changes),
            blocksize=None if self.form is None else self.form.blocksize,
        )

    @property
    def row_numel(self) -> int:
        """Elements of a row where the tensor is changed; of the whole tensor otherwise."""
        return self.changes[0].shape[2] if self.changes else self.source.numel

    @property
    def largest_block_numel(self) -> int:
        """Elements that a block holds at most."""
        return self._grid.largest_numel

    @property
    def _matrix_numel(self) -> int:
        """Elements that the source can only be read by: a whole matrix where it is packed transposed."""
        return self.source.packing.block_numel if self.source.packing else 1

    @property
    def spectrum_nbytes(self) -> int:
        """Bytes that computing the singular values of its deltas takes at most, factors in float64 among them."""
        r = min(sum(change.r or LARGEST_SPECTRUM for change in self.changes), LARGEST_SPECTRUM)
        _, rows, cols = self.changes[0].shape if self.changes else (0, 0, 0)
        return 128 * r**2 + 8 * r * (rows + cols)

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that the operators of its changes take beside a block, in temporaries."""
        found = max((change.scratch_nbytes for change in self.changes), default=0)
        # A change counts on blocks of the ordinary size.
        return found * -(-self._matrix_numel // BLOCK_NUMEL) if found and not self._grid.whole else found

    @property
    def stored_block_nbytes(self) -> int:
        """Bytes of the largest block as its source stores it, companions apart."""
        numel, packing = self.largest_block_numel, self.source.packing
        return packing.data_nbytes(numel) if packing else numel * ITEMSIZE[self.source.data.dtype]

    @cached_property
    def head_nbytes(self) -> int:
        """Bytes of what stands before the codes of a packed tensor, which is a block of its own."""
        return 0 if self.form is None else sum(part.nbytes for part in self.parts[:-1])

    @property
    def num_blocks(self) -> int:
        return self._first + self._grid.num_blocks if self._grid.num_blocks else 0

    @property
    def dense_blocks(self) -> range:
        """The numbers of the blocks that hold elements: all but the first of a packed tensor."""
        return range(self._first, self.num_blocks)

    @property
    def _first(self) -> int:
        return 0 if self.form is None else 1

    def block(self, number: int) -> tuple[int, int]:
        """The flat elements [first, last) of block `number`: whole rows, or a part of one row that is too long."""
        number -= self._first
        return self._grid.span(number) if number >= 0 else (0, 0)

    def block_nbytes(self, number: int) -> int:
        """Bytes of block `number` in the output."""
        first, last = self.block(number)
        if self.form is None:
            return (last - first) * ITEMSIZE[self.dtype]
        return -(-(last - first) // 2) if number else self.head_nbytes

    def block_begin(self, number: int) -> int:
        """Where the bytes of block `number` begin, counted from the first of the task."""
        first, _ = self.block(number)
        if self.form is None:
            return first * ITEMSIZE[self.dtype]
        return self.head_nbytes + first // 2 if number else 0

    def elements(self, first: int, last: int) -> tuple[int, int]:
        """The flat elements that the blocks [first, last) hold."""
        return (self.block(first)[0], self.block(last - 1)[1]) if last > first else (0, 0)

    def numel_of(self, first: int, last: int) -> int:
        """How many elements the blocks [first, last) hold."""
        begin, end = self.elements(first, last)
        return end - begin

    def nbytes_of(self, first: int, last: int) -> int:
        """Bytes of the blocks [first, last) in the output."""
        if last <= first:
            return 0
        return self.block_begin(last - 1) + self.block_nbytes(last - 1) - self.block_begin(first)

    def applied_of(self, first: int, last: int) -> tuple[int, ...]:
        """How many elements of the blocks [first, last) each change concerns."""
        begin, end = self.elements(first, last)
        return tuple(change.numel_in(begin, end) for change in self.changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A weight file of the output: its name, its length in bytes, and where its data begins."""

    name: str
    nbytes: int
    data_begin: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Blocks [first, last) of task number `task`."""

    task: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Pieces that follow one another in one output file: the unit of claiming and of resuming."""

    file: int
    nbytes: int
    pieces: tuple[Piece, ...]


def used_tensors(tasks: Iterable[Task], adapter: int) -> tuple[TensorSpec, ...]:
    """The tensors of adapter number `adapter`, counted from 0, that go into the output, in the order of their names."""
    found = {
        (view.spec.name, view.spec.begin): view.spec
        for task in tasks
        for change in task.changes
        if change.adapter == adapter
        for view in change.tensors.values()
    }
    found |= {
        (task.source.name, task.source.data.begin): task.source.data for task in tasks if task.origin == adapter + 1
    }
    return tuple(found[key] for key in sorted(found))


def pack_shards(tensors: Iterable[Wanted], max_nbytes: int) -> dict[str, list[Wanted]]:
    """Output files by name, filled in order; one exceeds `max_nbytes` only if it holds a single tensor that does."""
    shards: list[list[Wanted]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.nbytes > max_nbytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def place(shards: dict[str, list[Wanted]]) -> tuple[tuple[OutputFile, ...], tuple[Task, ...]]:
    """The files, and the tasks in the order of their bytes: packed ones, which are multiples of 8 bytes, then wide
    dtypes first, so that every tensor is aligned. A file's header is as long as makes the most of what is copied lie in
    blocks as it does in its source, so that file systems can share those."""
    files, tasks = [], []
    for number, (name, shard) in enumerate(shards.items()):
        tensors = sorted(shard, key=lambda tensor: 0 if tensor.form else 9 - ITEMSIZE[tensor.dtype])
        offset = begin = _data_begin(tensors)
        for tensor in tensors:
            tasks.append(
                Task(
                    kind=tensor.kind,
                    name=tensor.name,
                    source=tensor.source,
                    origin=tensor.origin,
                    dtype=tensor.dtype,
                    changes=tensor.changes,
                    also=tensor.also,
                    twin=tensor.twin,
                    form=tensor.form,
                    file=number,
                    begin=offset,
                )
            )
            offset += tensor.nbytes
        files.append(OutputFile(name=name, nbytes=offset, data_begin=begin))
    return tuple(files), tuple(tasks)


def _data_begin(tensors: Sequence[Wanted]) -> int:
    """Where the data of a file begins that holds `tensors` one after another: at a multiple of 8 bytes, from which the
    most whole blocks that are copied have places that differ from those in their source by a multiple of a block."""
    nbytes = len(build_header([(p.name, p.dtype, p.shape) for t in tensors for p in t.parts]))
    blocks: Counter[int] = Counter()
    offset = 0
    for tensor in tensors:
        if tensor.kind == "copy":
            first, last = whole_blocks(tensor.source.data.begin, tensor.nbytes)
            blocks[(tensor.source.data.begin - offset) % BLOCK_NBYTES] += max(0, last - first)
        offset += tensor.nbytes
    wanted = [(-count, place) for place, count in blocks.items() if count and place % 8 == 0]
    return nbytes + (min(wanted)[1] - nbytes) % BLOCK_NBYTES if wanted else nbytes


def cut_segments(tasks: tuple[Task, ...]) -> tuple[Segment, ...]:
    """Every block of every task in exactly one segment, and every task in one; in the order of files and bytes.

    The size depends on the model alone (16 to 128 MiB), never on the number of ranks.
    """
    total = sum(task.nbytes for task in tasks)
    smallest, largest = _SEGMENT_NBYTES
    wanted = min(max(total // _SEGMENTS_WANTED, smallest), largest)
    segments: list[Segment] = []
    pieces: list[Piece] = []
    nbytes = 0

    def close(file: int) -> None:
        nonlocal pieces, nbytes
        if pieces:
            segments.append(Segment(file=file, nbytes=nbytes, pieces=tuple(pieces)))
        pieces, nbytes = [], 0

    for number, task in enumerate(tasks):
        if number and tasks[number - 1].file != task.file:
            close(tasks[number - 1].file)
        first, count, rest = 0, task.num_blocks, task.nbytes
        if count == 0:  # an empty tensor is written by being in the header
            pieces.append(Piece(task=number, first=0, last=0))
        while first < count:
            per_block = max(1, task.nbytes // count)
            # A packed tensor is measured as a whole before it is written.
            take = count if task.form else min(count - first, max(1, (wanted - nbytes) // per_block))
            pieces.append(Piece(task=number, first=first, last=first + take))
            taken = rest if first + take == count else task.nbytes_of(first, first + take)
            nbytes, rest = nbytes + taken, rest - taken
            first += take
            if nbytes >= wanted * 15 // 16:
                close(task.file)
    if tasks:
        close(tasks[-1].file)
    return tuple(segments)
