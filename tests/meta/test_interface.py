"""What programs may rely on: exit codes, status, events and receipt are documented as they are, and only grow."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import distmerge
from distmerge import errors
from distmerge.progress import Snapshot
from distmerge.receipt import VERSION, InputEntry, Receipt
from distmerge.storage.checksums import READ_BACK

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text().split("## What programs may rely on")[1].split("\n## ")[0]

# What a released distmerge has told. Nothing is ever taken out of these.
EXIT_CODES = {
    1: "DistmergeError",
    2: "UsageError",
    3: "InputError",
    4: "VerifyError",
    5: "MachineError",
    75: "Interrupted",
}
STATUS = {"state", "exit_code", "nbytes", "nbytes_total", "seconds", "ranks", "error"}
EVENTS = {
    "planned": {"plan", "num_tensors", "nbytes"},
    "shard_done": {"file", "nbytes", "read_back", "sha256", "xxh3"},
}
RECEIPT = {"version", "plan", "base", "adapters", "options", "inputs", "ledger", "files", "environment", "tensors"}


def calls(name: str) -> Iterator[ast.Call]:
    """Every call of a method of that name in the package."""
    for path in Path(distmerge.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                yield node


def table(title: str) -> list[list[str]]:
    """The cells of the rows of the table that comes after `title`."""
    rows = [line for line in PAGE.split(title)[1].splitlines() if line.startswith(("|", "**"))]
    first = next(number for number, line in enumerate(rows) if line.startswith("| ---"))
    found = []
    for line in rows[first + 1 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def named(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def emitted_events() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for call in calls("event"):
        (kind,) = call.args
        assert isinstance(kind, ast.Constant)
        more = {*READ_BACK} if any(keyword.arg is None for keyword in call.keywords) else set()
        found[str(kind.value)] = {keyword.arg for keyword in call.keywords if keyword.arg} | more
    return found


def emitted_status() -> set[str]:
    found: set[str] = set()
    for call in calls("write_status"):
        (value,) = call.args
        assert isinstance(value, ast.Dict)
        for key in value.keys:
            found |= {field.name for field in fields(Snapshot)} if key is None else {ast.literal_eval(key)}
    return found


def test_the_interface_is_documented_and_only_grows() -> None:
    codes = {int(row[0]): row[1].strip("`") for row in table("are an interface")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    told = {kind.__name__: kind.exit_code for kind in kinds if kind is not errors.PeerFailed}  # that has another's code
    assert told == {name: code for code, name in EXIT_CODES.items()}
    assert codes == {0: "", **EXIT_CODES, 1: ""}
    status = set[str]().union(*(named(row[0]) for row in table("**`status.json`**")))
    assert status == emitted_status() >= STATUS
    events = {row[0].strip("`"): named(row[1]) for row in table("**`events.jsonl`**")}
    assert events == emitted_events()
    assert all(events[kind] >= known for kind, known in EVENTS.items())
    receipt = set[str]().union(*(named(row[0]) for row in table("**The receipt**")))
    assert receipt == {field.name for field in fields(Receipt)} >= RECEIPT
    assert f"this distmerge writes {VERSION} and reads 2 to {VERSION}" in PAGE
    (inputs,) = (row[2] for row in table("**The receipt**") if row[0] == "`inputs`")
    assert {field.name for field in fields(InputEntry)} <= named(inputs)


def test_the_command_line_tells_the_same_exit_codes() -> None:
    cli = (ROOT / "docs" / "cli.md").read_text()
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", cli.split("## distmerge")[0], re.MULTILINE)}
    assert told == {0, *EXIT_CODES}
