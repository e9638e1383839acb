"""Any sequence of kills, errors, rot, deletions and other commands between runs of one command ends in its result."""

from __future__ import annotations

import errno
import shutil
import signal
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.conftest import tree
from tests.faults.attempts import ANY, CHANGES, Scene, work_of

MOMENTS = st.integers(1, 95)


def test_whatever_happens_between_runs_the_same_command_gives_the_same_output(  # noqa: C901 - a class
    scene: Scene, room: Path
) -> None:
    runs = iter(range(10**6))

    class Protocol(RuleBasedStateMachine):
        """One output; `rotten` once a file was changed that was finished."""

        def __init__(self) -> None:
            super().__init__()
            self.output = room / str(next(runs)) / "out"
            self.output.parent.mkdir()
            self.rotten = False

        @rule(moment=MOMENTS)
        def killed(self, moment: int) -> None:
            attempt = scene.attempt(self.output, calls=CHANGES, nth=moment, kind="kill")
            assert attempt.code in (0, -signal.SIGKILL), attempt.words
            self.rotten &= not self.output.exists()

        @rule(moment=MOMENTS, code=st.sampled_from([errno.EIO, errno.ENOSPC]))
        def failed(self, moment: int, code: int) -> None:
            attempt = scene.attempt(self.output, calls=CHANGES, nth=moment, kind="fail", code=code)
            assert attempt.code in (0, 5), attempt.words
            assert attempt.said_well(), attempt.words
            self.rotten &= not self.output.exists()

        @rule()
        def finished(self) -> None:
            attempt = scene.attempt(self.output)
            assert attempt.code == 0, attempt.words
            assert tree(self.output) == scene.expected
            assert list(self.output.parent.iterdir()) == [self.output]
            self.rotten = False

        @precondition(lambda self: self.output.exists() or (work_of(self.output) / "manifest.json").exists())
        @rule(options=st.sampled_from([("--dtype", "float32"), ("--weight", "0.5"), ("--max-shard-size", "2KB")]))
        def with_other_options(self, options: tuple[str, str]) -> None:
            before = tree(self.output.parent)
            attempt = scene.attempt(self.output, *options)
            assert attempt.code == 3, attempt.words
            after = tree(self.output.parent)
            assert {name: after.get(name) for name in before} == before

        @precondition(lambda self: any(work_of(self.output).glob("model/*.safetensors*")))
        @rule(number=st.integers(0, 5), place=st.integers(0, 5000), bit=st.integers(0, 7))
        def rotted(self, number: int, place: int, bit: int) -> None:
            files = sorted(work_of(self.output).glob("model/*.safetensors*"))
            path = files[number % len(files)]
            content = bytearray(path.read_bytes())
            if content:
                content[place % len(content)] ^= 1 << bit
                path.write_bytes(content)
                self.rotten = True

        @precondition(lambda self: any(work_of(self.output).glob("*/*")))
        @rule(number=st.integers(0, 20))
        def lost(self, number: int) -> None:
            files = sorted(work_of(self.output).glob("*/*"))
            path = files[number % len(files)]
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        @rule(which=st.sampled_from(["output", "work folder"]))
        def deleted(self, which: str) -> None:
            shutil.rmtree(self.output if which == "output" else work_of(self.output), ignore_errors=True)
            self.rotten &= which == "output"

        @invariant()
        def is_absent_or_whole(self) -> None:
            if not self.rotten:
                scene.assert_absent_or_whole(self.output)
            elif self.output.exists():
                assert tree(self.output) == scene.expected

        def teardown(self) -> None:
            if not self.rotten:
                scene.assert_finishes(self.output, kept=ANY)
            self.finished()
            shutil.rmtree(self.output.parent)

    run_state_machine_as_test(
        Protocol, settings=settings(max_examples=12, stateful_step_count=8, deadline=None, derandomize=True)
    )
