"""`python -m tests.faults.tally`: all tests of this folder, and how many faults of which kind they have injected into
how many merges, with how many outputs lost (not finished by the same command) and how many wrong (there, and not
whole)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.attempts import Attempt, Fault, Parent, Scene

NAMES = {
    "kill": "SIGKILL before a call",
    "tear": "SIGKILL in the middle of a write",
    "fail": "a call that fails",
    "done": "a call that has happened and fails",
    "short": "a call that is cut short",
    "lose": "a write that is lost in silence",
    "stop": "a merge held at a call, while something else happens",
}


class Tally:
    """Counts what a `Parent` is asked for, and what a `Scene` asserts of it."""

    def __init__(self) -> None:
        self.faults, self.merges, self.lost, self.wrong = Counter[str](), 0, 0, 0

    def started(self, start: Callable[..., Attempt]) -> Callable[..., Attempt]:
        def counted(parent: Parent, argv: list[str], fault: Fault, *args: Any, setup: str, **more: Any) -> Attempt:
            self.merges += 1
            attempt = start(parent, argv, fault, *args, setup=setup, **more)
            if attempt.hits:
                self.faults[NAMES[fault.kind]] += attempt.hits
            elif setup:
                self.faults["limits, clocks, streams, users"] += 1
            return attempt

        return counted

    def finished(self, check: Callable[..., Attempt]) -> Callable[..., Attempt]:
        def counted(scene: Scene, *args: Any, **more: Any) -> Attempt:
            self.lost += 1
            found = check(scene, *args, **more)
            self.lost -= 1
            return found

        return counted

    def whole(self, check: Callable[..., None]) -> Callable[..., None]:
        def counted(scene: Scene, *args: Any) -> None:
            self.wrong += 1
            check(scene, *args)
            self.wrong -= 1

        return counted

    def table(self) -> str:
        lines = ["| fault | injected |", "| --- | --- |"]
        lines += [f"| {name} | {count:,} |" for name, count in self.faults.most_common()]
        total = sum(self.faults.values())
        lines += [f"| all, in {self.merges:,} merges: {self.lost} lost, {self.wrong} wrong | {total:,} |"]
        return "\n".join(lines)


def main() -> int:
    tally = Tally()
    Parent.start = tally.started(Parent.start)  # type: ignore[method-assign]
    Scene.assert_finishes = tally.finished(Scene.assert_finishes)  # type: ignore[method-assign]
    Scene.assert_absent_or_whole = tally.whole(Scene.assert_absent_or_whole)  # type: ignore[method-assign]
    code = pytest.main(["tests/faults", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]])
    print(tally.table())
    print(json.dumps({"merges": tally.merges, "faults": tally.faults, "lost": tally.lost, "wrong": tally.wrong}))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
