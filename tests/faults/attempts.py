"""Attempts at one small merge, each in a process of its own with a fault in it, and what holds whatever the fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import factories
from tests.conftest import environment, tree

ANY = -1
LOADED = (".safetensors", ".bin", ".gguf", ".pt", ".pth")  # what loaders look for
CHANGES = (
    *("create", "write", "fsync", "syncdir", "rename", "unlink", "mkdir"),
    *("ftruncate", "fallocate", "sync_file_range", "copy_file_range"),
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The `nth` of the calls named in `calls` goes wrong (0: each of them): `fail` with the error `code`, `done` and
    failed all the same, `lose` (said to be done, and not), `short`, `tear` (half of it, then SIGKILL), `kill`, `stop`.

    It concerns files below `below`, by default the output, its work folder and what else has a name that so begins.
    """

    calls: tuple[str, ...] = ()
    nth: int = 0
    kind: str = "nothing"
    code: int = 0
    below: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A merge that has ended with `code` (minus the signal), or is stopped (None), after `hits` faults, and
    its words."""

    pid: int
    code: int | None
    hits: int
    words: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.words.splitlines() if line.startswith("error: ")]

    def said_well(self) -> bool:
        """True if it ended as the exit codes promise: in words, once, and with no traceback."""
        said = 0 if self.code in (0, -signal.SIGKILL) else 1
        return len(self.errors) == said and "Traceback" not in self.words and self.code != 1

    @property
    def num_kept(self) -> int:
        found = re.search(r"resumed +(\d+) of", self.words)
        return int(found[1]) if found else 0


class Parent:
    """A process that has imported everything, under the shim, and forks one attempt after another."""

    def __init__(self, shim: Path, words: Path, argv: list[str]) -> None:
        program = Path(__file__).with_name("parent.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(LD_PRELOAD=str(shim)),
        )
        self._words, self._count = words, 0
        self._stderr: dict[int, Path] = {}
        self._ask(argv)

    def _ask(self, request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(self, argv: list[str], fault: Fault, below: Path, *, setup: str, log: Path | None) -> Attempt:
        """The attempt once it has ended or stopped."""
        self._count += 1
        stderr = self._words / f"{self._count}.txt"
        place = f"{fault.below or below}"
        what = [fault.calls, place, fault.nth, fault.kind, fault.code]
        answer = self._ask(
            {"argv": argv, "fault": what, "stderr": str(stderr), "setup": setup, "log": str(log) if log else ""}
        )
        self._stderr[answer["pid"]] = stderr
        return self._attempt(answer)

    def signal(self, pid: int, *numbers: int) -> Attempt:
        """The attempt once it has ended after these signals, or stopped again."""
        return self._attempt(self._ask({"pid": pid, "signals": numbers}))

    def _attempt(self, answer: dict[str, Any]) -> Attempt:
        words = self._stderr[answer["pid"]].read_text(errors="replace")
        return Attempt(pid=answer["pid"], code=answer["code"], hits=answer["hits"], words=words)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A base and an adapter that are read only, what an undisturbed merge makes of them, and who makes attempts."""

    base: Path
    adapter: Path
    parent: Parent
    expected: dict[str, str]
    inputs: dict[str, str] = field(repr=False)

    def argv(self, output: Path, *options: object) -> list[str]:
        inputs = ["--base", self.base, "--adapter", self.adapter, "--output", output]
        return [*map(str, ["merge", *inputs, "--nproc", 1, "--device", "cpu", *options])]

    def attempt(
        self,
        output: Path,
        *options: object,
        calls: tuple[str, ...] = (),
        nth: int = 0,
        kind: str = "nothing",
        code: int = 0,
        below: Path | None = None,
        setup: str = "",
        log: Path | None = None,
    ) -> Attempt:
        """A merge into `output` with a fault in it, once it has ended or stopped; `setup` is run in its process first,
        `log` gets the calls that it makes."""
        output.parent.mkdir(parents=True, exist_ok=True)
        fault = Fault(calls=calls, nth=nth, kind=kind, code=code, below=below)
        return self.parent.start(self.argv(output, *options), fault, output, setup=setup, log=log)

    def each(self, folder: Path, *, codes: Sequence[int] = (0,), **fault: Any) -> Iterator[tuple[int, Path, Attempt]]:
        """Attempts with the fault in the first call, in the second, ... until there is no such call, each with the next
        of `codes`, and each into an output of its own, which is removed afterwards."""
        number = 0
        while True:
            number += 1
            output = folder / str(number) / "out"
            attempt = self.attempt(output, nth=number, code=codes[(number - 1) % len(codes)], **fault)
            if attempt.hits == 0:
                assert attempt.code == 0, attempt.words
                self.assert_absent_or_whole(output)
                assert output.exists()
                assert number > 1, "no call was made"
                return
            yield number, output, attempt
            shutil.rmtree(output.parent)

    def remove(self, output: Path) -> None:
        """Removes what attempts have left."""
        for path in (output, work_of(output)):
            shutil.rmtree(path, ignore_errors=True)

    @property
    def options(self) -> tuple[object, ...]:
        """The inputs as options, which count where they stand last."""
        return ("--base", self.base, "--adapter", self.adapter)

    def copied(self, folder: Path) -> Scene:
        """The same with inputs of its own, below `folder`."""
        base, adapter = (shutil.copytree(path, folder / path.name) for path in (self.base, self.adapter))
        return replace(self, base=base, adapter=adapter)

    def of_zeros(self, folder: Path) -> Scene:
        """The same with a base whose first file holds zeros that nothing changes."""
        made = self.copied(folder)
        path = min(made.base.glob("*.safetensors"))
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
        factors = "base_model.model.model.layers.0."
        factories.rewrite_adapter(made.adapter, lambda all_: {k: v for k, v in all_.items() if factors not in k})
        return made

    # -- the invariant

    def assert_absent_or_whole(self, output: Path) -> None:
        """The output is not there, or it is all that it should be; and no file that a loader would take for weights,
        whatever its folder, is anything but a whole one."""
        if output.is_symlink() or output.exists():
            assert tree(output) == self.expected
        for path in output.parent.rglob("*"):
            if path.suffix in LOADED and path.is_file():
                digest = tree(path.parent)[path.name]
                assert digest == self.expected.get(path.name), f"{path} has a weight file's name and is not whole"

    def assert_finishes(self, output: Path, *, kept: int | None = None) -> Attempt:
        """What the fault has left is sound, and the same command finishes: equal bytes, nothing else left, no segment
        done again that was recorded, and no file written again that was ended. `kept` are segments that it may keep,
        or ANY, where not all that are recorded."""
        self.assert_absent_or_whole(output)
        wanted = 0 if output.exists() else len(self.recorded(output))
        ended = whole_files(output)
        again = self.attempt(output)
        assert again.code == 0, again.words
        assert tree(output) == self.expected
        left = sorted(str(path.relative_to(output.parent)) for path in output.parent.rglob("*"))
        assert [name for name in left if name.split("/")[0] != output.name] == [], left
        assert kept == ANY or again.num_kept == (wanted if kept is None else kept), again.words
        after = {name: (output / name).stat() for name in ended}
        assert {name: (found.st_ino, found.st_mtime_ns) for name, found in after.items()} == ended or kept is not None
        assert again.said_well(), again.words
        return again

    def recorded(self, output: Path) -> set[int]:
        """The segments that the journals of the work folder list in whole lines."""
        found = set()
        manifest = work_of(output) / "manifest.json"
        for journal in work_of(output).glob("done/*.jsonl") if manifest.exists() else ():
            for line in journal.read_bytes().split(b"\n")[:-1]:
                entry = json.loads(line)
                found |= {entry["segment"]["segment"]} if "segment" in entry else set()
        return found


