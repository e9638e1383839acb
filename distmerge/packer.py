"""Merged values into the 4 bits of bitsandbytes: scales measured over the whole tensor first, then its codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.checkpoint.packed_form import PackedForm
from distmerge.layout import Task
from distmerge.numerics import fitting4, nf4, packing4
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.survival import squared


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The scales of block number `block`, on the host: the largest magnitudes, float32; and if a search is wanted,
    what it found for the same blocks, `plain` scales apart from `fitted` ones."""

    block: int
    absmax: Tensor
    plain: fitting4.Scales | None = None
    fitted: fitting4.Scales | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """The scales of a tensor: `absmax`, the largest magnitudes, by which plain codes are chosen, and `read` and
    `plain_read`, what a loader makes of the stored ones and of stored largest magnitudes; float32 (num_blocks,).
    `head` is what stands in the file before the codes."""

    absmax: Tensor
    read: Tensor
    plain_read: Tensor
    head: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PackError:
    """Sums of squares: of what packing with plain scales loses, and of what it has lost."""

    plain: float
    written: float


def measure(values: Tensor, form: PackedForm, block: int) -> Measured:
    """The scales of `values`, flat, the elements of block number `block` of a tensor."""
    absmax = packing4.block_absmax(values, form.blocksize)
    if not form.fitted:
        return Measured(block=block, absmax=absmax.cpu())
    table = nf4.TABLES[form.kind].to(values.device)
    plain, fitted = fitting4.fit(values, absmax, table, blocksize=form.blocksize)
    return Measured(block=block, absmax=absmax.cpu(), plain=_on_host(plain), fitted=_on_host(fitted))


def scales_of(task: Task, form: PackedForm, measured: Sequence[Measured]) -> Scales:
    """The scales of `task` from those of all its blocks, in any order."""
    ordered = sorted(measured, key=lambda one: one.block)
    absmax = torch.cat([one.absmax for one in ordered])
    nested = packing4.nest(absmax) if form.double else None
    read = plain_read = packing4.unnest(nested) if nested else absmax
    if form.fitted:
        settled = fitting4.settle(
            _joined([one.plain for one in ordered if one.plain]),
            _joined([one.fitted for one in ordered if one.fitted]),
            double=form.double,
        )
        read, nested = settled.absmax, settled.nested
    head = _head(task, form, read, nested)
    return Scales(absmax=absmax, read=read, plain_read=plain_read, head=head)


def _on_host(scales: fitting4.Scales) -> fitting4.Scales:
    return fitting4.Scales(absmax=scales.absmax.cpu(), product=scales.product.cpu(), square=scales.square.cpu())


def _joined(scales: Sequence[fitting4.Scales]) -> fitting4.Scales:
    return fitting4.Scales(
        absmax=torch.cat([one.absmax for one in scales]),
        product=torch.cat([one.product for one in scales]),
        square=torch.cat([one.square for one in scales]),
    )


def pack(values: Tensor, scales: Scales, task: Task, form: PackedForm, block: int) -> tuple[Tensor, Tensor, PackError]:
    """The bytes of `values`, elements of block number `block` of `task`, uint8; what a loader makes of them, in the
    dtype of the task; and what was lost."""
    first, last = task.block(block)
    table = nf4.TABLES[form.kind].to(values.device)
    span = slice(first // form.blocksize, -(-last // form.blocksize))
    wide = values.float()

    sizes = {"first": first, "blocksize": form.blocksize}
    read = scales.read[span].to(values.device)
    if form.fitted:
        found = packing4.codes_for(wide, read, table, **sizes)
    else:
        found = packing4.codes(wide, scales.absmax[span].to(values.device), table, numel=task.source.numel, **sizes)
    dense = packing4.unpacked(found, read, table, **sizes).to(torch_dtype(task.dtype))
    written = plain = squared(dense.float() - wide)
    if form.fitted:
        own, read = (scale[span].to(values.device) for scale in (scales.absmax, scales.plain_read))
        other = packing4.codes(wide, own, table, numel=task.source.numel, **sizes)
        plain = squared(packing4.unpacked(other, read, table, **sizes).to(dense.dtype).float() - wide)
    error = PackError(plain=plain, written=written)
    return packing4.pair(found, table), dense, error


def _head(task: Task, form: PackedForm, absmax: Tensor, nested: packing4.Nested | None) -> bytes:
    """The bytes of the parts of `task` before the codes."""
    tensors = [nf4.TABLES[form.kind]]
    tensors += [packing4.dynamic_map(), nested.absmax, nested.codes] if nested else [absmax]
    offset = nested.offset if nested else 0.0
    state = form.state(task.source.shape, task.dtype, offset, task.parts[-2].nbytes)
    return b"".join(bytes(tensor.contiguous().view(torch.uint8).numpy()) for tensor in tensors) + state
