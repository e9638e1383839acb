"""The plan: every decision of a merge, made from headers and small files before the first byte is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distmerge.adapter.indices import check_indices
from distmerge.adapter.initial import check_initial
from distmerge.adapter.naming.conversion import read_names
from distmerge.adapter.naming.linears import check_skipped
from distmerge.adapter.naming.names import Names
from distmerge.adapter.peft_adapter import Adapter, AdapterOptions, read_adapter
from distmerge.adapter.screen import Screened, screen
from distmerge.checkpoint.base import INDEX, RECEIPT, Base, FileMark, folder_name, read_base
from distmerge.checkpoint.header import ITEMSIZE, build_header
from distmerge.checkpoint.packed_form import scales_nbytes, scratch_nbytes
from distmerge.checkpoint.packing import Simulated
from distmerge.checkpoint.quantization import FILES
from distmerge.checkpoint.sidefiles import NewHead, SideFile, find_side_files, output_config
from distmerge.config import AdapterChoice, MergeConfig
from distmerge.doubts import doubts
from distmerge.errors import InputError, listing, printable
from distmerge.fingerprint import marks
from distmerge.forms import Forms, choose_forms
from distmerge.keeping import keep_packed, refuse_foreign
from distmerge.layout import (
    KEPT_STACKS,
    MEASURED_NUMEL,
    OutputFile,
    Segment,
    Task,
    cut_segments,
    place,
    used_tensors,
)
from distmerge.numerics.methods import SUM, Combine
from distmerge.outputs import Outputs, collect
from distmerge.redaction import redacted
from distmerge.shards import make_shards
from distmerge.simulate import simulate
from distmerge.storage.checksums import READ_BACK, require
from distmerge.storage.collector import uncollected
from distmerge.storage.files import lookup_errors
from distmerge.storage.records import encode_rows

SAID = ("notes", "warnings")  # fields of a plan that decide nothing

MAX_FOLLOWERS = 8  # threads of a rank that read files back for their digests
FOLLOWER_NBYTES = 1 << 18  # through which each of them reads
INPUT_NBYTES = 1 << 20  # through which a rank hashes inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedAdapter:
    """An adapter as the plan and the receipt name it. `num_tensors` are merged; `unused` says of every other tensor in
    its files why nothing of it is merged, and `names` how its names led to the base's, if not as they stand. `initial`
    says that it is what the adapter before it began as, and that its deltas belong to that one's. With `partial` the
    digest is that of the merged tensors alone: the files hold the base too."""

    name: str
    tuner: str
    base_model: str
    weight: float
    files: tuple[str, ...]
    partial: bool
    weights_sha256: str
    config_sha256: str
    num_tensors: int
    unused: dict[str, str]
    names: str
    initial: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every task of a run and where its bytes go. Names no absolute path and no rank: equal inputs and options give an
    equal plan. The times of the base's files belong to the inputs, since a header does not show that data changed.
    `num_kept` counts the output's tensors that are parts of packed weights, as the base holds them. `file_digest` is
    the kind of digest that weight files get; with `hash_inputs` the files of base and adapters are hashed too."""

    fingerprint: dict[str, str]
    base_files: tuple[FileMark, ...]
    adapters: tuple[PlannedAdapter, ...]
    files: tuple[OutputFile, ...]
    tasks: tuple[Task, ...]
    segments: tuple[Segment, ...]
    side_files: tuple[SideFile, ...]
    config_json: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    combine: Combine = SUM
    num_kept: int = 0
    file_digest: str = "sha256"
    hash_inputs: bool = False

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the plan as canonical JSON, without what it only says."""
        return hashlib.sha256(self._encode()).hexdigest()

    def canonical(self) -> bytes:
        """The plan as canonical JSON, without what it only says; its digest is known from then on."""
        data = self._encode()
        vars(self).setdefault("digest", hashlib.sha256(data).hexdigest())  # encoding it once more would take as long
        return data

    def _encode(self) -> bytes:
        with uncollected():
            content = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in SAID}
            return encode_rows(content).encode()

    @cached_property
    def _by_file(self) -> list[list[Task]]:
        groups: list[list[Task]] = [[] for _ in self.files]
        for task in self.tasks:
            groups[task.file].append(task)
        return groups

    @cached_property
    def _segments_by_file(self) -> list[list[int]]:
        groups: list[list[int]] = [[] for _ in self.files]
        for number, segment in enumerate(self.segments):
            groups[segment.file].append(number)
        return groups

    def tasks_of(self, file: int) -> list[Task]:
        return self._by_file[file]

    def segments_of(self, file: int) -> list[int]:
        """The numbers of the segments of a file, in the order of its bytes."""
        return self._segments_by_file[file]

    def header_of(self, file: int) -> bytes:
        parts = [(p.name, p.dtype, p.shape) for task in self.tasks_of(file) for p in task.parts]
        return build_header(parts, self.files[file].data_begin)

    @cached_property
    def adapter_keys(self) -> frozenset[tuple[int, str]]:
        """The adapters' tensors that go into the output: the adapter's number from 0, and the name in its file."""
        return frozenset(key for task in self.tasks for key in task.adapter_keys)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """For each adapter folder the number, from 0, of the one that its deltas belong to: its own, or that of the
        adapter that it is the beginning of."""
        return tuple(n - adapter.initial for n, adapter in enumerate(self.adapters))

    @property
    def reads_back(self) -> bool:
        """True if weight files are read back for their digests."""
        return self.file_digest in READ_BACK

    @property
    def followed_nbytes(self) -> int:
        """Bytes of the buffers through which weight files are read back, and inputs are hashed."""
        return MAX_FOLLOWERS * FOLLOWER_NBYTES * self.reads_back + INPUT_NBYTES * self.hash_inputs

    @property
    def nbytes_to_write(self) -> int:
        return sum(file.nbytes for file in self.files)

    @cached_property
    def held_nbytes(self) -> int:
        """Bytes of what changes one tensor, while its blocks are worked on."""
        return max((sum(change.held_nbytes for change in task.changes) for task in self.tasks), default=0)

    @cached_property
    def loading_nbytes(self) -> int:
        """Bytes that loading what changes one tensor takes at most, and of stacks that are kept for the next."""
        changes = [change for task in self.tasks for change in task.changes]
        sparse = [view.spec.nbytes for change in changes for view in change.tensors.values() if view.is_sparse]
        loading = max((sum(c.loading_nbytes for c in t.changes) for t in self.tasks), default=0)
        loading += max((scales_nbytes(task.form, task.source.numel) for task in self.tasks if task.form), default=0)
        loading += self.simulated_nbytes + self._learning_nbytes
        return loading + self.held_nbytes + KEPT_STACKS * max(sparse, default=0)

    @cached_property
    def simulated_nbytes(self) -> int:
        """Bytes of the scales that are kept of the tensors of one segment, where they are read through 4 bits."""
        packings = [task.source.packing for task in self.tasks]
        kept = [one.kept_nbytes if isinstance(one, Simulated) else 0 for one in packings]
        return max((sum(kept[task] for task in {piece.task for piece in s.pieces}) for s in self.segments), default=0)

    @property
    def _learning_nbytes(self) -> int:
        """Bytes that finding the scales of one of them takes."""
        packings = (task.source.packing for task in self.tasks)
        return max((one.learning_nbytes for one in packings if isinstance(one, Simulated)), default=0)

    @cached_property
    def block_numel(self) -> int:
        """Elements of the largest block."""
        return max(task.largest_block_numel for task in self.tasks)

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of the largest block of the output, before it is packed."""
        return max(max(task.head_nbytes, ITEMSIZE[task.dtype] * task.largest_block_numel) for task in self.tasks)

    @cached_property
    def lane_nbytes(self) -> int:
        """Bytes of the buffers through which one block passes (see lanes.Lane), and of what its changes take."""
        stored = max(task.stored_block_nbytes for task in self.tasks)
        packed = max((task.largest_block_numel for task in self.tasks if task.source.packing), default=0)
        operators = max(task.scratch_nbytes for task in self.tasks)
        scales = max(
            (t.source.packing.scratch_nbytes(t.largest_block_numel) for t in self.tasks if t.source.packing), default=0
        )
        blocks = stored + self.block_nbytes + 4 * self.block_numel + 6 * packed
        measured = 8 * MEASURED_NUMEL
        spectrum = max(task.spectrum_nbytes for task in self.tasks)
        return blocks + scales + operators + measured + spectrum + self._combine_nbytes + self._packing_nbytes

    @cached_property
    def least_nbytes(self) -> int:
        """Bytes with which one lane can work: for one block, and for what changes the largest tensors."""
        return self.loading_nbytes + self.followed_nbytes + self.lane_nbytes + self.held_nbytes

    @property
    def _packing_nbytes(self) -> int:
        """Bytes that packing one block takes at most."""
        return max((scratch_nbytes(task.form, task.largest_block_numel) for task in self.tasks if task.form), default=0)

    @property
    def _combine_nbytes(self) -> int:
        """Bytes that combining the deltas of one block takes at most."""
        if self.combine.is_sum:
            return 0
        counts = [(len({self.owners[c.adapter] for c in t.changes}), t.largest_block_numel) for t in self.tasks]
        return max(self.combine.scratch_nbytes(deltas, numel) for deltas, numel in counts)


