"""The norms in the ledger, computed again in float64."""

from __future__ import annotations

import math
from pathlib import Path

from distmerge.audit.compare import Checked
from distmerge.audit.findings import Finding
from distmerge.checkpoint.base import RECEIPT
from distmerge.errors import printable
from distmerge.plan import Plan
from distmerge.receipt import Receipt, ledger_key

_ROUGH = 1e-3  # the merge adds up squares in float32, block by block
_CANCELLED = 1e-6  # of the weight's norm: what float32 makes of an operator's change, the difference of two weights


def check_norms(plan: Plan, receipt: Receipt, output: Path, found: dict[int, Checked]) -> list[Finding]:
    """The entries of the ledger whose `delta_norm` or `applied_norm` is not what base, adapters and output give."""
    deltas: dict[str, list[float | None]] = {}
    tasks: dict[str, set[int]] = {}
    for number, task in enumerate(plan.tasks):
        for place, change in enumerate(task.changes):
            for key in change.keys:
                name = ledger_key(plan, change.adapter, key)
                deltas.setdefault(name, []).append(found[number].delta_squared[place])
                tasks.setdefault(name, set()).add(number)
        for owner, key in task.adapter_keys:
            name = ledger_key(plan, owner, key)
            if number not in tasks.get(name, set()):
                deltas.setdefault(name, []).append(None)
                tasks.setdefault(name, set()).add(number)
    findings = []
    for name, entry in receipt.ledger.items():
        squares = [square for square in deltas[name] if square is not None]
        whole = len(squares) == len(deltas[name])
        wholes = [found[number] for number in tasks[name]]
        slack = _CANCELLED * math.sqrt(math.fsum(one.stored_squared for one in wholes))
        applied = math.sqrt(math.fsum(one.applied_squared for one in wholes))
        for field, said, norm in (
            ("delta_norm", entry.delta_norm, math.sqrt(math.fsum(squares))),
            ("applied_norm", entry.applied_norm, applied),
        ):
            if (said is None) == whole or (said is not None and not abs(said - norm) <= _ROUGH * norm + slack):
                shown = f"{norm:.6g}" if whole else "null"
                what = f"the ledger gives {printable(name)!r} a {field} of {said}, it is {shown}"
                findings.append(Finding(where=str(output / RECEIPT), what=what))
    return findings
