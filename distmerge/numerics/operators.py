"""What an operator is: how one adapter changes the weight of one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""A module's tensors by role, floats in the weight's dtype and on its device; integers stay integers."""
Options = Mapping[str, Any]
"""Numbers, strings, bools and lists of numbers, as they come out of adapter_config.json."""


def _unchanged(tensors: Tensors, options: Options) -> Tensors:
    return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """`apply(weight, base, tensors, options, rows)` returns the new rows `rows` of the (out, in) matrix of a linear
    layer; `weight` (h, in) holds these rows as earlier adapters left them, `base` those of the unmerged base.

    - No argument is changed.
    - With `row_local`, any range of rows gives what all rows give; without it, `rows` is always all of them.
    - All arithmetic is in the dtype of `weight`.
    - `prepare(tensors, options)` may be called once per module; with what it returns, `apply` gives the same and does
      not repeat work that is the same for all rows.
    """

    apply: Callable[[Tensor, Tensor, Tensors, Options, slice], Tensor]
    row_local: bool
    prepare: Callable[[Tensors, Options], Tensors] = _unchanged


def scaling(options: Options) -> float:
    """The factor of the change."""
    return float(options["scaling"])


def row_numbers(weight: Tensor, rows: slice) -> Tensor:
    """The numbers of the rows that `weight` holds, int64 (h,), on its device."""
    return torch.arange(rows.start, rows.stop, device=weight.device)
