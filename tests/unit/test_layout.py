"""The layout: every element of every tensor in exactly one place, decided from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.checkpoint.header import ITEMSIZE, build_header, parse_header
from distmerge.checkpoint.packed_form import PackedForm
from distmerge.grid import BLOCK_NUMEL
from distmerge.layout import Task, cut_segments, pack_shards, place
from distmerge.storage.sharing import BLOCK_NBYTES, whole_blocks
from distmerge.untouched import spans_to_reserve, untouched
from tests.factories import plan_of, wanted

DTYPES = st.sampled_from(["BF16", "F16", "F32"])
DIM = st.one_of(st.integers(1, 40), st.integers(1000, 5000), st.sampled_from([BLOCK_NUMEL, BLOCK_NUMEL + 1]))
MATRIX = st.tuples(DIM, DIM).filter(lambda shape: shape[0] * shape[1] < 1 << 31)
VECTOR = st.one_of(st.just(()), st.tuples(st.integers(0, 3_000_000)), st.tuples(DIM, st.just(0)))
TENSOR = st.one_of(
    st.tuples(MATRIX, DTYPES, st.integers(1, 8)),
    st.tuples(st.one_of(MATRIX, VECTOR), st.sampled_from(["F64", "BF16", "F32", "U8", "I64", "BOOL"]), st.just(0)),
)


FORM = st.builds(
    PackedForm,
    kind=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([32, 64, 128, 4096]),
    double=st.booleans(),
    fitted=st.booleans(),
)


@st.composite
def models(draw: st.DrawFn) -> list[Any]:
    tensors = draw(st.lists(TENSOR, min_size=1, max_size=12))
    plain = [wanted(f"t{i}", shape, dtype, r=r) for i, (shape, dtype, r) in enumerate(tensors)]
    packed = draw(st.lists(st.tuples(MATRIX, DTYPES, st.integers(0, 2), FORM), max_size=4))
    return plain + [replace(wanted(f"p{i}", s, d, r=r), form=form) for i, (s, d, r, form) in enumerate(packed)]


@st.composite
def sharded(draw: st.DrawFn) -> dict[str, list[Any]]:
    return pack_shards(draw(models()), draw(st.sampled_from([1, 10**6, 10**8, 10**12])))


def task_of(tensor: Any) -> Task:
    return place({"f": [tensor]})[1][0]


@given(TENSOR)
def test_every_element_lies_in_exactly_one_block(tensor: tuple[tuple[int, ...], str, int]) -> None:
    task = task_of(wanted("t", tensor[0], tensor[1], r=tensor[2]))
    blocks = [task.block(number) for number in range(min(task.num_blocks, 5000))]
    assert all(last == first for (_, last), (first, _) in pairwise(blocks))
    assert all(0 < last - first <= BLOCK_NUMEL for first, last in blocks)
    assert (blocks[0][0] if blocks else 0) == 0
    assert (task.block(task.num_blocks - 1)[1] if blocks else 0) == task.source.numel


@given(MATRIX)
def test_a_block_of_a_merged_tensor_is_whole_rows_or_a_part_of_one_row(shape: tuple[int, int]) -> None:
    task = task_of(wanted("t", shape, r=2))
    for number in range(min(task.num_blocks, 2000)):
        first, last = task.block(number)
        whole_rows = first % shape[1] == 0 and last % shape[1] == 0
        assert whole_rows or first // shape[1] == (last - 1) // shape[1]


@given(MATRIX, DTYPES, st.integers(0, 2), FORM)
def test_blocks_of_a_packed_tensor_hold_whole_scales_and_follow_its_head(
    shape: tuple[int, int], dtype: str, r: int, form: PackedForm
) -> None:
    task = task_of(replace(wanted("t", shape, dtype, r=r), form=form))
    numbers = list(task.dense_blocks)
    assert numbers[0] == 1
    assert numbers[-1] == task.num_blocks - 1
    blocks = [task.block(number) for number in numbers]
    assert all(last == first for (_, last), (first, _) in pairwise(blocks))
    assert (blocks[0][0], blocks[-1][1]) == (0, task.source.numel)
    assert all(first % form.blocksize == 0 and last - first <= task.largest_block_numel for first, last in blocks)
    assert all(first % shape[1] == 0 and last % shape[1] == 0 for first, last in blocks if r and shape[0] > 1)
    begins = [task.block_begin(number) for number in range(task.num_blocks)]
    ends = [begin + task.block_nbytes(number) for number, begin in enumerate(begins)]
    assert begins == [0, *ends[:-1]]
    assert ends[-1] == task.nbytes == sum(part.nbytes for part in task.parts)
    assert task.nbytes % 8 == 0


@given(sharded())
def test_every_block_of_every_task_lies_in_exactly_one_segment(shards: dict[str, list[Any]]) -> None:
    plan = plan_of(shards)
    pieces = [piece for segment in plan.segments for piece in segment.pieces]
    for number, task in enumerate(plan.tasks):
        mine = [piece for piece in pieces if piece.task == number]
        assert mine, "even an empty tensor is in a segment"
        assert (mine[0].first, mine[-1].last) == (0, task.num_blocks)
        assert all(one.last == other.first for one, other in pairwise(mine))


@given(sharded())
def test_a_segment_lies_in_one_file_and_knows_its_bytes(shards: dict[str, list[Any]]) -> None:
    plan = plan_of(shards)
    for segment in plan.segments:
        tasks = [plan.tasks[piece.task] for piece in segment.pieces]
        assert {task.file for task in tasks} == {segment.file}
        blocks = [(t, n) for p, t in zip(segment.pieces, tasks, strict=True) for n in range(p.first, p.last)]
        assert segment.nbytes == sum(task.block_nbytes(number) for task, number in blocks)
        assert all(p.last == t.num_blocks for p, t in zip(segment.pieces, tasks, strict=True) if t.form)
    assert [segment.file for segment in plan.segments] == sorted(segment.file for segment in plan.segments)


@given(sharded())
def test_segments_are_at_most_a_block_larger_than_wanted(shards: dict[str, list[Any]]) -> None:
    plan = plan_of(shards)
    largest_block = BLOCK_NUMEL * max(ITEMSIZE[task.dtype] for task in plan.tasks)
    largest_block = max([largest_block, *(task.nbytes for task in plan.tasks if task.form)])  # not cut
    assert all(segment.nbytes <= (128 << 20) + largest_block for segment in plan.segments)
    # A long tensor is cut: one file must be able to keep many ranks busy.
    total = sum(task.nbytes for task in plan.tasks)
    assert len(plan.segments) >= min(total // ((128 << 20) + largest_block), 1)


@given(sharded())
def test_segments_depend_on_the_tasks_alone(shards: dict[str, list[Any]]) -> None:
    renamed = {f"other-{name}": shard for name, shard in shards.items()}
    assert plan_of(renamed).segments == plan_of(shards).segments == cut_segments(plan_of(shards).tasks)


@given(models(), st.integers(1, 10**10))
def test_packing_puts_each_tensor_in_one_file_in_the_order_given(tensors: list[Any], limit: int) -> None:
    shards = pack_shards(tensors, limit)
    assert [tensor for shard in shards.values() for tensor in shard] == tensors
    assert list(shards) == sorted(shards)
    assert all(shards.values())


@given(models(), st.integers(1, 10**10))
def test_only_a_file_of_a_single_tensor_exceeds_the_limit(tensors: list[Any], limit: int) -> None:
    shards = list(pack_shards(tensors, limit).values())
    used = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    assert all(nbytes <= limit or len(shard) == 1 for shard, nbytes in zip(shards, used, strict=True))
    # Greedy: a file is closed only because its next tensor would not have fitted.
    assert all(nbytes + after[0].nbytes > limit for nbytes, after in zip(used, shards[1:], strict=False))


def test_files_are_named_as_loaders_expect() -> None:
    tensors = [wanted(f"t{i}", (10,)) for i in range(3)]
    assert list(pack_shards(tensors, 100)) == ["model.safetensors"]
    assert list(pack_shards(tensors, 40)) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@given(sharded())
def test_tensors_are_aligned_and_cover_their_file_without_overlap(shards: dict[str, list[Any]]) -> None:
    files, tasks = place(shards)
    for number, file in enumerate(files):
        mine = sorted((task for task in tasks if task.file == number), key=lambda task: (task.begin, task.nbytes))
        for task in mine:
            begin = task.begin - file.data_begin
            for part in task.parts:
                assert begin % ITEMSIZE[part.dtype] == 0
                begin += part.nbytes
        assert all(one.begin + one.nbytes == other.begin for one, other in pairwise(mine))
        assert (mine[0].begin, mine[-1].begin + mine[-1].nbytes) == (file.data_begin, file.nbytes)


@given(sharded())
def test_a_planned_header_is_what_a_reader_finds(shards: dict[str, list[Any]]) -> None:
    plan = plan_of(shards)
    for number, file in enumerate(plan.files):
        raw = plan.header_of(number)
        assert len(raw) == file.data_begin
        found = parse_header(raw[8:], file.nbytes - file.data_begin, where="w", file=file.name)
        starts = {(t.parts[0].name, t.begin) for t in plan.tasks_of(number)}
        assert starts <= {(t.name, t.begin) for t in found.tensors}
        assert {t.name for t in found.tensors} == {part.name for t in plan.tasks_of(number) for part in t.parts}
        parts = [part for t in plan.tasks_of(number) for part in t.parts]
        shortest = build_header([(part.name, part.dtype, part.shape) for part in parts])
        assert raw[8:] == shortest[8:].ljust(len(raw) - 8)
        assert len(raw) - len(shortest) < BLOCK_NBYTES


@given(st.lists(st.tuples(MATRIX, st.integers(0, 2)), min_size=1, max_size=12), st.integers(2, 2000))
def test_what_is_copied_has_the_place_in_its_block_that_it_has_in_the_base(
    tensors: list[tuple[tuple[int, int], int]], eighths: int
) -> None:
    begin, shard = 8 * eighths, []
    for number, (shape, r) in enumerate(tensors):
        tensor = wanted(f"t{number}", shape, r=r)
        spec = replace(tensor.source.data, begin=begin)
        shard.append(replace(tensor, source=replace(tensor.source, data=spec)))
        begin += spec.nbytes
    plan = plan_of({"f": shard})
    copied = [task for task in plan.tasks if task.kind == "copy"]
    shifts = {task.begin - task.source.data.begin for task in copied}
    assert len(shifts) == bool(copied)
    ranges = [one for segment in plan.segments for one in untouched(plan.tasks, segment.pieces)]
    blocks = [whole_blocks(one.begin, one.nbytes) for one in ranges]
    in_base = [whole_blocks(task.source.data.begin, task.nbytes) for task in copied]
    if any(last > first for first, last in in_base):
        assert {shift % BLOCK_NBYTES for shift in shifts} == {0}
    # Where blocks are shared and what is reserved lie side by side, but for a block between two segments.
    assert sum(one.nbytes for one in ranges) == sum(task.nbytes for task in copied)
    assert {one.source - one.begin for one in ranges} <= {-shift for shift in shifts}
    reserved = spans_to_reserve(plan, 0)
    for first, last in (span for span in blocks if span[1] > span[0]):
        assert all(end <= first or last <= start for start, end in reserved)
    left = plan.files[0].nbytes - sum(last - first for first, last in reserved)
    assert 0 <= left - sum(max(0, last - first) for first, last in blocks) <= 2 * BLOCK_NBYTES * len(plan.segments)


def test_a_file_that_nothing_is_copied_to_has_the_shortest_header_and_a_tensor_that_moved_counts_by_its_blocks() -> (
    None
):
    def shard(*, r: int) -> list[Any]:
        found = []
        for name, shape, begin in (("small", (1, 4096), 8 * 77), ("large", (1, 16384), 8 * 99), ("odd", (9, 9000), 99)):
            tensor = wanted(name, shape, r=r)
            spec = replace(tensor.source.data, begin=begin)
            found.append(replace(tensor, source=replace(tensor.source, data=spec)))
        return found

    (file,), tasks = place({"f": shard(r=1)})
    assert file.data_begin == len(build_header([(t.name, t.dtype, t.source.shape) for t in tasks]))
    _, tasks = place({"f": shard(r=0)})
    assert [(task.begin - task.source.data.begin) % BLOCK_NBYTES == 0 for task in tasks] == [False, True, False]


def test_loading_16_bit_factors_has_room_for_them_in_float64() -> None:
    (change,) = task_of(wanted("t", (64, 4096), r=16)).changes
    tensors = {
        role: replace(view, spec=replace(view.spec, dtype="BF16", nbytes=view.spec.nbytes // 2))
        for role, view in change.tensors.items()
    }
    assert replace(change, tensors=tensors).loading_nbytes == 8 * 16 * (64 + 4096) + 24 * 16**2
    stack = {role: replace(view, size=(4, *view.size[1:])) for role, view in tensors.items()}
    assert replace(change, tensors=stack).loading_nbytes == (4 * 4 + 2) * 16 * (64 + 4096) + 24 * 16**2, "one by one"


@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_change_holds_counts_the_panels_of_its_wide_factor(transposed: bool) -> None:
    (change,) = task_of(wanted("t", (64, 100), r=3)).changes
    b = change.tensors["b"]
    b = replace(b, size=(1, 2, 32, 3), stride=(0, 96, 3, 1))  # its rows in another order, as torchtune saves them
    held = replace(change, tensors={**change.tensors, "b": b}, transposed=transposed).held_nbytes
    assert held == 4 * 3 * (64 + 100) + 4 * 3 * (64 if transposed else 128)
