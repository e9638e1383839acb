"""`python -m fuzz.worst`: every refusal in `tests/attacks`, with how many there were, and the slowest and the largest.

Seconds are of CPU time, memory is the peak beyond what the process held before; processes for pickles and for patterns
in threads are not in it. What a scene accepts, though its test says that it must be refused, is counted and listed.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks import scene

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NUM_LISTED = 3


def _kilobytes(field: str) -> int:
    return int(STATUS.read_text().split(f"{field}:")[1].split()[0])


class Tally:
    """A plugin that measures every refusal of a scene."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float, str]] = []
        self.accepted: list[str] = []
        self._test = ""

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._test = item.nodeid

    def measured(self, refuse: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **changes: Any) -> Any:
            ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken anew
            CLEAR.write_text("5")  # the peak counts from here
            before, started = _kilobytes("VmRSS"), time.process_time()
            try:
                return refuse(*args, **changes)
            except pytest.fail.Exception:
                self.accepted.append(self._test)
                raise
            finally:
                grown = (_kilobytes("VmHWM") - before) / 1000
                self.found.append((time.process_time() - started, grown, self._test))

        return wrapped

    def summary(self) -> dict[str, Any]:
        seconds, megabytes = (sorted(self.found, key=lambda one: -one[n])[:NUM_LISTED] for n in (0, 1))
        return {
            "tried": len(self.found),
            "accepted": self.accepted,
            "slowest": [{"seconds": round(one[0], 2), "test": one[2]} for one in seconds],
            "largest": [{"megabytes": round(one[1], 1), "test": one[2]} for one in megabytes],
        }


def main() -> int:
    tally = Tally()
    scene.Scene.refuse = tally.measured(scene.Scene.refuse)  # type: ignore[method-assign]
    code = pytest.main(
        ["tests/attacks", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *sys.argv[1:]], plugins=[tally]
    )
    print(json.dumps(tally.summary(), indent=1))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
