"""`distmerge verify`: a published output held against its receipt, and against float64 arithmetic of its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from distmerge.checkpoint.base import INDEX, RECEIPT, SINGLE
from distmerge.checkpoint.header import ITEMSIZE, TensorSpec, read_header
from distmerge.config import AdapterChoice, MergeConfig
from distmerge.errors import InputError, VerifyError, listing, printable
from distmerge.layout import Task
from distmerge.numerics.combine import find_thresholds, histograms
from distmerge.numerics.dtypes import torch_dtype
from distmerge.numerics.noise import recompute, recompute_combined
from distmerge.numerics.rounding import Distance, distance
from distmerge.plan import Plan, make_plan
from distmerge.reader import Reader
from distmerge.receipt import FileEntry, Receipt, ledger_key, read_receipt
from distmerge.storage.files import open_input, read_exact, sha256_of
from distmerge.storage.strict_json import read_object


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """All merged tensors against float64: elements, the largest error in ulp of the output's dtype and the tensor
    that has it, the largest error beyond the noise of float32, and how many elements are not the nearest value."""

    num_tensors: int
    num_elements: int
    max_ulp: float
    max_ulp_beyond_noise: float
    worst_tensor: str
    num_not_nearest: int

    @property
    def share_not_nearest(self) -> float:
        return self.num_not_nearest / self.num_elements if self.num_elements else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was checked and found right; `recomputed` only where base and adapters were given."""

    num_files: int
    nbytes: int
    num_tensors: int
    num_adapter_tensors: int
    recomputed: Recomputed | None


