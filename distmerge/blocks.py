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
from distmerge.numerics.apply import Applied, Loaded, apply_changes, as_rows
from distmerge.numerics.combine import Combination, combine_changes
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.survival import Sums, measure
from distmerge.packer import Scales, pack
from distmerge.reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Elements [first, last), block number `block` of `task`, in piece number `piece` of a segment; the changes to its
    tensor, one after another or combined, and the scales that it is packed with."""

    piece: int
    task: Task
    block: int
    first: int
    last: int
    changes: tuple[Loaded, ...] | Combination
    scales: Scales | None = None


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
        base, out, effect = merged(lane, reader, block)
        if task.form is None or block.scales is None:
            if block.changes:
                effect = replace(effect, sums=_measured(lane, block, base, out))
        else:
            codes, dense, error = pack(out, block.scales, task, task.form, block.block)
            if block.changes:
                sums = _measured(lane, block, base, dense)
                sums = replace(sums, pack_squared=error.written, plain_pack_squared=error.plain)
                effect = replace(effect, sums=sums)
            lane.out[:nbytes].copy_(codes)
        return lane.download(nbytes), effect


def merged(lane: Lane, reader: Reader, block: Block) -> tuple[Tensor, Tensor, Effect]:
    """The base's values of `block`, the merged ones, rounded once to the dtype of its task, and what each change did;
    the lane's float32 buffer holds the merged values before they were rounded.

    Raises VerifyError where values are not finite that must be.
    """
    task, numel = block.task, block.last - block.first
    base = reader.read_dense(lane.buffers, task.source, block.first, block.last, origin=task.origin)
    out = lane.out[: numel * ITEMSIZE[task.dtype]].view(torch_dtype(task.dtype))
    if not block.changes:
        return base, out, _convert(block, base, out)
    work = lane.buffers.work[:numel]
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
    return base, out, Effect(applied=applied)


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
        sums = measure(base, lane.buffers.work[: block.last - block.first], out, lane.scratch)
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
