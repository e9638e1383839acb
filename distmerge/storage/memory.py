"""Memory that this process may still take: of the machine, of its control groups, and of its own address space."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_UNLIMITED = 1 << 60  # what version 1 writes for no limit is a little less than 2^63
_CACHE = ("active_file", "inactive_file", "slab_reclaimable")  # of version 2: the kernel gives it back
_ALL_CACHE = ("total_active_file", "total_inactive_file")  # of version 1, with the groups below


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit of memory: what sets it, its bytes and how many of them are left; `shared` with other processes."""

    name: str
    nbytes: int
    left: int
    shared: bool


def memory_nbytes() -> int:
    """Bytes of memory that this machine has, or the control group of this process, if that allows less."""
    return min(limit.nbytes for limit in memory_limits() if limit.shared)


def memory_left(num_ranks: int, *, mapped_nbytes: int = 0) -> Limit:
    """The limit that leaves least to each of `num_ranks` processes like this one, with what it leaves to one that also
    maps a file of `mapped_nbytes`, which takes address space alone."""
    parts = [
        replace(limit, left=limit.left // num_ranks if limit.shared else max(0, limit.left - mapped_nbytes))
        for limit in memory_limits()
    ]
    return min(parts, key=lambda part: part.left)


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """Every limit that holds for this process, the machine's first; `root` is where /proc is found."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known = _counters(root / "proc/meminfo")
    free = 1024 * (known.get("MemAvailable:", total >> 10) + known.get("SwapFree:", 0))
    return [
        Limit(name="the memory of this machine", nbytes=total, left=free, shared=True),
        *_group_limits(root),
        *_address_space(root),
    ]


def _address_space(root: Path) -> Iterator[Limit]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int((_text(root / "proc/self/statm") or "0").split()[0])
        left = max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))
        yield Limit(name="the limit of address space (ulimit -v)", nbytes=limit, left=left, shared=False)


def _group_limits(root: Path) -> Iterator[Limit]:
    """The limits of the control groups of this process and of their parents, of versions 1 and 2."""
    for folder, mount in _groups(root):
        for group in (folder, *folder.parents):
            names = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
            for maximum, usage in names:
                limit = _number(group / maximum)
                if limit is not None and limit < _UNLIMITED:
                    stat = _counters(group / "memory.stat")
                    cache = max(sum(stat.get(name, 0) for name in part) for part in (_CACHE, _ALL_CACHE))
                    left = max(0, limit - max(0, (_number(group / usage) or 0) - cache))
                    name = f"the control group {group.relative_to(root) if root != Path('/') else group}"
                    yield Limit(name=name, nbytes=limit, left=left, shared=True)
            if group == mount:
                break


def _groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """The folders of the memory groups of this process, each with where its hierarchy is mounted."""
    own = {}
    told = _text(root / "proc/self/cgroup") or ""
    for controllers, path in re.findall(r"^\d+:(.*?):(.*)$", told, re.MULTILINE):
        if not controllers or "memory" in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = path
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        place, _, kind = line.partition(" - ")
        fields, (fstype, _, options) = place.split(), (kind.split() + 3 * [""])[:3]
        if len(fields) < 5 or fstype not in own or (fstype == "cgroup" and "memory" not in options.split(",")):
            continue
        shown, mount = (re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), field) for field in fields[3:5])
        folder = root / mount.lstrip("/")
        # In a container the mount shows a part of the hierarchy, or the path is told as seen from outside.
        inside = os.path.relpath(own[fstype], shown)
        inside = "" if inside.startswith("..") else inside
        yield (folder / inside if (folder / inside).is_dir() else folder), folder


def _counters(path: Path) -> dict[str, int]:
    rows = (line.split() for line in (_text(path) or "").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")  # paths are bytes
    except OSError:
        return None
