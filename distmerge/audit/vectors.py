"""Vectors that people give for the probe: activations of layers in a safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from distmerge.adapter.changes import LORA
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec, read_header
from distmerge.errors import InputError, printable
from distmerge.grid import BLOCK_NUMEL
from distmerge.layout import Task
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.low_rank import LOW_RANK
from distmerge.plan import Plan
from distmerge.storage.files import read_range

_FLOATS = ("BF16", "F16", "F32", "F64")
_MAX_VECTORS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """The tensors (n, in) of the file `path`, by the name of the output tensor that they are for."""

    path: Path | None
    specs: dict[str, TensorSpec]

    def load(self, task: Task) -> Tensor | None:
        """The vectors for `task` as columns (in, n), float64. Raises InputError for values that are not finite."""
        spec = self.specs.get(task.name)
        if spec is None or self.path is None:
            return None
        data = bytearray(read_range(self.path, spec.begin, spec.nbytes))
        rows = torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).view(spec.shape).double()
        if not torch.isfinite(rows).all():
            raise InputError("holds values that are not finite", where=f"{self.path}: {printable(spec.name)}")
        return rows.T.contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the largest of them in float64."""
        return max((8 * spec.nbytes // ITEMSIZE[spec.dtype] for spec in self.specs.values()), default=0)


def read_activations(path: Path, plan: Plan) -> Activations:
    """The activations in `path`, each named after a merged tensor of the output or its module. Raises InputError, with
    the name, for names that are none and shapes that do not fit."""
    tasks = {task.name: task for task in plan.tasks}
    found: dict[str, TensorSpec] = {}
    for spec in read_header(path).tensors:
        where = f"{path}: {printable(spec.name)}"
        name = next((name for name in (spec.name, f"{spec.name}.weight") if name in tasks), None)
        if name is None:
            near = get_close_matches(spec.name, tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name tensors of the output, or modules"
            raise InputError("is no tensor of the output", where=where, hint=hint)
        task = tasks[name]
        if not is_product(task, plan):
            raise InputError(f"{name!r} is no merged linear", where=where, hint="leave it out")
        if name in found:
            raise InputError(f"{name!r} is there twice, as tensor and as module", where=where)
        width = inputs_of(task)
        if spec.dtype not in _FLOATS or len(spec.shape) != 2 or spec.shape[1] != width:
            raise InputError(f"expected floats of shape (n, {width}), got {spec.dtype} {spec.shape}", where=where)
        if not 0 < spec.shape[0] <= _MAX_VECTORS:
            raise InputError(f"holds {spec.shape[0]} vectors, 1 to {_MAX_VECTORS} can be probed", where=where)
        found[name] = spec
    if not found:
        raise InputError("holds no activations", where=str(path))
    return Activations(path=path, specs=found)


def is_product(task: Task, plan: Plan) -> bool:
    """True if all that is done to `task` is to add products of factors to a matrix, or to a stack of them."""
    products = all(change.operator == LORA or change.operator in LOW_RANK for change in task.changes)
    return (
        bool(task.changes)
        and products
        and plan.combine.is_sum
        and task.form is None
        and task.changes[0].shape[1] > 1
        and task.row_numel <= BLOCK_NUMEL
    )


def is_transposed(task: Task) -> bool:
    """True if the output holds the weight as (in, out)."""
    return all(change.transposed for change in task.changes)


def inputs_of(task: Task) -> int:
    """How many features the layer of `task` takes."""
    _, rows, cols = task.changes[0].shape
    return rows if is_transposed(task) else cols