def audit(
    output: Path,
    *,
    base: Path | None = None,
    adapters: tuple[AdapterChoice, ...] = (),
    tick: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Checks every file of `output` by its digest, headers and index against each other, and the ledger.

    With `base` and `adapters` also every tensor against the inputs: merged ones in float64, all others exactly.
    Raises InputError where `output` is no output of distmerge, VerifyError naming the first thing that is wrong.
    """
    receipt = read_receipt(output) if output.is_dir() else None
    if receipt is None:
        raise InputError(f"holds no {RECEIPT}", where=str(output), hint="verify takes the output of a merge")
    nbytes = _check_files(output, receipt.files, tick)
    tensors = _check_index(output, receipt.files)
    targets = {name for entry in receipt.ledger.values() for name in entry.tensors}
    if lost := sorted(targets - tensors.keys()):
        raise VerifyError(f"the ledger names tensors that are not there: {listing(lost)}", where=str(output / RECEIPT))
    if len(receipt.ledger) != sum(adapter.num_tensors for adapter in receipt.adapters):
        raise VerifyError("the ledger does not list every adapter tensor once", where=str(output / RECEIPT))
    recomputed = None
    if base is not None:
        recomputed = _recompute(_config(receipt, output, base, adapters), receipt, tensors, tick)
    return Audit(
        num_files=len(receipt.files),
        nbytes=nbytes,
        num_tensors=len(tensors),
        num_adapter_tensors=len(receipt.ledger),
        recomputed=recomputed,
    )


def _check_files(output: Path, files: dict[str, FileEntry], tick: Callable[[str], None]) -> int:
    strangers = sorted(
        path.name for path in output.iterdir() if path.suffix in (".safetensors", ".bin") and path.name not in files
    )
    if strangers or (output / "adapter_config.json").exists():
        raise VerifyError(
            f"holds files that loaders would pick up: {listing(strangers or ['adapter_config.json'])}",
            where=str(output),
            hint="they were added after the merge; move them away",
        )
    total = 0
    for name, expected in files.items():
        tick(name)
        path = output / name
        if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
            raise VerifyError(f"names a file outside of the folder: {printable(name)!r}", where=str(output / RECEIPT))
        if not path.is_file():
            raise VerifyError("is missing", where=str(path))
        nbytes = path.stat().st_size
        if nbytes != expected.bytes:
            raise VerifyError(f"has {nbytes} bytes, the receipt says {expected.bytes}", where=str(path))
        if (digest := sha256_of(path)) != expected.sha256:
            raise VerifyError(
                f"sha256 is {digest}, the receipt says {printable(expected.sha256)}",
                where=str(path),
                hint="the file changed after the merge; merge again",
            )
        total += nbytes
    return total


def _check_index(output: Path, files: dict[str, FileEntry]) -> dict[str, TensorSpec]:
    """The tensors of the output by name, from the headers, which must be what the index says."""
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    tensors = {spec.name: spec for shard in shards for spec in read_header(output / shard, shard).tensors}
    if shards == [SINGLE] and INDEX not in files:
        return tensors
    index = read_object(output / INDEX)
    if index.get("weight_map") != {name: spec.file for name, spec in tensors.items()}:
        raise VerifyError("weight_map is not what the headers say", where=str(output / INDEX))
    total = sum(spec.nbytes for spec in tensors.values())
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("total_size") != total:
        raise VerifyError(f"total_size is not {total}", where=str(output / INDEX))
    return tensors


def _config(receipt: Receipt, output: Path, base: Path, adapters: tuple[AdapterChoice, ...]) -> MergeConfig:
    options = receipt.options
    return MergeConfig(
        base=base,
        adapters=adapters,
        output=output,
        device="cpu",
        memory_budget=1 << 62,
        dtype=options.dtype,
        keep_quantized=options.keep_quantized,
        max_shard_size=options.max_shard_size,
        combine=options.combine,
        density=options.density,
        seed=options.seed,
        simulate_quant=options.simulate_quant,
        quant_blocksize=options.quant_blocksize,
        quant_double=options.quant_double,
        quant_compute_dtype=options.quant_compute_dtype,
        quant_skip=options.quant_skip,
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        map=options.map,
        expert_b_order=options.expert_b_order,
        allow_pickle=options.allow_pickle,
        allow_zero_delta=options.allow_zero_delta,
    )


def _recompute(
    config: MergeConfig, receipt: Receipt, tensors: dict[str, TensorSpec], tick: Callable[[str], None]
) -> Recomputed:
    plan = make_plan(config, "cpu")
    _check_same_inputs(plan, receipt)
    went: dict[str, set[str]] = {}
    for task in plan.tasks:
        for owner, key in task.adapter_keys:
            went.setdefault(ledger_key(plan, owner, key), set()).add(task.name)
    if went != {key: set(entry.tensors) for key, entry in receipt.ledger.items()}:
        raise VerifyError("the ledger is not that of these adapters", where=str(config.output / RECEIPT))
    planned = {task.name: (task.dtype, task.source.shape) for task in plan.tasks}
    if planned != {name: (spec.dtype, spec.shape) for name, spec in tensors.items()}:
        raise VerifyError("the output's tensors are not those that base and adapters give", where=str(config.output))
    worst, beyond, count, elements, not_nearest = (-1.0, ""), 0.0, 0, 0, 0
    with _Pairs(plan, config, tensors) as pairs:
        for task in plan.tasks:
            tick(task.name)
            found = pairs.compare(task)
            if found is None:
                continue
            count, elements, not_nearest = count + 1, elements + task.source.numel, not_nearest + found.num_not_nearest
            worst = max(worst, (found.max_ulp, task.name))
            beyond = max(beyond, found.max_ulp_beyond_noise)
    return Recomputed(
        num_tensors=count,
        num_elements=elements,
        max_ulp=max(worst[0], 0.0),
        max_ulp_beyond_noise=beyond,
        worst_tensor=worst[1],
        num_not_nearest=not_nearest,
    )


def _check_same_inputs(plan: Plan, receipt: Receipt) -> None:
    given = [(adapter.weights_sha256, adapter.weight) for adapter in plan.adapters]
    merged = [(adapter.fingerprint, adapter.weight) for adapter in receipt.adapters]
    if given != merged:
        raise InputError(
            "the adapters, their order or their weights are not those of the receipt",
            where="--adapter",
            hint="give every adapter of the merge, in its order, with its --weight",
        )


class _Pairs:
    """Output blocks beside what the inputs say they should be; a context manager that closes the files."""

    def __init__(self, plan: Plan, config: MergeConfig, tensors: dict[str, TensorSpec]) -> None:
        self._reader = Reader(
            plan, config.base, tuple(adapter.home for adapter in config.all_adapters), torch.device("cpu")
        )
        self._plan, self._buffers = plan, self._reader.buffers()
        self._output, self._tensors = config.output, tensors
        self._fds: dict[str, int] = {}

    def __enter__(self) -> _Pairs:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        for fd in self._fds.values():
            os.close(fd)

    def compare(self, task: Task) -> Distance | None:
        """The distance of a merged tensor from float64. Raises VerifyError where it is beyond half an ulp plus the
        noise of float32, and where a tensor that is not merged differs at all."""
        if not task.changes:
            self._compare_exactly(task)
            return None
        again = self._recomputed(task)
        found = []
        for number in range(task.num_blocks):
            first, last = task.block(number)
            base = self._reader.read_dense(self._buffers, task.source, first, last, origin=task.origin).double()
            oracle, noise = again(base, number)
            stored = self._stored(task, first, last)
            result = distance(stored, oracle, noise)
            if result.num_beyond:
                raise VerifyError(
                    f"{result.num_beyond} elements near {first} are not base + delta ({result.max_ulp:.3g} ulp off)",
                    where=task.name,
                )
            found.append(result)
        return Distance(
            max_ulp=max((result.max_ulp for result in found), default=0.0),
            max_ulp_beyond_noise=max((result.max_ulp_beyond_noise for result in found), default=0.0),
            num_not_nearest=sum(result.num_not_nearest for result in found),
            num_beyond=0,
        )

    def _recomputed(self, task: Task) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        """What gives the float64 values of a block of `task`, and their noise, from the base's values."""
        if self._plan.combine.is_sum:
            changes = self._reader.load_changes(task, torch.float64)
            return lambda base, block: recompute(base, changes, first=task.block(block)[0], row_numel=task.row_numel)
        combination = self._reader.load_combination(task)
        if self._plan.combine.prunes:

            def counted(uppers: tuple[int, ...] | None) -> Tensor:
                blocks = (task.block(number) for number in range(task.num_blocks))
                deltas = (self._reader.read_deltas(self._buffers, task, *b, combination.parts) for b in blocks)
                return reduce(torch.add, (histograms(each, uppers) for each in deltas))

            thresholds = find_thresholds(task.source.numel, combination, counted)
            combination = replace(combination, thresholds=thresholds)
        wide = self._reader.load_parts(task, torch.float64)
        return lambda base, block: recompute_combined(
            base, combination, wide, block=block, first=task.block(block)[0], row_numel=task.row_numel
        )

    def _compare_exactly(self, task: Task) -> None:
        for number in range(task.num_blocks):
            first, last = task.block(number)
            if task.kind == "copy":
                size = ITEMSIZE[task.dtype]
                expected = bytearray((last - first) * size)
                self._reader.read(task.source.data, first * size, memoryview(expected), origin=task.origin)
                same = self._bytes(task, first, last) == expected
            else:
                base = self._reader.read_dense(self._buffers, task.source, first, last, origin=task.origin)
                cast = base.to(torch_dtype(task.dtype)).view(torch.uint8)  # as bytes, since NaN equals nothing
                same = torch.equal(torch.frombuffer(self._bytes(task, first, last), dtype=torch.uint8), cast)
            if not same:
                raise VerifyError(f"elements near {first} are not the base's", where=task.name)

    def _stored(self, task: Task, first: int, last: int) -> Tensor:
        return torch.frombuffer(self._bytes(task, first, last), dtype=torch_dtype(task.dtype))

    def _bytes(self, task: Task, first: int, last: int) -> bytearray:
        spec, size = self._tensors[task.name], ITEMSIZE[task.dtype]
        if spec.file not in self._fds:
            self._fds[spec.file] = open_input(self._output / spec.file)
        data = bytearray((last - first) * size)
        read_exact(self._fds[spec.file], memoryview(data), spec.begin + first * size, spec.file)
        return data
