"""Weight files that are read back from storage before they get their names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from distmerge import AdapterChoice, MergeConfig, follower, work
from distmerge.errors import UsageError, VerifyError
from distmerge.plan import make_plan
from tests.conftest import tree
from tests.factories import merge
from tests.io.test_digests import KINDS, config_for
from tests.io.test_followers import halfway, long  # noqa: F401 - a fixture


@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_storage_gives_back_otherwise_gets_no_name_and_is_written_again(
    kind: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = merge(base, adapter, tmp_path / "alone", digest=kind)
    real = work.drop_cache

    def rotten(fd: int, offset: int, nbytes: int) -> None:
        real(fd, offset, nbytes)
        last = os.pread(fd, 1, nbytes - 1)
        os.pwrite(fd, bytes([last[0] ^ 4]), nbytes - 1)

    with monkeypatch.context() as broken:
        broken.setattr(work, "drop_cache", rotten)
        with pytest.raises(VerifyError, match="other bytes") as caught:
            merge(base, adapter, tmp_path / "out", digest=kind, read_back=True)
        assert caught.value.where.endswith(".safetensors")
        assert "run the same command again" in caught.value.hint
        assert not (tmp_path / "out").exists()
        if kind != "crc32":
            assert not list((tmp_path / "out.distmerge" / "model").glob("*.safetensors"))
        merge(base, adapter, tmp_path / "unseen", digest=kind)
    merge(base, adapter, tmp_path / "out", digest=kind, read_back=True)
    assert tree(tmp_path / "out") == tree(alone)


@pytest.mark.parametrize(("kind", "times"), [("sha256", 2), ("crc32", 1)])
def test_every_byte_is_read_once_more_after_the_file_is_durable_and_out_of_the_cache(
    kind: str,
    times: int,
    *,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    done: dict[str, list[str]] = {}

    def note(module: Any, name: str, path: Any) -> None:
        real = getattr(module, name)

        def noted(*args: Any) -> Any:
            done.setdefault(path(*args), []).append(name)
            return real(*args)

        monkeypatch.setattr(module, name, noted)

    def name_of(fd: int, *_: Any) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name.removesuffix(".part")

    note(follower, "read_exact", name_of)
    note(work, "drop_cache", name_of)
    note(os, "fsync", name_of)
    out = merge(base, adapter, tmp_path / "out", digest=kind, read_back=True)
    assert ", read back from storage" in capfd.readouterr().err
    for path in out.glob("*.safetensors"):
        steps = done[path.name]
        assert steps.count("drop_cache") == 1
        after = steps[steps.index("drop_cache") :]
        assert steps[steps.index("drop_cache") - 1] == "fsync"
        assert after.count("read_exact") * times == steps.count("read_exact") > 0


def test_files_that_an_earlier_run_has_ended_are_read_back_too(
    long: tuple[Path, Path],  # noqa: F811 - the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = len(make_plan(config_for(*long, tmp_path / "out"), "cpu").segments_of(0))
    plan, _ = halfway(long, tmp_path / "out", "sha256", first)
    dropped: list[int] = []
    monkeypatch.setattr(work, "drop_cache", lambda fd, offset, nbytes: dropped.append(nbytes))
    merge(*long, tmp_path / "out", read_back=True)
    assert sorted(dropped) == sorted(file.nbytes for file in plan.files)


def test_without_a_digest_there_is_nothing_to_compare_with(base: Path, adapter: Path) -> None:
    choices = (AdapterChoice(folder=adapter),)
    with pytest.raises(UsageError, match="no digest to compare with") as caught:
        MergeConfig(base=base, adapters=choices, output=Path("out"), digest="none", read_back=True)
    assert "--digest crc32" in caught.value.hint
    config = MergeConfig(base=base, adapters=choices, output=Path("out"), read_back=True)
    assert "--read-back" in config.to_argv()