@uncollected()
def make_plan(config: MergeConfig, device: str, *, scratch: Path | None = None) -> Plan:
    """The plan of `config` on devices of type `device`. Reads headers and small files of the base, and the adapters
    whole, once. Adapters in pickles are rewritten in the folder `scratch`; without it in a temporary folder that lasts
    as long as the process. Raises InputError for everything that cannot be merged; writes nothing else."""
    require(config.digest)
    with lookup_errors(config.base):
        base = read_base(config.base)
        if not config.keep_quantized:
            refuse_foreign(base.tensors.items(), quantize=config.quantize != "none")
        adapters = [(_read(choice, config, base, scratch), choice.weight) for choice in config.all_adapters]
    for number, initial in enumerate(config.initials):
        if initial:
            check_initial(adapters[number - 1][0], adapters[number][0])
    outputs = _collect(base, adapters, config)
    forms = choose_forms(config, outputs)
    files, tasks = place(make_shards(base, outputs, forms, config))
    warnings = [*base.warnings, *outputs.warnings, *forms.warnings(tasks)]
    planned, notes = [], list(outputs.notes)
    for number, (adapter, weight) in enumerate(adapters):
        check_indices(adapter, (change for task in tasks for change in task.changes if change.adapter == number))
        used = used_tensors(tasks, number) if adapter.is_partial else ()
        found = screen(adapter, outputs.names[number], used, allow_zero_delta=config.allow_zero_delta)
        one = _planned(adapter, weight, outputs.names[number], outputs.unused[number], found)
        path = config.all_adapters[number].folder
        name = printable(path.stem) if path.is_file() else folder_name(adapter.folder)
        planned.append(replace(one, name=name, initial=config.initials[number]))
        notes += [f"{adapter.folder.name}: {text}" for text in (*adapter.notes, *found.notes)]
        warnings += [*found.warnings, *doubts(adapter, outputs.names[number], config)]
    config_json = _output_config(base, outputs, tasks, config, forms)
    if outputs.edits.head is not None and config_json is not None:
        _check_head(outputs.edits.head, base, tasks, json.loads(config_json))
    made = {"README.md", RECEIPT, INDEX, *(file.name for file in files)}
    if config_json is not None:
        made.add("config.json")
    if outputs.edits.skipped is None:
        made.update(FILES)
    plan = Plan(
        fingerprint=marks(config, base.files, planned, device),
        base_files=base.files,
        adapters=tuple(planned),
        files=files,
        tasks=tasks,
        segments=cut_segments(tasks),
        side_files=_side_files(base, [adapter for adapter, _ in adapters], config, made),
        config_json=config_json,
        notes=tuple(dict.fromkeys(map(redacted, notes))),
        warnings=tuple(dict.fromkeys(map(redacted, warnings))),
        combine=_combine(config),
        num_kept=sum(output.as_is for output in outputs.tensors.values()),
        file_digest=config.digest,
        hash_inputs=config.hash_inputs,
    )
    count_lanes(plan, config.memory_budget, wanted=1)
    return plan


