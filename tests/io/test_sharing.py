"""Untouched blocks that the output shares with the base, on file systems that have that: less is written, nothing else
differs."""

from __future__ import annotations

import array
import fcntl
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distmerge import reader, work
from distmerge.receipt import read_receipt
from distmerge.storage.files import copy_range
from distmerge.storage.sharing import can_share, share_range
from tests.conftest import digests, tree
from tests.factories import build_llama, merge, save_adapter, save_base

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2000, "num_key_value_heads": 4}
MAKERS = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
DIGESTS = ("none", "crc32", "sha256")
_FIEMAP, _SYNC, _SHARED, _MAX_EXTENTS = 0xC020660B, 1, 0x2000, 500
Share = Callable[[int, int, int, int, int], bool]


@dataclass(frozen=True, kw_only=True)
class Few:
    """A base of 8 MB in several files, an adapter that leaves most of it alone, and the digests of their merge."""

    base: Path
    adapter: Path
    merged: dict[str, str]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Few:
    """Every byte of its merge was written. The headers of the base are longer than those of the output need be."""
    folder = tmp_path_factory.mktemp("few")
    base = save_base(folder / "base", shard="4MB", **SHAPE)
    for path in base.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", "history": "x" * 5003})
    model = build_llama(torch.float32, **SHAPE)
    adapter = save_adapter(folder / "lora", target_modules=["q_proj", "v_proj"], model=model)
    return Few(base=base, adapter=adapter, merged=digests(merge(base, adapter, folder / "out")))


@pytest.fixture(params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a new file system of that kind, which shares blocks."""
    make = MAKERS[request.param]
    image, folder = tmp_path / "image", tmp_path / "mounted"
    if shutil.which(make[0]) is None or os.geteuid() != 0:
        pytest.skip(f"needs root and {make[0]}")
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([*make, image], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def shared_nbytes(path: Path) -> int:
    """Bytes of the file that it shares with others, as the file system tells."""
    head = struct.pack("=QQLLLL", 0, 1 << 62, _SYNC, 0, _MAX_EXTENTS, 0)
    buffer = array.array("B", head + bytes(56 * _MAX_EXTENTS))
    with path.open("rb") as file:
        fcntl.ioctl(file, _FIEMAP, buffer, True)
    (count,) = struct.unpack_from("=L", buffer, 20)
    assert count < _MAX_EXTENTS
    extents = [struct.unpack_from("=QQQQQL", buffer, 32 + 56 * number) for number in range(count)]
    return sum(nbytes for _, _, nbytes, _, _, flags in extents if flags & _SHARED)


def free_nbytes(folder: Path) -> int:
    os.sync()
    usage = os.statvfs(folder)
    return usage.f_bfree * usage.f_frsize


def states(folder: Path) -> list[tuple[int, ...]]:
    found = [path.stat() for path in sorted(folder.iterdir())]
    return [(one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in found]


def test_untouched_blocks_take_no_room_and_the_bytes_are_those_of_any_file_system(mounted: Path, few: Few) -> None:
    base = Path(shutil.copytree(few.base, mounted / "base"))
    os.sync()
    before, content = states(base), tree(base)
    sizes = {path.name: path.stat().st_size for path in base.glob("*.safetensors")}
    for digest in DIGESTS:
        free = free_nbytes(mounted)
        output = merge(base, few.adapter, mounted / digest, digest=digest)
        assert digests(output) == few.merged
        assert free - free_nbytes(mounted) < sum(sizes.values()) // 3, digest
        shared = {name: shared_nbytes(output / name) for name in sizes}
        assert sum(shared.values()) > sum(sizes.values()) * 3 // 4, digest
    assert states(base) == before
    with (output / next(iter(sizes))).open("r+b") as file:  # on disk they part as soon as one is written to
        file.write(b"x" * (1 << 20))
    assert tree(base) == content


def by_hand(source: int, begin: int, fd: int, offset: int, nbytes: int) -> bool:
    """What sharing leaves behind, on any file system."""
    return copy_range(source, begin, fd, offset, nbytes) == nbytes


def spoilt(source: int, begin: int, fd: int, offset: int, nbytes: int) -> bool:
    """Shares, so it says, and changes the last byte."""
    done = by_hand(source, begin, fd, offset, nbytes)
    last = os.pread(fd, 1, offset + nbytes - 1)
    os.pwrite(fd, bytes([last[0] ^ 1]), offset + nbytes - 1)
    return done


def half(source: int, begin: int, fd: int, offset: int, nbytes: int) -> bool:
    """Gives up half way, with strange bytes in the other half."""
    by_hand(source, begin, fd, offset, nbytes // 2)
    os.pwrite(fd, b"?" * (nbytes - nbytes // 2), offset + nbytes // 2)
    return False


@pytest.mark.parametrize("digest", DIGESTS)
@pytest.mark.parametrize("share", [by_hand, half])
def test_what_was_shared_is_not_written_and_what_was_not_is(
    share: Share,
    digest: str,
    few: Few,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    dense = reader.Reader.read

    def counted(self: reader.Reader, spec: object, offset: int, view: memoryview, **where: int) -> None:
        read.append(len(view) * (where.get("origin", 0) == 0))
        dense(self, spec, offset, view, **where)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "share_range", share)
    monkeypatch.setattr(work, "can_share", lambda fd: True)  # there are holes then, where nothing is reserved
    monkeypatch.setattr(reader.Reader, "read", counted)
    assert digests(merge(few.base, few.adapter, tmp_path / "out", digest=digest)) == few.merged
    touched = 2 * 2 * 256 * 256 * 2
    assert (sum(read) == touched) == (share is by_hand or digest == "none"), "only what is changed is read"


def test_a_checksum_is_of_what_the_output_holds(few: Few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "share_range", spoilt)
    output = merge(few.base, few.adapter, tmp_path / "out", digest="crc32")
    receipt = read_receipt(output)
    assert receipt is not None
    assert digests(output) != few.merged
    for path in output.glob("*.safetensors"):
        assert receipt.files[path.name].digest == f"{zlib.crc32(path.read_bytes()):08x}"


def test_where_blocks_cannot_be_shared_nothing_is_done(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "to").write_bytes(b"")
    with (tmp_path / "from").open("rb") as source, (tmp_path / "to").open("r+b") as target:
        can = can_share(target.fileno())
        target.truncate(16384)
        places = [(0, 1, 16000), (8, 4088, 8000), (8, 8, 4096), (100, 100, 3000)]
        for begin, offset, nbytes in places:  # other places in their blocks; less than a block
            assert not share_range(source.fileno(), begin, target.fileno(), offset, nbytes)
        assert (tmp_path / "to").read_bytes() == bytes(16384)
        assert share_range(source.fileno(), 5, target.fileno(), 4101, 12000) == can
        wanted = bytes(4101) + (bytes(range(256)) * 64)[5:12005] + bytes(283) if can else bytes(16384)
        assert (tmp_path / "to").read_bytes() == wanted
