"""Checksums of files: which there are, what computes them, and CRC-32s joined by arithmetic; the only door to isal and
xxhash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from distmerge.errors import UsageError
from distmerge.storage.files import pieces_of

try:
    from isal.isal_zlib import crc32 as _crc32  # the same values, ten times as fast
except ImportError:
    from zlib import crc32 as _crc32

_POLYNOMIAL = 0xEDB88320  # of CRC-32, its lowest power in the highest bit
_BITS = tuple(1 << bit for bit in range(31, -1, -1))  # the powers of x from 0 on, in that order of bits
HEX_DIGITS = {"sha256": 64, "crc32": 8, "xxh3": 16, "none": 0}  # of each kind of digest
READ_BACK = ("sha256", "xxh3")  # what needs the bytes in their order; CRC-32s of parts can be joined


class Hasher(Protocol):
    """What takes a file's bytes in pieces and gives its digest in hex."""

    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def crc32(data: memoryview | bytes, before: int = 0) -> int:
    """The CRC-32 (IEEE 802.3, as zlib's) of bytes that follow others whose CRC-32 is `before`."""
    return _crc32(data, before)


def join_crc32s(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of runs of bytes that follow one another, from that of each and its length in bytes.

    A CRC is linear: n zero bytes behind a run multiply its CRC by x^8n modulo the polynomial, and the CRC of what
    stands in their place is added without a carry (as zlib's crc32_combine).
    """
    joined = 0
    for crc, nbytes in parts:
        joined = _times(joined, _shift(nbytes)) ^ crc
    return joined


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> tuple[int, ...]:
    """What takes a product with x^(8 nbytes), found by squaring."""
    power, square = _BITS[0], _BITS[8]
    while nbytes:
        if nbytes & 1:
            power = _times(power, _multiples(square))
        square = _times(square, _multiples(square))
        nbytes >>= 1
    return _multiples(power)


def _multiples(polynomial: int) -> tuple[int, ...]:
    """The products of a polynomial with 1, x, x^2, ..., x^31 modulo the CRC's polynomial, over GF(2)."""
    found = [polynomial]
    for _ in _BITS[1:]:
        polynomial = (polynomial >> 1) ^ (_POLYNOMIAL if polynomial & 1 else 0)
        found.append(polynomial)
    return tuple(found)


def _times(polynomial: int, multiples: tuple[int, ...]) -> int:
    """The product of a polynomial and the one that has these multiples."""
    product = 0
    for bit, multiple in zip(_BITS, multiples, strict=True):
        if polynomial & bit:
            product ^= multiple
    return product


class _Crc32:
    """CRC-32 as a hasher: 8 hex digits."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = crc32(data, self._value)

    def hexdigest(self) -> str:
        return crc32_text(self._value)


def crc32_text(value: int) -> str:
    """A CRC-32 as receipts write it: 8 hex digits."""
    return f"{value:08x}"


def hasher(kind: str) -> Hasher:
    """A new hasher of the kind `sha256`, `crc32` or `xxh3`. Raises UsageError if it is not there."""
    made: dict[str, Callable[[], Hasher]] = {"sha256": hashlib.sha256, "crc32": _Crc32, "xxh3": _xxh3}
    return made[kind]()


def require(kind: str) -> None:
    """Raises UsageError if digests of this kind cannot be computed here; `none` always can."""
    if kind != "none":
        hasher(kind)


def _xxh3() -> Hasher:
    try:
        from xxhash import xxh3_64
    except ImportError:
        raise UsageError(
            "xxhash is not installed", where="--digest xxh3", hint="pip install 'distmerge[xxh3]', on every node"
        ) from None
    return xxh3_64()


def digest_of(path: Path, kind: str) -> str:
    """The digest of the file in hex, read in pieces."""
    found = hasher(kind)
    for piece in pieces_of(path):
        found.update(piece)
    return found.hexdigest()