def _side_files(base: Base, adapters: list[Adapter], config: MergeConfig, made: set[str]) -> tuple[SideFile, ...]:
    # Tokenizer and templates are those of the folder that training saved, not of where a file happens to lie.
    silent = {
        number
        for number, choice in enumerate(config.all_adapters, start=1)
        if config.initials[number - 1] or choice.folder.is_file()
    }
    return find_side_files(
        base.folder,
        tuple(adapter.folder for adapter in adapters),
        weights=(tuple(mark.name for mark in base.files), *(adapter.files for adapter in adapters)),
        made=made,
        silent=silent,
    )


def _collect(base: Base, adapters: list[tuple[Adapter, float]], config: MergeConfig) -> Outputs:
    check_skipped(base, config.quant_skip)
    outputs = collect(base, adapters)
    if config.keep_quantized:
        outputs = keep_packed(outputs)
    outputs = simulate(outputs, base, config)
    refuse_foreign((name, output.source) for name, output in outputs.tensors.items())
    return outputs


def _combine(config: MergeConfig) -> Combine:
    density = None if config.density is None else float(config.density)
    return Combine(method=config.combine, density=density, seed=config.seed)


def _read(choice: AdapterChoice, config: MergeConfig, base: Base, scratch: Path | None) -> Adapter:
    options = AdapterOptions(
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        allow_pickle=config.allow_pickle,
        rules=config.map,
        expert_b_order=config.expert_b_order,
        scratch=scratch,
    )
    modules = {name.rpartition(".")[0] for name in base.tensors}
    return read_adapter(
        choice.folder, options, base_modules=modules, base_config=base.config, initial=choice.initial is not None
    )