def work_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.distmerge")


def whole_files(output: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each weight file of the work folder that has its final name."""
    found = {path.name: path.stat() for path in (work_of(output) / "model").glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A base of two files with some tensors that nothing changes, with side files, and a LoRA for the others."""
    base = folder / "base"
    (base / "assets").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight_map: dict[str, str] = {}
    pairs = {}
    for layer in range(2):
        modules = [f"model.layers.{layer}.{name}" for name in ("self_attn.q_proj", "mlp.up_proj")]
        pairs |= {module: (noise(2, 24), noise(24, 2)) for module in modules}
        tensors = {f"{module}.weight": noise(24, 24).bfloat16() for module in modules}
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = noise(600).bfloat16()
        file = f"model-{layer + 1:05}-of-00002.safetensors"
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "assets" / "notes.txt").write_text("notes")
    return base, factories.write_adapter(folder / "lora", pairs)


def make_scene(folder: Path) -> Scene:
    """The scene in a new `folder`; its parent is to be closed."""
    shim = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    base, adapter = write_inputs(folder)
    words = folder / "words"
    words.mkdir()
    output = folder / "expected" / "out"
    output.parent.mkdir()
    scene = Scene(base=base, adapter=adapter, parent=None, expected={}, inputs={})  # type: ignore[arg-type]
    parent = Parent(shim, words, scene.argv(output))
    inputs = {str(place): digest for path in (base, adapter) for place, digest in tree(path).items()}
    return Scene(base=base, adapter=adapter, parent=parent, expected=tree(output), inputs=inputs)


def can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None
