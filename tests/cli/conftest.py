"""The command line in this process: as fast as a call, with the exit code and both streams of a process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from distmerge.cli.main import main


@dataclass(frozen=True)
class Said:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `distmerge ARGS`, which must exit with `code`; keywords are environment variables."""
    for name in list(os.environ):
        if name.startswith("DISTMERGE_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)

    def run(*args: object, code: int = 0, **variables: str) -> Said:
        out, err = (
            io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how) for how in ("strict", "backslashreplace")
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["distmerge", *map(str, args)])
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as caught:
                main()
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
        said = Said(int(caught.value.code or 0), *texts)
        assert said.code == code, f"exit {said.code}\n{said.out}\n{said.err}"
        assert "Traceback" not in said.err
        assert "\x1b" not in said.out + said.err
        return said

    return run


@dataclass(frozen=True)
class Inputs:
    """The arguments that every merge of a test shares."""

    base: Path
    adapter: Path
    output: Path

    @property
    def folders(self) -> tuple[object, ...]:
        return ("--base", self.base, "--adapter", self.adapter, "--output", self.output)


@pytest.fixture
def inputs(base: Path, adapter: Path, tmp_path: Path) -> Inputs:
    """The shared base and adapter (read only), and an output of the test's own."""
    return Inputs(base=base, adapter=adapter, output=tmp_path / "out")