def _planned(adapter: Adapter, weight: float, names: Names, unused: dict[str, str], found: Screened) -> PlannedAdapter:
    return PlannedAdapter(
        name=adapter.folder.name,
        tuner=adapter.config.peft_type,
        base_model=redacted(adapter.config.base_model),
        weight=weight,
        files=adapter.files,
        partial=adapter.is_partial,
        weights_sha256=found.mark.weights_sha256,
        config_sha256=found.mark.config_sha256,
        num_tensors=len(adapter.keys) - len(unused),
        unused={**adapter.unused, **unused},
        names=names.how,
    )


def _check_head(head: NewHead, base: Base, tasks: tuple[Task, ...], config: dict[str, Any]) -> None:
    """Raises InputError if the class with the new head has parameters that nobody brings: they were random in training
    and are not saved. Where transformers does not know the class, nothing is known of its parameters."""
    model = read_names(base.folder, {task.name: task.source.shape for task in tasks}, config=config)
    if isinstance(model, str):
        return
    tied = {name for group in model.tied for name in group[1:]}
    if lost := [name for name in model.shapes if name not in tied and not model.slots(name)]:
        raise InputError(
            f"{config['architectures'][0]} has {len(lost)} parameters that neither base nor adapter holds: "
            f"{listing(lost)}",
            where=head.where,
            hint="training began with random values that it did not save; train with modules_to_save for them",
        )


def _output_config(
    base: Base, outputs: Outputs, tasks: tuple[Task, ...], config: MergeConfig, forms: Forms
) -> str | None:
    if not base.config:
        return None
    dtypes: Counter[str] = Counter()
    for task in tasks:
        dtypes[task.dtype] += task.source.numel * (not outputs.tensors[task.name].as_is)
    recast = config.dtype != "auto"
    made = output_config(base, dict(dtypes), outputs.edits, recast=recast, quantization=forms.section(tasks))
    return made.decode() if made is not None else None


def count_lanes(plan: Plan, memory_budget: int, *, wanted: int) -> int:
    """How many of `wanted` lanes fit the budget beside the factors. Raises InputError if not even one does."""
    # Each lane may be at another tensor, and what changes one more is being loaded.
    lane = plan.lane_nbytes + plan.held_nbytes
    if (fits := 1 + (memory_budget - plan.least_nbytes) // lane) < 1:
        raise InputError(
            f"{memory_budget} bytes are too few: one block and the largest factors take {plan.least_nbytes}",
            where="--memory-budget",
            hint=f"--memory-budget {-(-plan.least_nbytes // (1 << 20))}MiB",
        )
    return min(wanted, fits)
