"""Which weights bitsandbytes packs when transformers loads a base in 4 bits, by transformers' own rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distmerge.adapter.naming.conversion import ModelNames, read_names
from distmerge.adapter.naming.slots import Slot
from distmerge.checkpoint.base import Base
from distmerge.checkpoint.packing import FourBit
from distmerge.errors import InputError, listing


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
    names = read_names(base.folder, {name: stored.shape for name, stored in base.tensors.items()})
    if isinstance(names, str):
        raise InputError(
            f"which of its tensors are packed in 4 bits, only its class tells: {names}",
            where=str(base.folder),
            hint="pip install 'distmerge[transformers]', or use a base whose class it has",
        )
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
            where=str(base.folder),
            hint="save the base with the names of its modules (save_pretrained(..., save_original_format=False))",
        )
    return {name: found[name] for name in base.tensors if name in found}


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
