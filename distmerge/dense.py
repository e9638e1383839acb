"""Stored tensors as floats: a range of elements read through fixed buffers and dequantized on the device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
from distmerge.checkpoint.packing import Foreign, FourBit, Packing, Scaled, Simulated, Stored
from distmerge.numerics import nf4, scaled
from distmerge.numerics.compiled import unpack_codes
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.packing4 import Nested
from distmerge.numerics.survival import squared
from distmerge.plan import Plan
from distmerge.rounding import Rounding


class Read(Protocol):
    """Fills `view` with the bytes of a tensor of the base, or of adapter number `origin`, from byte `offset` on."""

    def __call__(self, spec: TensorSpec, offset: int, view: memoryview, *, origin: int = 0) -> None: ...


class Buffers:
    """Room for one block on its way in: as stored, as codes, and in float32; on an accelerator with a pinned copy of
    the first on the host."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        stored = max(task.stored_block_nbytes for task in plan.tasks)
        packed = max((task.largest_block_numel for task in plan.tasks if task.source.packing), default=0)
        self.stored, self.host = host_pair(stored, device)
        self.view = view_of(self.host)
        self.work = torch.empty(plan.block_numel + 2, dtype=torch.float32, device=device)
        self.dense = torch.empty(4 * packed, dtype=torch.uint8, device=device)
        self.lost_squared = 0.0
        """Of what was read last, the sum of (plain - simulated)^2; 0 where nothing is simulated."""
        self.index = torch.empty(packed and packed // 2 + 1, dtype=torch.int32, device=device)

    def upload(self, nbytes: int) -> Tensor:
        """The first `nbytes` of what was read, on the device."""
        if self.stored is not self.host:
            self.stored[:nbytes].copy_(self.host[:nbytes], non_blocking=True)
        return self.stored[:nbytes]


class Dense:
    """Dequantizes what `read` gives, on `device`; several threads may use it, each with buffers of its own."""

    def __init__(self, read: Read, device: torch.device, *, kept_nbytes: int = 0) -> None:
        self._read, self._device = read, device
        self._tables: dict[bytes, Tensor] = {}
        self._rounding = Rounding(device, kept_nbytes)
        settle(device)

    def read(self, buffers: Buffers, stored: Stored, first: int, last: int, *, origin: int = 0) -> Tensor:
        """Elements [first, last) of `stored` in its dense dtype, on the device."""
        buffers.lost_squared = 0.0
        if stored.packing is None:
            return self._plain(buffers, stored, first, last, origin)
        if isinstance(stored.packing, Simulated):
            return self._simulated(buffers, stored, stored.packing, first, last)
        return self._packed(buffers, stored.data, stored.packing, first, last)

    def knows(self, name: str) -> bool:
        """True if what `learn` was told of the simulated tensor `name` is still kept."""
        return self._rounding.kept(name) is not None

    def measure(self, buffers: Buffers, stored: Stored, packing: Simulated, first: int, last: int) -> Tensor:
        """The scales, float32 on the device, of the blocks that are elements [first, last) of a simulated tensor."""
        return self._rounding.scales(stored.name, packing, self._plain(buffers, stored, first, last, 0))

    def learn(self, name: str, packing: Simulated, scales: Sequence[Tensor]) -> Nested:
        """Keeps what is made of the scales of the simulated tensor `name`: those of all its spans, in order."""
        settle(self._device)
        nested = self._rounding.learn(name, packing, torch.cat(tuple(scales)))
        settle(self._device)
        return nested

    def _simulated(self, buffers: Buffers, stored: Stored, packing: Simulated, first: int, last: int) -> Tensor:
        nested = self._rounding.kept(stored.name) if packing.double else None
        if packing.double and nested is None:
            scales = [self.measure(buffers, stored, packing, *span) for span in packing.spans()]
            nested = self.learn(stored.name, packing, scales)
        begin, end = packing.around(first, last)
        plain = self._plain(buffers, stored, begin, end, 0)
        inside = slice(first - begin, last - begin)
        rounded = self._rounding.round(stored.name, packing, plain, begin=begin, nested=nested)[inside]
        buffers.lost_squared = squared(plain[inside].float() - rounded)
        return rounded

    def _plain(self, buffers: Buffers, stored: Stored, first: int, last: int, origin: int) -> Tensor:
        """Elements [first, last) as they are stored."""
        size = ITEMSIZE[stored.data.dtype]
        self._read(stored.data, first * size, buffers.view[: (last - first) * size], origin=origin)
        return buffers.upload((last - first) * size).view(torch_dtype(stored.data.dtype))

    def _packed(self, buffers: Buffers, data: TensorSpec, packing: Packing, first: int, last: int) -> Tensor:
        if isinstance(packing, Foreign | Simulated) or first % packing.block_numel or last % packing.block_numel:
            raise ValueError(f"{data.name} is not read in elements [{first}, {last})")
        dense = buffers.dense.view(torch_dtype(packing.dtype))[: last - first]
        if isinstance(packing, FourBit):
            absmax = self._absmax(packing, first, last)
            table = self._table(packing.quant_map, nf4.pair_table)
            codes = self._pairs(buffers, data, first, last)
            where = {"first": first, "blocksize": packing.blocksize}
            if not packing.transposed and unpack_codes(codes, table, absmax, dense, **where):
                return dense
            values = self._looked_up(buffers, codes, table, first, last)
            nf4.scale(values, absmax, **where)
        else:
            values = self._codes(buffers, data, packing, first, last)
            self._scale(values, packing, first, last)
        if not packing.transposed:
            return dense.copy_(values)
        rows, cols = packing.shape[-2:]
        dense.view(-1, rows, cols).copy_(values.view(-1, cols, rows).mT)
        return dense

    def _codes(self, buffers: Buffers, data: TensorSpec, packing: Scaled, first: int, last: int) -> Tensor:
        """Elements [first, last) as they are stored, in float32, without their scales."""
        if packing.halves:
            return self._looked_up(buffers, self._pairs(buffers, data, first, last), self._e2m1(), first, last)
        self._read(data, first, buffers.view[: last - first])
        if data.dtype == "I8":
            return buffers.work[: last - first].copy_(buffers.upload(last - first).view(torch.int8))
        pairs = -(-(last - first) // 2)
        table = self._float8(torch_dtype(data.dtype))
        stored = buffers.upload(2 * pairs).view(torch.uint16)  # of an odd number the last one means nothing
        nf4.unpack(stored, table, buffers.index[:pairs], buffers.work[: 2 * pairs])
        return buffers.work[: last - first]

    def _pairs(self, buffers: Buffers, data: TensorSpec, first: int, last: int) -> Tensor:
        """The bytes that hold the 4-bit codes of elements [first, last), on the device."""
        nbytes = -(-last // 2) - first // 2
        self._read(data, first // 2, buffers.view[:nbytes])
        return buffers.upload(nbytes)

    def _looked_up(self, buffers: Buffers, pairs: Tensor, table: Tensor, first: int, last: int) -> Tensor:
        """What the 4-bit codes in `pairs` stand for, elements [first, last), in float32."""
        nf4.unpack(pairs, table, buffers.index[: len(pairs)], buffers.work[: 2 * len(pairs)])
        return buffers.work[first % 2 :][: last - first]

    def _scale(self, values: Tensor, packing: Scaled, first: int, last: int) -> None:
        """Multiplies `values`, elements [first, last) in the order of the file, by the scales of their blocks."""
        height, cols = packing.matrix
        begin = 0
        for span in scaled.spans(first, last, cols):
            part = values[begin : begin + span.numel].view(span.bottom - span.top, -1)
            begin += span.numel
            if packing.zero is not None:
                zeros = self._grid(packing.zero, packing, span).float()
                for piece, zero in scaled.blocks(part, zeros, span, height=height, block=packing.block):
                    piece.sub_(zero)
            scales = scaled.as_scales(self._grid(packing.scale, packing, span))
            for piece, scale in scaled.blocks(part, scales, span, height=height, block=packing.block):
                piece.mul_(scale)
        if packing.factor != 1:
            values.mul_(packing.factor)

    def _grid(self, spec: TensorSpec, packing: Scaled, span: scaled.Span) -> Tensor:
        """The rows of a grid of scales that belong to `span`, as stored."""
        height, cols = packing.matrix[0], packing.grid[1]
        begin = scaled.grid_row(span.top, height, packing.block[0])
        end = scaled.grid_row(span.bottom - 1, height, packing.block[0]) + 1
        return self._items(spec, begin * cols, end * cols).view(end - begin, cols)

    def _absmax(self, packing: FourBit, first: int, last: int) -> Tensor:
        """The float32 scales of the blocks that hold elements [first, last), from the file."""
        begin, end = first // packing.blocksize, (last - 1) // packing.blocksize + 1
        if packing.nested_absmax is not None and packing.nested_quant_map is not None:
            size = packing.nested_blocksize
            codes = self._items(packing.absmax, begin, end)
            scales = self._items(packing.nested_absmax, begin // size, (end - 1) // size + 1)
            table = self._table(packing.nested_quant_map, lambda quant_map: quant_map)
            return nf4.nested_absmax(codes, table, scales, first=begin, blocksize=size, offset=packing.nested_offset)
        if len(packing.absmax.shape) == 1:
            return self._items(packing.absmax, begin, end).float()
        # Written as (in / blocksize, out): each of the tensor's rows is a column there.
        per_row, rows = packing.absmax.shape
        top, bottom = begin // per_row, (end - 1) // per_row + 1
        columns = [self._items(packing.absmax, k * rows + top, k * rows + bottom) for k in range(per_row)]
        return torch.stack(columns, dim=1).float().view(-1)[begin - top * per_row : end - top * per_row]

    def _items(self, spec: TensorSpec, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a small tensor, on the device."""
        size = ITEMSIZE[spec.dtype]
        data = bytearray((end - begin) * size)
        self._read(spec, begin * size, memoryview(data))
        return torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).to(self._device)

    def _e2m1(self) -> Tensor:
        return self._made(b"e2m1", lambda: scaled.low_first(scaled.E2M1.to(self._device)))

    def _float8(self, dtype: torch.dtype) -> Tensor:
        return self._made(str(dtype).encode(), lambda: scaled.float8_pairs(dtype).to(self._device))

    def _table(self, spec: TensorSpec, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make` of a code table; nearly every tensor holds the same one, so that it is made once."""
        data = bytearray(spec.nbytes)
        self._read(spec, 0, memoryview(data))
        return self._made(bytes(data), lambda: make(torch.frombuffer(data, dtype=torch.float32).to(self._device)))

    def _made(self, key: bytes, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._tables:
            table = make()
            settle(self._device)
            self._tables[key] = table
        return self._tables[key]


def settle(device: torch.device) -> None:
    """Waits for the accelerator: what one stream made, the lanes' other streams are about to use."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def host_pair(nbytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`nbytes` bytes on the device, and their pinned twin on the host; on the CPU the same tensor twice."""
    tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return tensor, tensor if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def view_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the host; valid as long as the tensor lives."""
    return memoryview((ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())).cast("B")
