"""A packed tensor of an output: its scales and codes read back, and what its state must be."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.checkpoint.packed_form import PackedForm
from distmerge.layout import Task
from distmerge.numerics import nf4, packing4
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.packed_distance import Grid, nested_slack


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What stands beside the codes of a packed tensor: its scales as they are read, float32 (num_blocks,), how far
    storing them in 8 bits may have moved them, how far those by which its codes were chosen may lie from them, the
    table of its codes; and what is wrong with it."""

    scales: Tensor
    moved: Tensor
    slack: Tensor
    quant_map: Tensor
    faults: tuple[str, ...]

    def grid(self, task: Task, form: PackedForm, block: int) -> Grid:
        """The part for a block of `task`."""
        first, last = task.block(block)
        span = slice(first // form.blocksize, -(-last // form.blocksize))
        return Grid(
            scales=self.scales[span], slack=self.slack[span], quant_map=self.quant_map, blocksize=form.blocksize
        )


def read_head(task: Task, form: PackedForm, data: bytearray, device: torch.device) -> Head:
    """The head of `task` from its bytes."""
    *before, state, _ = task.parts
    tensors, offset = [], 0
    for part in before:
        flat = torch.frombuffer(data[offset : offset + part.nbytes], dtype=torch_dtype(part.dtype))
        tensors.append(flat.to(device))
        offset += part.nbytes
    table = nf4.TABLES[form.kind].to(device)
    faults = ["quant_map is not that of its codes"] * (not torch.equal(tensors[0], table))
    try:
        told = json.loads(bytes(data[offset : offset + state.nbytes]))
        mean = float(told.get("nested_offset", 0.0))
    except (ValueError, TypeError, AttributeError, RecursionError):
        told, mean = None, 0.0
    due = json.loads(form.state(task.source.shape, task.dtype, mean, state.nbytes))
    faults += [f"the quantization state is not {json.dumps(due)}"] * (told != due)
    if form.double:
        faults += ["nested_quant_map is not the 8-bit one"] * (
            not torch.equal(tensors[1].cpu(), packing4.dynamic_map())
        )
        nested = packing4.Nested(codes=tensors[3], absmax=tensors[2], offset=mean)
        scales, slack = packing4.unnest(nested), nested_slack(nested.absmax, len(nested.codes))
    else:
        scales, slack = tensors[1], torch.zeros_like(tensors[1])
    moved = slack
    if form.fitted:  # its codes were chosen by the scales as they are read
        slack = torch.zeros_like(slack)
    faults += ["scales are not finite"] * (not bool(torch.isfinite(scales).all()))
    return Head(scales=scales, moved=moved, slack=slack, quant_map=table, faults=tuple(faults))


def unpacked(task: Task, form: PackedForm, head: Head, block: int, codes: Tensor) -> Tensor:
    """What a loader makes of the bytes `codes` of a block, in the dtype of `task`, flat."""
    first, last = task.block(block)
    both = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[: last - first]
    scales = head.grid(task, form, block).scales
    values = packing4.unpacked(both, scales, head.quant_map, first=first, blocksize=form.blocksize)
    return values.to(torch_dtype(task.dtype))
