"""What is wrong with a tensor, in words: the fault that would make it what it is."""

from __future__ import annotations

import math

from distmerge.audit.damage import Damage, Wrong, examine, looks_like
from distmerge.audit.findings import SHOWN, Finding
from distmerge.audit.pairs import Pairs
from distmerge.checkpoint.header import FLOATS
from distmerge.errors import printable
from distmerge.layout import Task
from distmerge.numerics.agreement import Agreement

_MAX_CANDIDATES = 1024
_HINT = "merge again, and compare with what the faulty merge was made by"


def diagnose(pairs: Pairs, wrong: list[int], right: set[int]) -> tuple[Finding, ...]:
    """A finding for each of the tasks `wrong`, by number; the first few with what happened to them. `right` are tasks
    that are what they should be. Where whole files hold each other's tensors, that is one finding."""
    plan = pairs.plan
    buffers = pairs.reader.buffers()
    findings, moves = [], dict[int, tuple[str, str]]()
    for number in wrong[:SHOWN]:
        task = plan.tasks[number]
        pairs.close_others("")
        damage = examine(pairs, task, buffers)
        plain = damage.is_few or (damage.is_unchanged and bool(task.changes))
        origin = None if plain else _origin(pairs, task)
        if origin is not None and origin[0] == "values":
            moves[number] = (pairs.file_of(task), plan.files[origin[1].file].name)
        what = _words(task, damage, origin, _twin(pairs, task, right))
        findings.append(Finding(where=printable(task.name), what=what, hint=_HINT))
    findings += [
        Finding(where=printable(plan.tasks[number].name), what="is wrong too, and was not looked at further")
        for number in wrong[SHOWN:]
    ]
    return _files(pairs, wrong, moves) + tuple(findings)


def _files(pairs: Pairs, wrong: list[int], moves: dict[int, tuple[str, str]]) -> tuple[Finding, ...]:
    """What whole files hold of each other, if every wrong tensor that was looked at comes from another file."""
    told = sorted(set(moves.values()))
    if len(moves) < min(len(wrong), SHOWN) or any(held == due for held, due in told) or len(wrong) < 2:
        return ()
    return tuple(
        Finding(where=held, what=f"holds what {due} should hold", hint="the files were swapped; merge again")
        for held, due in told
    )


def _words(task: Task, damage: Damage, origin: tuple[str, Task] | None, twin: str) -> str:
    sums = damage.agreement
    if sums.num_not_finite:
        return f"{sums.num_not_finite} values are not finite, {_shown(task, damage.first[0])}"
    if damage.is_few:
        told = "; ".join(_shown(task, wrong) for wrong in damage.first)
        return f"{_count(damage.num_wrong)} not {_due(task)}: {told}"
    if origin is not None:
        what, other = origin
        name = repr(printable(other.name))
        return f"holds what {name} should hold" if what == "values" else f"the delta of {name} was added, not its own"
    if not task.changes:
        example = _shown(task, damage.first[0])
        return f"{damage.num_wrong} of {damage.numel} elements are not {_due(task)}, first {example}{twin}"
    scope = _scope(damage)
    if damage.is_unchanged:
        return f"{scope}holds the base's values: not merged{twin}"
    return f"{scope}{_fault(sums)} (first: {_shown(task, damage.first[0])})"


def _fault(sums: Agreement) -> str:
    projection = f"projection of out - base on it: {sums.coefficient:.3f}"
    if abs(sums.coefficient - 1) < 0.03 and sums.cosine > 0.9:
        return f"the delta was added, but not rounded once to the nearest value ({projection})"
    if not sums.is_multiple:
        change, delta = math.sqrt(sums.change_squared), math.sqrt(sums.delta_squared)
        return (
            f"something else than the delta was added: out - base has norm {change:.3g}, the delta {delta:.3g}, "
            f"cosine {sums.cosine:.3f}"
        )
    if abs(sums.coefficient + 1) < 0.1:
        return f"the delta was subtracted, not added ({projection})"
    if abs(sums.coefficient - 2) < 0.1:
        return f"the delta was added twice ({projection})"
    return f"the delta was applied with {sums.coefficient:.3g} times its scaling ({projection})"


def _scope(damage: Damage) -> str:
    """`rows 32 to 63 of 64: ` if only some of the rows that should be changed are wrong."""
    if len(damage.rows) >= 0.9 * damage.num_rows_due:
        return ""
    first, last = int(damage.rows[0]), int(damage.rows[-1])
    total = -(-damage.numel // damage.row_numel)
    if last - first + 1 == len(damage.rows):
        return f"rows {first} to {last} of {total}: "
    return f"{len(damage.rows)} of {total} rows, first {first}: "


def _twin(pairs: Pairs, task: Task, right: set[int]) -> str:
    """What to say of a tensor that is tied to another one, which is right."""
    named = {pairs.plan.tasks[number].name: pairs.plan.tasks[number] for number in right}
    twins = [other for other in named.values() if task.name == other.twin or other.name == task.twin]
    if not twins:
        return ""
    return f"; {printable(twins[0].name)}, which it is tied to, is as it should be: a stale copy"


def _origin(pairs: Pairs, task: Task) -> tuple[str, Task] | None:
    """The task whose values, or whose delta, the output holds in the place of `task`'s."""
    if task.dtype not in FLOATS or not task.source.numel or task.form is not None:
        return None
    buffers = pairs.reader.buffers()
    same = (task.dtype, task.source.shape, task.block(0))
    others = [
        other
        for other in pairs.plan.tasks
        if other.name != task.name
        and other.form is None
        and (other.dtype, other.source.shape, other.block(0) if other.source.numel else ()) == same
        and other.twin != task.name != ""
        and task.twin != other.name
    ]
    for other in others[:_MAX_CANDIDATES]:
        if what := looks_like(pairs, task, other, buffers):
            return what, other
    return None


def _due(task: Task) -> str:
    return "base + delta" if task.changes else "the adapter's" if task.origin else "the base's"


def _count(number: int) -> str:
    return "1 element is" if number == 1 else f"{number} elements are"


def _shown(task: Task, wrong: Wrong) -> str:
    place, index = wrong.place, []
    for size in reversed(task.source.shape):
        place, at = divmod(place, size)
        index.append(at)
    digits = 9 if task.dtype == "F32" else 5
    return f"{index[::-1]} is {wrong.stored:.{digits}g}, should be {wrong.expected:.{digits}g}"
