"""What the receipt says of the inputs, against the inputs that are given: the plan again, its layout, its ledger."""

from __future__ import annotations

from pathlib import Path

from distmerge.audit.findings import Finding
from distmerge.checkpoint.base import RECEIPT
from distmerge.checkpoint.header import TensorSpec
from distmerge.config import AdapterChoice, MergeConfig
from distmerge.errors import InputError, listing
from distmerge.input_files import input_files
from distmerge.plan import Plan
from distmerge.progress import Counter
from distmerge.receipt import Receipt, ledger_key
from distmerge.storage.files import sha256_of


def config_of(
    receipt: Receipt, output: Path, base: Path, adapters: tuple[AdapterChoice, ...], *, device: str
) -> MergeConfig:
    """The configuration of the merge that gave `output`, with the inputs as they are now."""
    options = receipt.options
    return MergeConfig(
        base=base,
        adapters=adapters,
        output=output,
        device=device,
        memory_budget=1 << 62,
        dtype=options.dtype,
        quantize=options.quantize,
        quantize_mode=options.quantize_mode,
        keep_quantized=options.keep_quantized,
        simulate_quant=options.simulate_quant,
        quant_blocksize=options.quant_blocksize,
        quant_double=options.quant_double,
        quant_compute_dtype=options.quant_compute_dtype,
        quant_skip=options.quant_skip,
        max_shard_size=options.max_shard_size,
        combine=options.combine,
        density=options.density,
        seed=options.seed,
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        map=options.map,
        expert_b_order=options.expert_b_order,
        allow_pickle=options.allow_pickle,
        allow_zero_delta=options.allow_zero_delta,
        digest=options.digest,
        hash_inputs=options.hash_inputs,
    )


def check_same_inputs(plan: Plan, receipt: Receipt) -> None:
    """Raises InputError where the adapters are not those of the merge."""
    given = [(adapter.weights_sha256, adapter.weight) for adapter in plan.adapters]
    merged = [(adapter.fingerprint, adapter.weight) for adapter in receipt.adapters]
    if given != merged:
        raise InputError(
            "the adapters, their order or their weights are not those of the receipt",
            where="--adapter",
            hint="give every adapter of the merge, in its order, with its --weight",
        )


def check_files_of_inputs(plan: Plan, config: MergeConfig, receipt: Receipt, counter: Counter) -> None:
    """Raises InputError where a file of base or adapters is not, byte for byte, the one that the receipt has a digest
    of, naming it."""
    found = input_files(plan, config)
    if others := sorted(found.keys() ^ receipt.inputs.keys()):
        raise InputError(
            f"the files of base and adapters are not those of the receipt: {listing(others)}",
            where="--base, --adapter",
            hint="give the very folders that were merged",
        )
    for name, path in found.items():
        counter.doing = name
        digest, expected = sha256_of(path, lambda piece: counter.add(len(piece))), receipt.inputs[name].sha256
        if digest != expected:
            raise InputError(
                f"is not the file that was merged: sha256 is {digest}, the receipt says {expected}",
                where=str(path),
                hint="it changed after the merge, or was damaged before; download it again",
            )


def check_layout(plan: Plan, receipt: Receipt, output: Path, tensors: dict[str, TensorSpec]) -> list[Finding]:
    """What is wrong with the names, dtypes and shapes of the output, with where its tensors lie, and with the names in
    its ledger."""
    findings = []
    went: dict[str, set[str]] = {}
    for task in plan.tasks:
        for owner, key in task.adapter_keys:
            went.setdefault(ledger_key(plan, owner, key), set()).add(task.name)
    if went != {key: set(entry.tensors) for key, entry in receipt.ledger.items()}:
        findings.append(Finding(where=str(output / RECEIPT), what="the ledger is not that of these adapters"))
    planned = {part.name: (part.dtype, part.shape) for task in plan.tasks for part in task.parts}
    found = {name: (spec.dtype, spec.shape) for name, spec in tensors.items()}
    if planned != found:
        names = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))
        what = f"the output's tensors are not those that base and adapters give: {listing(names)}"
        findings.append(Finding(where=str(output), what=what))
    return findings or _misplaced(plan, output, tensors)


def _misplaced(plan: Plan, output: Path, tensors: dict[str, TensorSpec]) -> list[Finding]:
    """Files that hold what others should hold. A base that was cut into other files since gives other names."""
    planned = {part.name: plan.files[task.file].name for task in plan.tasks for part in task.parts}
    if set(planned.values()) != {spec.file for spec in tensors.values()}:
        return []
    moves = sorted({(spec.file, planned[name]) for name, spec in tensors.items() if planned[name] != spec.file})
    return [Finding(where=str(output / held), what=f"holds what {named} should hold") for held, named in moves]
