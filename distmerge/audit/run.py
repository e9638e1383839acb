"""`distmerge verify` in order: files, headers, index, ledger, inputs, values, norms; then what is wrong, with names."""

from __future__ import annotations

import math
from collections import Counter as Counts
from dataclasses import dataclass
from pathlib import Path

import torch

from distmerge.audit.compare import Checked, Comparison
from distmerge.audit.diagnosis import diagnose
from distmerge.audit.files import Contents, check_files, read_contents
from distmerge.audit.findings import Audit, AuditError, Finding, Probed, Recomputed, Request
from distmerge.audit.inputs import check_files_of_inputs, check_layout, check_same_inputs, config_of
from distmerge.audit.norms import check_norms
from distmerge.audit.pairs import Pairs
from distmerge.audit.probe import Probe, Probing
from distmerge.audit.vectors import Activations, read_activations
from distmerge.checkpoint.base import RECEIPT
from distmerge.config import AdapterChoice
from distmerge.errors import InputError, UsageError, printable
from distmerge.lanes import Lanes
from distmerge.numerics.precision import full_precision
from distmerge.plan import Plan, make_plan
from distmerge.progress import Counter, Display
from distmerge.receipt import Receipt, read_receipt
from distmerge.share import wanted_lanes
from distmerge.storage.checksums import require
from distmerge.world import device_type

