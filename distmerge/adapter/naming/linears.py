"""Which weights bitsandbytes packs when transformers loads a base in 4 bits, by transformers' own rules."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from distmerge.adapter.naming.conversion import ModelNames, read_names
from distmerge.adapter.naming.slots import Slot
from distmerge.checkpoint.base import Base
from distmerge.checkpoint.packing import FourBit
from distmerge.errors import InputError, listing, printable

_NOTHING = "(?!)"  # a pattern that no module has


def packed_linears(base: Base, skip: tuple[str, ...] = ()) -> dict[str, bool]:
    """The tensors of `base` that are packed, in the base's order; of each whether it is packed transposed (Conv1D).

    Those are the weights of linear modules of the class that config.json names, but for the head, what is tied, the
    last module, and what the class keeps in float32. Modules that `skip` names (whole, by the end of their names, or
    by a pattern: `llm_int8_skip_modules`) take the place of the first three. Experts that are one parameter are not
    packed. Of a base that is packed already its own packed tensors.

    Raises InputError where the class is not known, and for a weight that the base does not hold as one tensor.
    """
    if base.packed:
        packings = {name: stored.packing for name, stored in base.tensors.items() if stored.packing is not None}
        return {name: isinstance(packing, FourBit) and packing.transposed for name, packing in packings.items()}
    names = known_names(base.folder, {name: stored.shape for name, stored in base.tensors.items()}, base.config)
    found = linear_tensors(names, skip, where=str(base.folder))
    return {name: found[name] for name in base.tensors if name in found}


def known_names(folder: Path, disk: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> ModelNames:
    """What transformers knows about the class that `config` names. Raises InputError if it does not know it."""
    names = read_names(folder, disk, config=config)
    if isinstance(names, str):
        raise InputError(
            f"which of its tensors are packed in 4 bits, only its class tells: {names}",
            where=str(folder),
            hint="pip install 'distmerge[transformers]', or use a base whose class it has",
        )
    return names


def linear_tensors(names: ModelNames, skip: tuple[str, ...], *, where: str) -> dict[str, bool]:
    """The tensors that are packed when a checkpoint of the class is loaded in 4 bits, and whether transposed. Raises
    InputError for a weight that is not one tensor."""
    found: dict[str, bool] = {}
    strange: list[str] = []
    # A tensor that becomes several parameters is known as a part of the first of them alone.
    cut = any(names.tensors(parameter) and not names.slots(parameter) for parameter in names.shapes)
    for parameter, transposed in _linears(names, skip):
        slots = names.slots(parameter)
        if len(slots) == 1 and slots[0] == Slot.whole(slots[0].name, names.shapes[parameter]):
            found[slots[0].name] = transposed
        elif names.tensors(parameter) or cut:
            strange.append(parameter)
    if strange:
        raise InputError(
            f"{len(strange)} linear weights are not one tensor each, and are packed as one: {listing(strange)}",
            where=where,
            hint="save the base with the names of its modules (save_pretrained(..., save_original_format=False))",
        )
    return found


def skip_list(names: ModelNames, packed: Collection[str], known: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The modules that config.json must name so that a loader takes the weights of exactly the tensors `packed` for
    packed ones: the first list of `known` that does so (an empty one is the loader's own rule), or one that names every
    other linear module. Raises InputError, naming modules, where no list does so."""
    every = dict.fromkeys(parameter for parameter, _ in _linears(names, (_NOTHING,)))
    own = {parameter: _tensor(names, parameter) in packed for parameter in every}
    rest = tuple(parameter.removesuffix(".weight") for parameter, is_packed in own.items() if not is_packed)
    due = {parameter for parameter, is_packed in own.items() if is_packed}
    for skip in (*known, rest or (_NOTHING,)):
        if {parameter for parameter, _ in _linears(names, skip)} == due and len(due) == len(packed):
            return skip
    wrong = sorted(due ^ {parameter for parameter, _ in _linears(names, rest or (_NOTHING,))}) or sorted(packed)
    raise InputError(
        f"{len(wrong)} weights cannot be told to loaders as packed, or as not: {listing(wrong)}",
        where="config.json",
        hint="merge without --quantize",
    )


def _tensor(names: ModelNames, parameter: str) -> str:
    slots = names.slots(parameter)
    return slots[0].name if len(slots) == 1 else parameter


def check_skipped(base: Base, skip: tuple[str, ...]) -> None:
    """Raises InputError if one of `skip` names no module of the class of `base`: what it was to spare would be packed.
    Where the class is not known, nothing is known of its modules."""
    if not skip:
        return
    names = read_names(base.folder, {name: stored.shape for name, stored in base.tensors.items()})
    if isinstance(names, str):
        return
    from transformers.quantizers.quantizers_utils import should_convert_module

    model: Any = names.model
    modules = [name for name, _ in model.named_modules() if name]
    for pattern in skip:
        if all(should_convert_module(name, [pattern]) for name in modules):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in modules)
            near = get_close_matches(pattern, [*ends, *modules[:2000]], n=1, cutoff=0.5)
            raise InputError(
                f"{printable(pattern)!r} names no module of {type(model).__name__}",
                where="--quant-skip",
                hint=f"did you mean {near[0]!r}?" if near else "the end of a module's name, such as 'lm_head'",
            )


def _linears(names: ModelNames, skip: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """The weights of the modules that become bnb.nn.Linear4bit, and whether these are transposed before
    (transformers.integrations.bitsandbytes.replace_with_bnb_linear)."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model: Any = names.model
    kept = HfQuantizer.get_modules_to_not_convert(model, list(skip) or None, model._keep_in_fp32_modules)
    for name, module in model.named_modules():
        conv = isinstance(module, Conv1D)
        linear = conv or type(module) is torch.nn.Linear
        if linear and should_convert_module(name, kept):
            yield f"{name}.weight", conv
