"""Packed tensors that stay packed: which may, as what tensors of the output, and what the configuration must skip."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from distmerge.adapter.naming.conversion import ModelNames, read_names
from distmerge.adapter.tied import find_pair
from distmerge.checkpoint.base import Base
from distmerge.checkpoint.foreign import refusal
from distmerge.checkpoint.header import TensorSpec
from distmerge.checkpoint.packing import Foreign, Stored
from distmerge.checkpoint.quantization import sections
from distmerge.errors import InputError, listing
from distmerge.outputs import Output, Outputs
from distmerge.storage.strict_json import read_object

# What loaders put into one matrix (vLLM, SGLang): packed alike, or not at all.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def refuse_foreign(tensors: Iterable[tuple[str, Stored]], *, quantize: bool = False) -> None:
    """Raises InputError for the first of `tensors`, which are to be dense, that cannot be dequantized; `quantize` says
    that the output is to be packed."""
    for name, stored in tensors:
        if isinstance(stored.packing, Foreign):
            raise refusal(name, stored.packing.kind, quantize=quantize)


def keep_packed(outputs: Outputs) -> Outputs:
    """`outputs` with the packed tensors that nothing changes in pieces, as the base holds them.

    What is changed becomes dense, and so does everything packed that loaders fuse with it: q, k and v, gate and up, all
    experts of a layer. The quantization sections stay unless nothing is left packed.
    """
    base, tensors = outputs.base, outputs.tensors
    _check_layers(outputs)
    packed = {name for name, output in tensors.items() if base.tensors.get(name, output.source).packing}
    changed = {name for name in packed if tensors[name].changes or tensors[name].origin}
    groups = {_fused(name) for name in changed}
    dense = [name for name in tensors if name in packed and _fused(name) in groups]
    if len(dense) == len(packed):
        return outputs
    kept = packed.difference(dense)
    found: dict[str, Output] = {}
    for name, output in tensors.items():
        for part in _parts(output) if name in kept else (output,):
            found[part.name] = part
    plain = [name for name in tensors if name not in packed]
    added = _linears(tensors, (name for name in plain if name not in base.tensors))
    modules = _modules_of(base)
    return replace(
        outputs,
        tensors=found,
        edits=replace(
            outputs.edits,
            skipped=modules([*dense, *added]),
            skipped_by_default=modules(_defaults(base, tensors, plain)),
        ),
        notes=(f"{len(kept)} packed tensors stay packed, {len(dense)} are changed, or fused with what is",),
    )


def _check_layers(outputs: Outputs) -> None:
    """Raises InputError where layers were repeated and the skip list names single ones: they have other numbers now."""
    stored = read_object(outputs.base.folder / "config.json") if outputs.base.config else {}
    if outputs.edits.config == stored:
        return
    lists = [value for section in sections(stored) for value in section.values() if isinstance(value, list)]
    if numbered := [entry for entries in lists for entry in entries if re.search(r"\.\d+\.", str(entry))]:
        raise InputError(
            f"layer_replication numbers the layers anew, and the skip list of config.json names {listing(numbered)}",
            where=str(outputs.base.folder),
            hint="merge without --keep-quantized",
        )


def _fused(name: str) -> str:
    """What the tensor `name` must be packed alike with: the same for all of them."""
    module = name.removesuffix(".weight")
    before, experts, _ = f"{module}.".partition(".experts.")
    if experts:
        return f"{before}.experts"
    parent, _, last = module.rpartition(".")
    return next((f"{parent}.{'|'.join(group)}" for group in _FUSED if last in group), module)


def _parts(output: Output) -> list[Output]:
    """The tensors that a packed one is made of, under names that fit its own: layers may have been repeated."""
    stored = output.source
    before = stored.name.rpartition(".")[0]  # the module; quanto writes `weight._data`
    module = output.name if before.endswith(".weight") else output.name.rpartition(".")[0]

    def part(spec: TensorSpec) -> Output:
        name = f"{module}{spec.name.removeprefix(before)}"
        return Output(name=name, source=Stored(data=spec, packing=None), origin=0, changes=(), as_is=True)

    return [part(spec) for spec in stored.specs]


def _linears(tensors: dict[str, Output], names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(".weight") and len(tensors[name].source.shape) == 2]


def _modules_of(base: Base) -> Callable[[list[str]], tuple[str, ...]]:
    """What gives the modules that weights belong to, as the files and as the class of the model call them; experts by
    the module that holds all of them, since loaders ask for that one."""
    model = read_names(base.folder, {name: stored.shape for name, stored in base.tensors.items()}, config=base.config)
    whole = base.quantization is not None and base.quantization.method == "compressed-tensors"

    def modules(names: list[str]) -> tuple[str, ...]:
        found = []
        for name in names:
            slot = model.find(name) if isinstance(model, ModelNames) else None
            for one in (name, *([slot.name] if slot else [])):
                group = _fused(one)
                found += [group] if group.endswith(".experts") else []
                found += [one.removesuffix(".weight")] if whole or not group.endswith(".experts") else []
        return tuple(dict.fromkeys(found))

    return modules


def _defaults(base: Base, tensors: dict[str, Output], plain: list[str]) -> list[str]:
    """The weights that loaders do not pack unless a list says otherwise: the head, and all linears that are plain."""
    pair = find_pair(base)
    embedding, head = pair or ("", "")
    heads = [head] if head and not (head in base.tensors and base.tensors[head].packing) else []
    return [*heads, *(name for name in _linears(tensors, plain) if name != embedding)]
