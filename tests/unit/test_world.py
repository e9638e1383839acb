"""What ranks tell each other through the store, whatever its size, and which signals they hear."""

from __future__ import annotations

import os
import signal

import pytest
from torch._C._distributed_c10d import HashStore

from distmerge import world
from distmerge.errors import Interrupted
from distmerge.world import Place, World


class Narrow(HashStore):
    """A store that takes no value of more than 64 characters."""

    def set(self, key: str, value: str) -> None:
        assert len(value) <= 64
        super().set(key, value)


@pytest.mark.parametrize("text", ["", "x", '\u00e4"\\\n\U0001f600' * 300], ids=["empty", "short", "long"])
def test_a_value_that_is_larger_than_the_store_takes_arrives_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_VALUE_NBYTES", 60)
    monkeypatch.setattr(world.socket, "gethostname", lambda: "h")
    one = World(Place(rank=0, size=1, local_rank=0, local_size=1), Narrow(), timeout=60)
    try:
        assert one.collect("records", text) == [text]
        assert one.collect("records", [text, 3]) == [[text, 3]]
    finally:
        one.leave()


def test_a_signal_that_was_ignored_before_does_not_interrupt() -> None:
    one = World(Place(rank=0, size=1, local_rank=0, local_size=1), HashStore(), timeout=60)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            one.check()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted, match="SIGTERM"):
                one.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        one.leave()
