"""Boxes: read off strides they are the parts that torch's own views are, and a partition covers every element once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from distmerge.adapter.naming.boxes import box_of, is_partition
from distmerge.adapter.naming.slots import Slot
from tests.models import cut

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor without two equal elements, and a view of it."""
    shape = draw(shapes)
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = whole
    for dim, length in enumerate(shape):
        start = draw(st.integers(0, length - 1))
        view = view.narrow(dim, start, draw(st.integers(1, length - start)))
    view = view.permute(draw(st.permutations(range(view.dim()))))
    for dim in reversed(range(view.dim())):
        if view.shape[dim] == 1 and draw(st.booleans()):
            view = view.squeeze(dim)
    return whole, view


@given(views())
def test_a_view_is_the_box_that_its_strides_tell(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    whole, view = pair
    box = box_of("part", tuple(whole.shape), view.storage_offset(), tuple(view.shape), view.stride())
    assert box is not None
    assert box.shape == tuple(view.shape)
    assert torch.equal(cut(whole, box), view)


def test_a_view_that_is_no_box_is_none() -> None:
    def box(view: torch.Tensor) -> Slot | None:
        return box_of("part", (4, 6), view.storage_offset(), tuple(view.shape), view.stride())

    whole = torch.arange(24).reshape(4, 6)
    assert box(whole) == Slot.whole("part", (4, 6))
    assert box(whole[::2]) is None
    assert box(whole[:, 1::2]) is None
    assert box(whole.flatten()) is None
    assert box(whole.reshape(2, 2, 6)) is None
    assert box(whole.unsqueeze(0)) is None
    assert box(whole.diagonal()) is None
    assert box(whole[:1].expand(3, 6)) is None
    assert box(whole[:0]) is None
    assert box(whole.as_strided((2, 4), (6, 1), 4)) is None  # runs over the end of a row
    assert box(whole.as_strided((6, 6), (1, 1))) is None


@given(shapes, st.data())
def test_a_partition_covers_every_element_once(shape: tuple[int, ...], data: st.DataObject) -> None:
    slots, covered = [], torch.zeros(shape)
    pieces = [(tuple(0 for _ in shape), shape)]
    for _ in range(data.draw(st.integers(0, 4))):
        starts, sizes = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        first = data.draw(st.integers(1, sizes[dim]))
        parts = [(starts, first), ((*starts[:dim], starts[dim] + first, *starts[dim + 1 :]), sizes[dim] - first)]
        pieces += [(at, (*sizes[:dim], length, *sizes[dim + 1 :])) for at, length in parts if length]
    for at, lengths in pieces:
        moved = tuple(start + data.draw(st.sampled_from([0, 0, 0, 0, 1])) for start in at)
        if data.draw(st.integers(0, 9)) and all(a + n <= end for a, n, end in zip(moved, lengths, shape, strict=True)):
            slots.append(Slot(name="part", starts=moved, sizes=lengths, order=tuple(range(len(shape)))))
            covered[tuple(slice(a, a + n) for a, n in zip(moved, lengths, strict=True))] += 1
    assert is_partition(shape, slots) == bool(torch.all(covered == 1))


def test_a_box_beyond_the_end_is_no_part() -> None:
    first, second = (Slot(name="part", starts=(start,), sizes=(2,), order=(0,)) for start in (0, 3))
    assert not is_partition((4,), [first, second])
