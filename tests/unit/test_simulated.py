"""Rounding through 4 bits takes no more memory than the plan counts for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from distmerge.checkpoint.header import TensorSpec
from distmerge.checkpoint.packing import ROUNDED_NUMEL, Simulated, Stored
from distmerge.dense import Buffers, Dense
from distmerge.numerics import packing4
from distmerge.numerics.dtypes import torch_dtype
from distmerge.plan import Plan
from distmerge.rounding import Rounding

CPU = torch.device("cpu")


def packing(shape: tuple[int, int], dtype: str = "BF16", *, transposed: bool = False) -> Simulated:
    return Simulated(
        kind="nf4",
        blocksize=64,
        double=True,
        compute_dtype="F16",
        transposed=transposed,
        dtype=dtype,
        shape=shape,
    )


def peak_nbytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at once while `work` runs, and were not before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = work()
    del kept
    alive = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_rounding_takes_no_more_memory_than_is_counted(dtype: str, transposed: bool) -> None:
    one = packing((512, 1024), dtype, transposed=transposed)
    values = (torch.randn(one.numel) * 0.02).to(torch_dtype(dtype))
    data = TensorSpec(name="w", dtype=dtype, shape=one.shape, file="", begin=0, nbytes=values.nbytes)
    stored = Stored(data=data, packing=one)
    task = SimpleNamespace(source=stored, stored_block_nbytes=values.nbytes, largest_block_numel=one.numel)
    buffers = Buffers(cast(Plan, SimpleNamespace(tasks=[task], block_numel=one.numel)), CPU)

    def read(spec: TensorSpec, offset: int, view: memoryview, *, origin: int = 0) -> None:
        view[:] = values.view(torch.uint8).numpy().data[offset : offset + len(view)]

    dense = Dense(read, CPU)
    dense.read(buffers, stored, 0, one.numel)  # learns the scales
    taken = peak_nbytes(lambda: dense.read(buffers, stored, 0, one.numel))
    assert one.numel * 6 < taken <= one.scratch_nbytes(one.numel) * 0.75  # the rest is room for the allocator


def test_rounding_rows_takes_little_more_memory_than_the_rounded_values() -> None:
    one = packing((512, 1024), "BF16")
    values = (torch.randn(one.numel) * 0.02).bfloat16()
    rounding = Rounding(CPU, 0)
    nested = rounding.learn("w", one, packing4.block_absmax(values, 64))
    taken = peak_nbytes(lambda: rounding.round("w", one, values, begin=0, nested=nested))
    assert taken - values.nbytes <= 20 * ROUNDED_NUMEL


def test_the_scales_of_a_tensor_take_no_more_memory_than_is_counted() -> None:
    one = packing((8192, 16384))
    rounding, parts = Rounding(CPU, 0), []

    def learn() -> object:
        parts.extend(torch.rand(1 << 13) for _ in range(one.num_blocks >> 13))
        return rounding.learn("w", one, torch.cat(parts))

    assert one.num_blocks * 8 < peak_nbytes(learn) <= one.learning_nbytes
    nested = rounding.kept("w")
    assert nested is not None
    assert nested.codes.nbytes + nested.absmax.nbytes <= one.kept_nbytes


def test_of_what_does_not_fit_the_scales_that_were_asked_for_last_are_kept() -> None:
    one = packing((64, 64))
    rounding = Rounding(CPU, 2 * one.kept_nbytes)
    for name in ("first", "second"):
        rounding.learn(name, one, torch.rand(64))
    assert rounding.kept("first") is not None
    rounding.learn("third", one, torch.rand(64))
    assert [name for name in ("first", "second", "third") if rounding.kept(name)] == ["first", "third"]
