"""Limits of memory: what the machine, control groups of both versions and the address space leave to a rank."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from distmerge.storage import memory
from distmerge.storage.memory import Limit, memory_left, memory_limits, memory_nbytes

GIB = 1 << 30
MEMINFO = f"MemTotal: {64 << 20} kB\nMemAvailable: {40 << 20} kB\nSwapFree: {2 << 20} kB\nHugePages_Total: 0\n"


def machine(root: Path, files: dict[str, str | int], *, cgroup: str, mounts: str) -> Path:
    """A folder that holds what the kernel shows of itself."""
    shown = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts, **files}
    for name, text in shown.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def mount(shown: str, place: str, kind: str) -> str:
    return f"31 23 0:28 {shown} {place} rw,nosuid shared:9 - {kind}"


V1 = "cgroup cgroup rw,memory"
V2 = "cgroup2 cgroup2 rw,nsdelegate"
OTHER = mount("/", "/sys/fs/cgroup/cpu", "cgroup cgroup rw,cpu")


def of_groups(limits: list[Limit]) -> dict[str, tuple[int, int]]:
    return {limit.name: (limit.nbytes, limit.left) for limit in limits[1:]}


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    (limit,) = memory_limits(machine(tmp_path, {}, cgroup="", mounts=OTHER))
    assert (limit.left, limit.shared) == (42 * GIB, True)
    assert limit.nbytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_group_of_version_2_and_its_parents_are_limits_and_their_file_cache_is_none(tmp_path: Path) -> None:
    job = "sys/fs/cgroup/slurm/job"
    files: dict[str, str | int] = {
        f"{job}/memory.max": 8 * GIB,
        f"{job}/memory.current": 5 * GIB,
        f"{job}/memory.stat": f"anon {2 * GIB}\nactive_file {GIB}\ninactive_file {GIB}\nslab_reclaimable {GIB}\n",
        f"{job}/step/memory.max": "max",
        "sys/fs/cgroup/slurm/memory.max": 7 * GIB,
        "sys/fs/cgroup/slurm/memory.current": 6 * GIB,
    }
    root = machine(tmp_path, files, cgroup="0::/slurm/job/step", mounts=mount("/", "/sys/fs/cgroup", V2))
    assert of_groups(memory_limits(root)) == {
        "the control group sys/fs/cgroup/slurm/job": (8 * GIB, 6 * GIB),
        "the control group sys/fs/cgroup/slurm": (7 * GIB, GIB),
    }


@pytest.mark.parametrize(
    ("shown", "told"),
    [("/", "/docker/a b"), ("/docker/a\\040b", "/docker/a b"), ("/", "/seen/from/outside")],
    ids=["whole hierarchy", "a part of it", "a path from outside"],
)
def test_a_group_of_version_1_is_a_limit_wherever_it_is_mounted(shown: str, told: str, tmp_path: Path) -> None:
    here = "sys/fs/cgroup/memory" + ("/docker/a b" if told == "/docker/a b" and shown == "/" else "")
    files: dict[str, str | int] = {
        f"{here}/memory.limit_in_bytes": 3 * GIB,
        f"{here}/memory.usage_in_bytes": 2 * GIB,
        f"{here}/memory.stat": f"active_file 5\ntotal_active_file {GIB}\ntotal_inactive_file 7\n",
    }
    if here != "sys/fs/cgroup/memory":
        files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = 9223372036854771712
    mounts = "\n".join([OTHER, mount(shown, "/sys/fs/cgroup/memory", V1)])
    root = machine(tmp_path, files, cgroup=f"5:cpu:/\n4:memory:{told}\n0::/elsewhere", mounts=mounts)
    assert of_groups(memory_limits(root)) == {f"the control group {here}": (3 * GIB, 2 * GIB + 7)}


def test_a_mount_whose_name_is_no_utf_8_is_no_error(tmp_path: Path) -> None:
    group = os.fsdecode(b"caf\xe9")
    files: dict[str, str | int] = {f"sys/fs/cgroup/{group}/memory.max": GIB}
    mounts = [mount("/", "/media/\xe9", "vfat x rw"), mount("/", "/sys/fs/cgroup", V2)]
    machine(tmp_path, files, cgroup="", mounts="")
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/caf\xe9\n")
    (tmp_path / "proc/self/mountinfo").write_bytes("\n".join(mounts).encode("latin-1"))
    assert of_groups(memory_limits(tmp_path)) == {f"the control group sys/fs/cgroup/{group}": (GIB, GIB)}


def test_what_the_kernel_does_not_tell_is_no_limit(tmp_path: Path) -> None:
    assert [limit.name for limit in memory_limits(tmp_path)] == ["the memory of this machine"]
    assert memory_limits(tmp_path)[0].left == memory_limits(tmp_path)[0].nbytes


def test_address_space_is_a_limit_of_each_process_and_all_else_of_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(nbytes: int) -> Limit:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (nbytes, nbytes))
        return memory_limits()[-1]

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    space = limited(used + GIB)
    assert space.name.startswith("the limit of address space")
    assert (space.shared, abs(space.left - GIB) < 1 << 28) == (False, True)
    assert limited(1).left == 0
    known = [Limit(name="group", nbytes=8, left=6, shared=True), Limit(name="space", nbytes=5, left=4, shared=False)]
    monkeypatch.setattr(memory, "memory_limits", lambda: known)
    assert [(memory_left(n).name, memory_left(n).left) for n in (1, 2)] == [("space", 4), ("group", 3)]
    assert [memory_left(1, mapped_nbytes=n).left for n in (3, 9)] == [1, 0]
    assert memory_nbytes() == 8
