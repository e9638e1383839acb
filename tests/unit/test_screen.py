"""The pass over an adapter's bytes: which tensors are zero, and where a value is not finite beside others."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from distmerge.adapter import screen
from distmerge.adapter.views import View
from distmerge.checkpoint.header import read_header
from distmerge.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "i64": torch.int64}
# Alone or summed up they must not look like anything else: zeros of both signs, and values whose sum overflows.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.0, 3e-5, 60000.0])
TENSOR = st.tuples(st.sampled_from([*DTYPES]), st.lists(VALUES, min_size=1, max_size=6))


def _adapter(folder: Path, tensors: dict[str, Tensor]) -> Any:
    save_file(tensors, folder / "a.safetensors")
    views = [View.whole(spec) for spec in read_header(folder / "a.safetensors").tensors]
    return cast(Any, SimpleNamespace(views=views, files=("a.safetensors",), folder=folder, pickles={}))


@given(st.lists(TENSOR, min_size=1, max_size=9), st.sampled_from([8, 64, 4 << 20]))
@settings(max_examples=80)
def test_tensors_that_are_zero_are_told_from_those_beside_them(rows: list[Any], chunk: int) -> None:
    tensors = {
        f"t{i}": torch.tensor(values, dtype=torch.float64).to(DTYPES[kind]) for i, (kind, values) in enumerate(rows)
    }
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "_CHUNK_NBYTES", chunk)
        found = screen._nonzero(_adapter(Path(folder), tensors))
    assert found == {name for name, values in tensors.items() if any(value != 0 for value in values.tolist())}


def test_values_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    tensors = {"a": torch.full((9,), 3e38), "b": torch.zeros(3), "c": torch.full((9,), -3e38)}
    assert screen._nonzero(_adapter(tmp_path, tensors)) == {"a", "c"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["t0", "t5", "t9"])
def test_a_value_that_is_not_finite_is_found_among_small_tensors(tmp_path: Path, name: str, value: float) -> None:
    tensors = {f"t{i}": torch.ones(2, 3, dtype=torch.bfloat16) for i in range(10)}
    tensors[name][1, 2] = value
    with pytest.raises(InputError, match=rf"'{name}' holds -?(nan|inf) at \[1, 2\]"):
        screen._nonzero(_adapter(tmp_path, tensors))