_FITTED_ROOM = 1.02  # of plain scales' squared error, which 8-bit scales and one more rounding may add
_FLOAT64_TEMPORARIES = 12  # of a block, while it is compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What an output is held against: `base` and `adapters` as for the merge, the type of device that computes, the
    bytes of working memory, and a file of vectors for the probe."""

    base: Path
    adapters: tuple[AdapterChoice, ...]
    device: str = "cpu"
    memory_budget: int = 2 << 30
    activations: Path | None = None


def audit(output: Path, *, inputs: Inputs | None, request: Request, display: Display) -> Audit:
    """Checks `output` as deep as `request` says, against `inputs` unless that is `digests`.

    Raises InputError where `output` is no output of distmerge or the inputs are others than those of the receipt, and
    AuditError, a VerifyError, with everything that is wrong: files first; if they are as they should be, headers, index
    and ledger; if these are, values.
    """
    if (inputs is None) != (request.depth == "digests"):
        raise UsageError(
            f"depth {request.depth!r} {'needs' if inputs is None else 'takes no'} base and adapters",
            hint="--base B --adapter A ..." if inputs is None else "--depth sample, probe or full",
        )
    if inputs is not None and inputs.activations is not None and request.depth != "probe":
        raise UsageError(f"activations are probed, and depth is {request.depth!r}", hint="--depth probe")
    receipt = read_receipt(output) if output.is_dir() else None
    if receipt is None:
        raise InputError(f"holds no {RECEIPT}", where=str(output), hint="verify takes the output of a merge")
    require(receipt.options.digest)
    nbytes = sum(max(entry.bytes, 0) for entry in receipt.files.values())
    with display.counting("hashing", nbytes) as counter:
        _stop_at(output, check_files(output, receipt.files, counter))
    contents = read_contents(output, receipt)
    _stop_at(output, contents.findings)
    recomputed, probed = None, None
    if inputs is not None:
        with full_precision(num_threads=1):
            recomputed, probed = _values(
                output, inputs, receipt=receipt, contents=contents, request=request, display=display
            )
    return Audit(
        depth=request.depth,
        num_files=len(receipt.files),
        digests=dict(sorted(Counts(entry.kind for entry in receipt.files.values()).items())),
        nbytes=nbytes,
        num_tensors=len(contents.tensors),
        num_adapter_tensors=len(receipt.ledger),
        recomputed=recomputed,
        probed=probed,
        num_norms=2 * len(receipt.ledger) if request.depth == "full" else 0,
        num_inputs=len(receipt.inputs) if inputs is not None else 0,
    )


def _stop_at(output: Path, findings: list[Finding] | tuple[Finding, ...]) -> None:
    if findings:
        raise AuditError(tuple(findings), where=str(output))


def _values(
    output: Path, inputs: Inputs, *, receipt: Receipt, contents: Contents, request: Request, display: Display
) -> tuple[Recomputed, Probed | None]:
    kind = device_type(inputs.device)
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, 0)
    config = config_of(receipt, output, inputs.base, inputs.adapters, device=device.type)
    plan = make_plan(config, device.type)
    check_same_inputs(plan, receipt)
    if receipt.inputs:
        with display.counting("hashing", sum(max(entry.bytes, 0) for entry in receipt.inputs.values())) as counter:
            check_files_of_inputs(plan, config, receipt, counter)
    _stop_at(output, check_layout(plan, receipt, output, contents.tensors))
    activations = read_activations(inputs.activations, plan) if inputs.activations else Activations(path=None, specs={})
    with Pairs(plan, config, contents.tensors, device) as pairs:
        probing = Probing(pairs, activations, request.seed) if request.depth == "probe" else None
        extra = probing.nbytes if probing else 0
        lanes = Lanes(plan, pairs.reader, device, count_lanes(plan, inputs.memory_budget, extra=extra))
        try:
            with display.counting("checking", plan.nbytes_to_write) as counter:
                return _passes(pairs, lanes, probing, receipt=receipt, output=output, request=request, counter=counter)
        finally:
            lanes.close()


def _passes(
    pairs: Pairs,
    lanes: Lanes,
    probing: Probing | None,
    *,
    receipt: Receipt,
    output: Path,
    request: Request,
    counter: Counter,
) -> tuple[Recomputed, Probed | None]:
    plan = pairs.plan
    comparison = Comparison(pairs, lanes, request, counter)
    probes: dict[int, Probe] = {}
    if probing is None:
        found = comparison.run()
    else:
        probes = probing.run(lanes, counter)
        # A probe that is not clear is no proof of a fault: a delta that rounding swallows gives one too.
        doubted = {plan.tasks[number].name for number, probe in probes.items() if probe.is_doubtful}
        found = comparison.run(lambda task: task.name in doubted or not probing.takes(task))
    wrong = sorted(number for number, checked in found.items() if checked.num_wrong)
    findings: list[Finding] = []
    if wrong:
        counter.doing = "looking at what is wrong"
        findings += diagnose(pairs, wrong, {*found, *probes} - set(wrong))
    _stop_at(output, [*findings, *_faults(plan, found)])
    if request.depth == "full":
        _stop_at(output, check_norms(plan, receipt, output, found))
    return _recomputed(plan, found), None if probing is None else probing.summary(probes)


def _faults(plan: Plan, found: dict[int, Checked]) -> list[Finding]:
    """What is wrong with packed tensors beside their codes; of several alike the first."""
    findings = []
    for number, checked in found.items():
        where, form = printable(plan.tasks[number].name), plan.tasks[number].form
        told = {fault.split(" ", 1)[-1]: fault for fault in reversed(checked.faults)}
        findings += [Finding(where=where, what=fault) for fault in told.values()]
        if form is not None and form.fitted and checked.written_squared > _FITTED_ROOM * checked.plain_squared:
            ratio = math.sqrt(checked.written_squared / checked.plain_squared) if checked.plain_squared else math.inf
            what = f"its scales are not fitted: packing lost {ratio:.3g} times what the largest magnitudes would lose"
            findings.append(Finding(where=where, what=what))
    return findings


def _recomputed(plan: Plan, found: dict[int, Checked]) -> Recomputed:
    merged = {number: checked for number, checked in found.items() if plan.tasks[number].changes}
    worst = max(merged, key=lambda number: merged[number].max_ulp, default=None)
    numel = sum(task.source.numel for task in plan.tasks)
    return Recomputed(
        num_tensors=len(merged),
        num_elements=sum(checked.numel for checked in merged.values()),
        max_ulp=0.0 if worst is None else merged[worst].max_ulp,
        max_ulp_beyond_noise=max((checked.max_ulp_beyond_noise for checked in merged.values()), default=0.0),
        worst_tensor="" if worst is None else plan.tasks[worst].name,
        num_not_nearest=sum(checked.num_not_nearest for checked in merged.values()),
        num_packed=sum(plan.tasks[number].form is not None for number in merged),
        share=sum(checked.numel for checked in found.values()) / numel if numel else 1.0,
    )


def count_lanes(plan: Plan, memory_budget: int, *, extra: int) -> int:
    """How many lanes fit the budget beside `extra` bytes and what changes a tensor, in float64. Raises InputError."""
    block = plan.lane_nbytes + 8 * _FLOAT64_TEMPORARIES * plan.block_numel
    lane, loading = block + 2 * plan.held_nbytes, 2 * plan.loading_nbytes + 2 * block + extra
    if (fits := (memory_budget - loading) // lane) < 1:
        raise InputError(
            f"{memory_budget} bytes are too few: one block and the largest factors take {loading + lane} in float64",
            where="--memory-budget",
            hint=f"--memory-budget {-(-(loading + lane) // (1 << 20))}MiB",
        )
    return min(wanted_lanes(1), fits)
