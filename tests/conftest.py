"""Fixtures that several folders share: the command line as a process, digests, tiny bases and adapters."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: torch's threads would only wait for each other's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests import factories

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

# torch loads kernels lazily, so the first example of a test is slow; a deadline would only flake. The examples are the
# same in every run: what is new is looked for by `make fuzz`.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child process, without what a launcher or an earlier test may have left in it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DISTMERGE_", "TORCHELASTIC_"))}
    return {**clean, "OMP_NUM_THREADS": "1", **variables}


@pytest.fixture
def distmerge(tmp_path: Path) -> Command:
    """Runs `python -m distmerge ARGS` and returns the finished process; `code` is the exit code it must have."""

    def run(*args: object, code: int | None = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "distmerge", *map(str, args)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=environment(**variables), check=False
        )
        assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def torchrun() -> Command:
    """Runs `torchrun --nproc-per-node N -m distmerge ARGS`."""

    def run(
        *args: object, nproc: int, code: int | None = 0, options: tuple[str, ...] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", *options]
        command += ["-m", "distmerge", *map(str, args)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=environment(**variables), check=False
        )
        assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file in `folder`."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama in several shards. Read only."""
    return factories.save_base(tmp_path_factory.mktemp("base") / "llama", shard="60KB")


@pytest.fixture(scope="session")
def packed_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Llama in NF4 with double quantization, in several shards. Read only."""
    return factories.save_packed_base(tmp_path_factory.mktemp("packed") / "llama-nf4", shard="20KB")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on every linear, alpha != r. Read only."""
    return factories.save_adapter(tmp_path_factory.mktemp("adapter") / "lora")
