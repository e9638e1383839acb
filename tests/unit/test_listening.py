"""Where the store can be reached: at this machine alone where all ranks are on it, else at the rendezvous address."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from distmerge import launcher, world
from distmerge.launcher import listen
from distmerge.world import World, launch

LOOPBACK = {"0100007F", "00000000000000000000000001000000"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


def listening(port: int) -> set[str]:
    """The addresses at which something listens at `port`, as the kernel writes them."""
    tables = Path("/proc/net").glob("tcp*")  # tcp6 only where there is IPv6
    rows = [row.split() for table in tables for row in table.read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, number in places if int(number, 16) == port}


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def test_the_store_of_nproc_listens_to_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, str]] = []
    seen: list[set[str]] = []
    start, watch = launcher.start_ranks, launcher.watch

    def started(argv: list[str], variables: list[dict[str, str]]) -> Any:
        told.extend(variables)
        return start(argv, variables)

    def watched(*args: Any) -> Any:
        seen.append(listening(int(told[0]["MASTER_PORT"])))
        return watch(*args)

    monkeypatch.setattr(world, "start_ranks", started)
    monkeypatch.setattr(world, "watch", watched)
    assert launch(1, ["inspect", "--help"], fork=False) == 0
    assert seen == [{"0100007F"}]


def test_the_store_that_a_first_rank_hosts_listens_at_the_rendezvous_address_alone(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**told, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(world, "die_with_parent", lambda: None)
    joined = World.join(timeout=20)
    try:
        assert listening(port)
        assert listening(port) <= LOOPBACK
    finally:
        joined.leave()


@pytest.mark.parametrize(
    ("address", "alone", "bound"),
    [
        ("127.0.0.1", False, True),
        ("127.0.0.1", True, True),
        ("localhost", True, True),
        ("localhost", False, False),  # what other nodes call so is another one
        ("192.0.2.1", False, False),  # not of this machine: behind a translation of addresses
        ("no.such.host.invalid", True, False),
    ],
)
def test_a_name_may_mean_something_else_on_other_nodes(address: str, alone: bool, bound: bool) -> None:
    listener = listen(address, 0, alone=alone)
    assert (listener is not None) is bound
    if listener is not None:
        assert listening(listener.getsockname()[1]) <= LOOPBACK
        listener.close()


def test_a_port_that_is_taken_is_left_to_torch_to_complain_of(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        assert listen("127.0.0.1", port, alone=True) is None
