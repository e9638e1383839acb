"""Which tensors of the output are packed, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distmerge.adapter.naming.conversion import read_names
from distmerge.adapter.naming.linears import known_names, linear_tensors, skip_list
from distmerge.checkpoint.header import FLOATS
from distmerge.checkpoint.packed_form import PackedForm, dtype_name, quantization_config
from distmerge.checkpoint.packing import FourBit
from distmerge.checkpoint.sidefiles import edited_config
from distmerge.config import MergeConfig
from distmerge.errors import InputError, listing
from distmerge.layout import Task
from distmerge.outputs import Output, Outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """The packed form of tensors by name; `skipped` are the modules that loaders must be told are not packed, None
    where their own rule says the same."""

    by_name: dict[str, PackedForm]
    skipped: tuple[str, ...] | None
    compute_dtype: str

    def warnings(self, tasks: Iterable[Task]) -> list[str]:
        """What is worth a word before `tasks` are packed."""
        if not self.by_name:
            return []
        found = ["--quantize: what the deltas change by less than a step of 4 bits is lost; the receipt says how much"]
        if len(dtypes := sorted({task.dtype for task in tasks if task.dtype in FLOATS})) > 1:
            kinds = " and ".join(dtype_name(dtype) for dtype in dtypes)
            found.append(
                f"--quantize: the output's floats are {kinds}, with which some loaders cannot compute together; "
                f"--dtype {dtype_name(dtypes[0])} makes them one"
            )
        return found

    def section(self, tasks: Iterable[Task]) -> dict[str, Any] | None:
        """The section of config.json that tells loaders of packed `tasks`; None if there are none."""
        dtypes = Counter(task.dtype for task in tasks if task.form is not None)
        form = next(iter(self.by_name.values()), None)
        if form is None:
            return None
        own = dtype_name(dtypes.most_common(1)[0][0])
        compute = own if self.compute_dtype == "auto" else self.compute_dtype
        return quantization_config(form, compute_dtype=compute, skipped=self.skipped)


def choose_forms(config: MergeConfig, outputs: Outputs) -> Forms:
    """How the linears of `outputs` are packed as `config` asks: those that the base holds in 4 bits, or that
    transformers and bitsandbytes would pack. Raises InputError where that cannot be known or done."""
    if config.quantize == "none":
        return Forms(by_name={}, skipped=None, compute_dtype="")
    form = PackedForm(
        kind="nf4" if config.quantize == "nf4" else "fp4",
        blocksize=config.quant_blocksize,
        double=config.quant_double,
        fitted=config.quantize_mode == "fitted",
    )
    linears, skipped = _linears(config, outputs)
    where = str(outputs.base.folder)
    if not linears:
        raise InputError("has no linear layer that bitsandbytes would pack", where=where)
    if turned := [name for name, transposed in linears.items() if transposed]:
        raise InputError(
            f"{len(turned)} weights are those of Conv1D layers, which are not packed: {listing(turned)}",
            where=where,
            hint="merge without --quantize",
        )
    if odd := [name for name in linears if not _is_matrix(outputs.tensors[name])]:
        raise InputError(
            f"{len(odd)} tensors are no float matrices, and cannot be packed: {listing(odd)}", where=odd[0]
        )
    return Forms(by_name=dict.fromkeys(linears, form), skipped=skipped, compute_dtype=config.quant_compute_dtype)


def _is_matrix(output: Output) -> bool:
    return len(output.source.shape) == 2 and output.source.dtype in FLOATS


def _linears(config: MergeConfig, outputs: Outputs) -> tuple[dict[str, bool], tuple[str, ...] | None]:
    """The output's tensors that are packed, of each whether it is packed transposed; and the modules that its
    configuration must name as not packed, None where the loader's own rule says the same.

    What loaders pack depends on the class of the output: it may have other layers and another head than the base.
    """
    base, skip, tensors = outputs.base, config.quant_skip, outputs.tensors
    held = {name: stored.packing for name, stored in base.tensors.items() if stored.packing is not None}
    disk = {name: output.source.shape for name, output in tensors.items()}
    told = edited_config(outputs.edits)
    if held and not skip and all(isinstance(packing, FourBit) for packing in held.values()):
        found = {n: packing.transposed for n, packing in held.items() if isinstance(packing, FourBit) and n in tensors}
        section = base.config.get("quantization_config")
        listed = section.get("llm_int8_skip_modules") if isinstance(section, dict) else None
        own = tuple(map(str, listed)) if isinstance(listed, list) else ()
        names = read_names(base.folder, disk, config=told)
        if isinstance(names, str):  # what the base says of itself is all that is known
            return found, own or None
        return found, skip_list(names, found, [own, ()]) or None
    names = known_names(base.folder, disk, told)
    tied = {name for group in names.tied for parameter in group for name in names.tensors(parameter)}
    found = {
        name: transposed
        for name, transposed in linear_tensors(names, skip, where=str(base.folder)).items()
        if name in tensors and name not in tied and tensors[name].source.numel
    }
    return found, skip_list(names, found, [skip]) or None
