"""One block on its way: read as floats, changed, rounded once, packed if the output is, and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmerge.checkpoint.header import ITEMSIZE
from distmerge.checkpoint.packing import Simulated
from distmerge.clock import during
from distmerge.errors import VerifyError
from distmerge.lanes import Lane
from distmerge.layout import Task
from distmerge.numerics.apply import Applied, Loaded, apply_changes, as_rows, only_product
from distmerge.numerics.combine import Combination, combine_changes
from distmerge.numerics.compiled import merge_block
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.survival import Sums, exact_sums, measure
from distmerge.packer import Scales, pack
from distmerge.reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Elements [first, last), block number `block` of `task`, in piece number `piece` of a segment; the changes to its
    tensor, one after another or combined, and the scales that it is packed with. A `shared` one is in its place
    already."""

    piece: int
    task: Task
    block: int
    first: int
    last: int
    changes: tuple[Loaded, ...] | Combination
    scales: Scales | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What each change did to a block, and all of them together; without changes, how many values are not finite."""

    applied: tuple[Applied, ...] = ()
    sums: Sums | None = None
    not_finite: int = 0


NOTHING = Effect()


def write_values(lane: Lane, reader: Reader, block: Block) -> tuple[memoryview, Effect]:
    """The bytes of `block` in the output, in the buffers of `lane`, and what was done to it."""
    task, nbytes = block.task, block.task.block_nbytes(block.block)
    if task.kind == "copy":
        data = lane.buffers.view[:nbytes]
        reader.read(task.source.data, block.first * ITEMSIZE[task.dtype], data, origin=task.origin)
        return data, NOTHING
    if block.scales is not None and block.block == 0:
        return memoryview(block.scales.head), NOTHING
    with lane.work_order():
        base, out = _read(lane, reader, block)
        if task.form is None or block.scales is None:
            effect = _merge_at_once(lane, block, base, out)
            if effect is None:
                effect = _merge(lane, block, base, out)
                effect = replace(effect, sums=_measured(lane, block, base, out) if block.changes else None)
        else:
            effect = _merge(lane, block, base, out)
            codes, dense, error = pack(out, block.scales, task, task.form, block.block)
            if block.changes:
                sums = _measured(lane, block, base, dense)
                sums = replace(sums, pack_squared=error.written, plain_pack_squared=error.plain)
                effect = replace(effect, sums=sums)
            lane.out[:nbytes].copy_(codes)
        return lane.download(nbytes), effect


def merged(lane: Lane, reader: Reader, block: Block) -> Tensor:
    """The merged values of `block`, rounded once to the dtype of its task, in the buffers of `lane`.

    Raises VerifyError where values are not finite that must be.
    """
    base, out = _read(lane, reader, block)
    _merge(lane, block, base, out)
    return out


def _read(lane: Lane, reader: Reader, block: Block) -> tuple[Tensor, Tensor]:
    """The base's values of `block`, and room for the merged ones."""
    task = block.task
    base = reader.read_dense(lane.buffers, task.source, block.first, block.last, origin=task.origin)
    return base, lane.out[: len(base) * ITEMSIZE[task.dtype]].view(torch_dtype(task.dtype))


def _merge_at_once(lane: Lane, block: Block, base: Tensor, out: Tensor) -> Effect | None:
    """Adds, rounds and measures in one pass over a block that one product is added to; None if it is no such block, or
    there is no compiled code for it."""
    if not block.changes or isinstance(block.changes, Combination):
        return None
    rows, top, left = as_rows(base, block.first, block.task.row_numel)
    only = only_product(block.changes, (len(rows), rows.shape[1]), top=top, left=left)
    if only is None or (found := merge_block(rows, only[0], out.view_as(rows))) is None:
        return None
    if (sums := exact_sums(found, len(out))) is None:
        merge_block(rows, only[0], out.view_as(rows), work=lane.buffers.work[: len(out)].view_as(rows))
        return Effect(applied=only[1], sums=_measured(lane, block, base, out))
    return Effect(applied=only[1], sums=_checked(lane, block, base, sums))


def _merge(lane: Lane, block: Block, base: Tensor, out: Tensor) -> Effect:
    """Writes the merged values of `block` to `out`; what each change did. The lane's float32 buffer holds them before
    they were rounded."""
    task = block.task
    if not block.changes:
        return _convert(block, base, out)
    work = lane.buffers.work[: len(base)]
    work.copy_(base)
    rows, top, left = as_rows(work, block.first, task.row_numel)
    try:
        if isinstance(block.changes, Combination):
            number = block.block - task.dense_blocks.start
            applied = combine_changes(rows, block.changes, block=number, top=top, left=left)
        else:
            applied = apply_changes(rows, block.changes, top=top, left=left)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        if not torch.isfinite(base).all():
            raise _base_not_finite(task) from None
        raise VerifyError(f"cannot be decomposed ({error})", where=task.name) from None
    out.copy_(work)
    if task.form is not None and not torch.isfinite(out).all():
        raise _not_finite(task) if torch.isfinite(base).all() else _base_not_finite(task)
    return Effect(applied=applied)


def _convert(block: Block, base: Tensor, out: Tensor) -> Effect:
    """Writes `base` to `out`; what was not finite may stay so, if it is not packed."""
    out.copy_(base)
    if not (lost := ~torch.isfinite(out)).any():
        return NOTHING
    if (lost & torch.isfinite(base)).any():
        raise _not_finite(block.task)
    if block.task.form is not None:
        raise _base_not_finite(block.task)
    return Effect(not_finite=int(lost.sum()))


def _measured(lane: Lane, block: Block, base: Tensor, out: Tensor) -> Sums:
    """What is left of the changes in `out`; the lane's float32 buffer is overwritten."""
    with during("measure"):
        sums = measure(base, lane.buffers.work[: len(base)], out, lane.scratch)
    return _checked(lane, block, base, sums)


def _checked(lane: Lane, block: Block, base: Tensor, sums: Sums) -> Sums:
    """The `sums`, which are finite, of a block that was just read."""
    if not sums.is_finite:
        if not torch.isfinite(base).all():
            raise _base_not_finite(block.task)
        raise _not_finite(block.task)
    simulated = isinstance(block.task.source.packing, Simulated)
    return replace(sums, quant_squared=lane.buffers.lost_squared) if simulated else sums


def _base_not_finite(task: Task) -> VerifyError:
    return VerifyError("the base holds values that are not finite", where=task.name)


def _not_finite(task: Task) -> VerifyError:
    return VerifyError(
        f"a merged value does not fit {task.dtype}",
        where=task.name,
        hint="--dtype bfloat16 or float32 has the range",
    )
