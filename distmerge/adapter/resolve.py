"""Adapters on base tensors: every tensor of an adapter finds the output tensors that it changes, or is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from distmerge.adapter.changes import ADD, BLOCK_ROWS_NUMEL, LORA, Change, Effect, Region, Replacement
from distmerge.adapter.cost import computed
from distmerge.adapter.effects import effects, parameter_paths
from distmerge.adapter.naming.names import Found, Names, find_names, refuse_foreign
from distmerge.adapter.naming.slots import Slot
from distmerge.adapter.naming.tables import parse_rules
from distmerge.adapter.patterns import time_limit
from distmerge.adapter.peft_adapter import CONFIG, Adapter
from distmerge.adapter.proof import is_copy
from distmerge.adapter.views import View
from distmerge.checkpoint.base import Base
from distmerge.checkpoint.header import FLOATS, ITEMSIZE, TensorSpec
from distmerge.checkpoint.layers import vocab_sizes
from distmerge.checkpoint.packing import Stored
from distmerge.errors import InputError, listing, printable
from distmerge.numerics.tuners import LOW_RANK, OPERATORS

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What one adapter does to the base, by output tensor: changes, and tensors of the adapter in place of the base's
    (`new` are those that the base lacks). `unused` says why others of its tensors are not merged, `names` how its names
    were found."""

    changes: dict[str, tuple[Change, ...]]
    replaced: dict[str, Stored]
    new: frozenset[str]
    unused: dict[str, str]
    names: Names
    warnings: tuple[str, ...]


def resolve(adapter: Adapter, number: int, weight: float, base: Base) -> Resolved:
    """What `adapter`, counted from 0, does to the tensors of `base` with `weight`.

    Raises InputError, naming the keys, for what the base lacks or what does not fit.
    """
    paths = parameter_paths(adapter)
    names = find_names(paths, base, parse_rules(adapter.options.rules), adapter.where, also=list(adapter.full))
    refuse_foreign([*paths, *adapter.full], names, adapter.where)
    with time_limit(str(adapter.folder / CONFIG), num_names=len(adapter.modules)):
        found, replacements = effects(adapter, names)
        warnings = [*_untargeted(adapter), *_unsaved(adapter, names), *_alpha_warnings(adapter)]
        changes: dict[str, list[Change]] = {}
        for effect in found:
            for name, change in _place_effect(effect, names, number, weight, adapter):
                changes.setdefault(name, []).append(change)
    trained, unused = _trained(replacements, names, adapter)
    replaced, new = _replaced(trained, names, weight, adapter)
    _check_complete(adapter, changes, replaced, unused)
    return Resolved(
        changes={name: tuple(found) for name, found in changes.items()},
        replaced=replaced,
        new=frozenset(new),
        unused=unused,
        names=names,
        warnings=tuple(warnings),
    )


def _place_effect(
    effect: Effect, names: Names, number: int, weight: float, adapter: Adapter
) -> Iterator[tuple[str, Change]]:
    """The changes to the tensors that hold the effect's parameter; together they are the whole effect."""
    found = names.place(effect.path)
    if found is None:
        raise InputError(f"the base has no {printable(effect.path)!r}", where=adapter.where)
    _check_factor(effect, weight, adapter)
    covered = 0
    for slot in found.slots:
        box = found.part.overlap(slot)
        if box is None:
            continue
        stored = names.base.tensors[slot.name]
        _check_target(effect, stored, slot.name, adapter)
        one = len(found.slots) == 1 and (slot.sizes, slot.order) == (found.part.sizes, found.part.order)
        if one or len(found.part.order) == 1 or found.part.numel == math.prod(effect.shape) == slot.numel:
            change = _whole(effect, found.part, slot)
        else:
            change = _part(effect, found.part, slot, box, adapter)
        covered += change.region.numel
        yield (
            slot.name,
            replace(
                change,
                adapter=number,
                weight=weight,
                whole=_needs_whole(change),
                computed=computed(change),
            ),
        )
    if covered != math.prod(effect.shape):
        raise InputError(
            f"the delta of {printable(effect.path)!r} has {math.prod(effect.shape)} elements, the base has {covered}",
            where=adapter.where,
            hint="the checkpoint does not hold all of the parameter",
        )


def _check_factor(effect: Effect, weight: float, adapter: Adapter) -> None:
    scaling = effect.options.get("scaling", 1.0)
    if not all(1e-30 < abs(factor) < 1e30 for factor in (scaling, weight, scaling * weight)):
        raise InputError(
            f"the scaling of {printable(effect.path)!r} is {scaling:g} times {weight:g}, beyond float32",
            where=adapter.where,
        )


def _whole(effect: Effect, part: Slot, slot: Slot) -> Change:
    """The change where one tensor holds exactly the parameter."""
    experts, out, into = effect.shape
    rows, cols = (into, out) if effect.transposed else (out, into)
    # Only experts can lie in the file with their matrices transposed.
    flipped = part.order != slot.order
    if flipped:
        rows, cols = cols, rows
    return Change(
        operator=effect.operator,
        tensors=effect.tensors,
        options=effect.options,
        shape=(experts, rows, cols),
        region=Region(matrices=(0, experts), rows=(0, rows), cols=(0, cols)),
        transposed=effect.transposed ^ flipped,
    )


def _part(effect: Effect, part: Slot, slot: Slot, box: Box, adapter: Adapter) -> Change:
    """The change where tensor and path are different boxes of one parameter: stacked or fused on one side only."""
    row, col = part.order[-2:]
    if {*slot.order[-2:]} != {row, col} or len(slot.order) > 3 or len(part.order) > 3:
        raise InputError(
            f"{slot.name!r} holds {printable(effect.path)!r} in a form that is not known", where=adapter.where
        )
    mine, theirs = (
        dict(zip(part.order, part.inside(box), strict=True)),
        dict(zip(slot.order, slot.inside(box), strict=True)),
    )
    stack = next((dim for dim in range(len(box)) if dim not in (row, col)), None)
    flipped = slot.order[-2:] != (row, col)
    out, into = (mine[col], mine[row]) if effect.transposed else (mine[row], mine[col])
    experts = mine.get(stack, (0, 1)) if stack is not None else (0, 1)
    matrices = theirs.get(stack, (0, 1)) if stack is not None else (0, 1)
    shape = slot.shape if len(slot.shape) == 3 else (1, *slot.shape)
    return Change(
        operator=effect.operator,
        tensors=_cut(effect, experts, out, into, adapter),
        options=effect.options,
        shape=(shape[0], shape[1], shape[2]),
        region=Region(matrices=matrices, rows=theirs[slot.order[-2]], cols=theirs[slot.order[-1]]),
        transposed=effect.transposed ^ flipped,
    )


def _cut(
    effect: Effect, experts: tuple[int, int], out: tuple[int, int], into: tuple[int, int], adapter: Adapter
) -> dict[str, View]:
    """The tensors of the operator for a part of its matrices."""
    if (experts, out, into) == tuple((0, size) for size in effect.shape):
        return effect.tensors
    tensors = dict(effect.tensors)
    if effect.operator == LORA and len(tensors["b"].size) == 3:
        a, b = tensors["a"], tensors["b"]
        return {
            "a": _narrow(_narrow(a, 0, experts), 2, into),
            "b": _narrow(_narrow(b, 0, experts), 1, out),
        }
    if effect.operator == "dora" and into == (0, effect.shape[2]):
        return {**tensors, "b": _narrow(tensors["b"], 0, out), "magnitude": _narrow(tensors["magnitude"], 0, out)}
    raise InputError(
        f"{effect.operator} on {printable(effect.path)!r} cannot be split over the tensors that hold it",
        where=adapter.where,
    )


def _narrow(view: View, dim: int, interval: tuple[int, int]) -> View:
    return view.narrow(dim, interval[0], interval[1] - interval[0])


def _needs_whole(change: Change) -> bool:
    if change.operator in (LORA, ADD) or change.operator in LOW_RANK:
        return False
    return change.transposed or not OPERATORS[change.operator].row_local or change.shape[2] > BLOCK_ROWS_NUMEL


def _check_target(effect: Effect, stored: Stored, name: str, adapter: Adapter) -> None:
    if stored.dtype not in FLOATS:
        raise InputError(
            f"{name!r} is stored as {stored.dtype} without scales, which cannot be merged into",
            where=adapter.where,
            hint="supported are BF16, F16, F32 and the packed formats of docs/formats.md; merge into the 16-bit base",
        )
    if effect.operator in ("kasa", "pissa", "olora") and stored.packing:
        raise InputError(
            f"{effect.operator} takes its first factors from the base, which is packed in {stored.packing.kind} here",
            where=name,
            hint="merge into the 16-bit base that training began with",
        )


def _trained(
    replacements: list[Replacement], names: Names, adapter: Adapter
) -> tuple[list[Replacement], dict[str, str]]:
    """The whole parameters that differ from the base's, and why others are not merged: PEFT saves the table of an
    embedding along with its LoRA, trained or not."""
    trained, unused = [], {}
    for replacement in replacements:
        module = replacement.path.rpartition(".")[0]
        saved = any(module.endswith(name) for name in adapter.config.modules_to_save)
        if not saved and is_copy(replacement, names, adapter.folder):
            unused[replacement.view.spec.name] = "copy of the base"
        else:
            trained.append(replacement)
    return trained, unused


def _replaced(
    replacements: list[Replacement], names: Names, weight: float, adapter: Adapter
) -> tuple[dict[str, Stored], set[str]]:
    """The tensors that take the place of the base's, and the names of those that the base lacks."""
    if replacements and weight != 1:
        keys = [replacement.view.spec.name for replacement in replacements]
        raise InputError(
            f"{len(keys)} tensors are whole parameters, which cannot be weighted with {weight}: {listing(keys)}",
            where=adapter.where,
            hint="--weight 1 takes them as they are",
        )
    replaced: dict[str, Stored] = {}
    new = set()
    for replacement in replacements:
        found = names.place(replacement.path)
        if found is None:
            name = _new_name(replacement, names, adapter)
            _check_kind(replacement.view.spec, FLOATS[0], adapter)
            replaced[name] = Stored(data=replacement.view.spec, packing=None)
            new.add(name)
            continue
        for name, spec in _pieces(replacement, found, vocab_sizes(names.base.config), adapter):
            _check_kind(spec, names.base.tensors[name].dtype, adapter)
            replaced[name] = Stored(data=spec, packing=None)
    return replaced, new


def _check_kind(spec: TensorSpec, dtype: str, adapter: Adapter) -> None:
    """Floats take the place of floats only, and whole numbers that of whole numbers."""
    if spec.dtype != dtype and not {spec.dtype, dtype} <= set(FLOATS):
        raise InputError(
            f"{printable(spec.name)!r} has dtype {spec.dtype} and would take the place of {dtype}", where=adapter.where
        )


def _new_name(replacement: Replacement, names: Names, adapter: Adapter) -> str:
    """The name of a parameter that the base lacks: a new head, which the configuration must name."""
    module, outermost = replacement.path.rpartition(".")[0], replacement.path.split(".")[0]
    saved = adapter.config.modules_to_save
    beside = all(name.split(".")[0] != outermost for name in names.base.tensors)
    if beside and any(module.endswith(name) or f".{name}." in f".{module}." for name in saved):
        return replacement.path
    raise InputError(
        f"{printable(replacement.view.spec.name)!r} is a whole parameter that the base lacks, and no head "
        "that modules_to_save names",
        where=adapter.where,
        hint="is this the base that the adapter was trained on? --map 'REGEX=>REPLACEMENT' renames",
    )


def _pieces(
    replacement: Replacement, found: Found, vocab: list[int], adapter: Adapter
) -> Iterator[tuple[str, TensorSpec]]:
    """The parts of a whole parameter that the tensors of the base hold, each as a tensor of its own."""
    view, part = replacement.view, found.part
    if not view.is_whole:
        raise InputError(f"{printable(view.spec.name)!r} is not stored as one piece", where=adapter.where)
    if len(found.slots) == 1 and found.slots[0].sizes == part.sizes and part.order == found.slots[0].order:
        _check_resized(replacement, part, vocab, adapter)
        yield found.slots[0].name, replace(view.spec, shape=view.size)
        return
    if view.size != part.shape:
        raise InputError(
            f"{printable(view.spec.name)!r} has shape {view.size}, the base {part.shape}", where=adapter.where
        )
    for slot in found.slots:
        box = part.overlap(slot)
        if box is None:
            continue
        inner = view
        for dim, interval in enumerate(part.inside(box)):
            inner = _narrow(inner, dim, interval)
        sizes = tuple(size for size, stride in zip(inner.size, inner.stride, strict=True))
        solid = math.prod(slot.shape) == inner.numel and inner.extent[1] - inner.extent[0] == inner.numel
        if (
            not solid
            or slot.order != tuple(dim for dim in part.order if dim in slot.order)
            or len(sizes) < len(slot.shape)
        ):
            raise InputError(
                f"{printable(view.spec.name)!r} cannot be split over {slot.name!r}",
                where=adapter.where,
                hint="save the base in the names that the adapter was trained with",
            )
        size = ITEMSIZE[view.spec.dtype]
        begin = view.spec.begin + inner.offset * size
        yield slot.name, replace(view.spec, shape=slot.shape, begin=begin, nbytes=inner.numel * size)


def _check_resized(replacement: Replacement, part: Slot, vocab: list[int], adapter: Adapter) -> None:
    """Only a vocabulary may have another size than in the base: the first dimension of embedding and head."""
    size, expected = replacement.view.size, part.shape
    resized = size[1:] == expected[1:] and len(size) == len(expected) and expected[:1] and expected[0] in vocab
    if size != expected and not resized:
        raise InputError(
            f"{printable(replacement.view.spec.name)!r} has shape {size}, the base {expected}",
            where=adapter.where,
            hint="the adapter was trained on another base",
        )


def _check_complete(
    adapter: Adapter, changes: dict[str, list[Change]], replaced: dict[str, Stored], unused: dict[str, str]
) -> None:
    used = {key for found in changes.values() for change in found for key in change.keys}
    used |= {stored.data.name for stored in replaced.values()} | unused.keys()
    if lost := [key for key in adapter.keys if key not in used]:
        raise InputError(
            f"{len(lost)} tensors of the adapter would not be applied: {listing(lost)}", where=adapter.where
        )


def _untargeted(adapter: Adapter) -> list[str]:
    config = adapter.config
    tuned = [name for name, roles in adapter.modules.items() if "lora_A.weight" in roles and ".base_layer" not in name]
    if not config.target_modules or config.target_parameters:
        return []
    if not (outside := [name for name in tuned if not config.targets(name)]):
        return []
    return [
        f"{adapter.folder.name}: target_modules does not name {len(outside)} modules that the file holds, "
        f"and which are merged: {listing(outside)}"
    ]


def _unsaved(adapter: Adapter, names: Names) -> list[str]:
    """What the configuration says was trained as a whole and the base has, but the file does not hold."""
    config, tensors = adapter.config, list(names.base.tensors)
    trained = [
        name
        for name in config.modules_to_save
        if any(_inside(path, name) for path in tensors) and not any(_inside(path, name) for path in adapter.full)
    ]
    biases = {f"{module}.bias" for module in adapter.modules} if config.bias != "none" else set()
    if config.bias == "all" and not names.how:
        biases.update(path for path in tensors if path.endswith(".bias"))
    trained += sorted(path for path in biases - adapter.full.keys() if names.place(path) is not None)
    if not trained:
        return []
    return [
        f"{adapter.folder.name}: the configuration says that more was trained than the file holds, and the base's "
        f"values stay: {listing(trained)}"
    ]


def _inside(path: str, name: str) -> bool:
    """True if the parameter `path` is in a module that PEFT finds by `name`: one that ends with it."""
    parts = path.split(".")[:-1]
    return any(".".join(parts[: end + 1]).endswith(name) for end in range(len(parts)))


def _alpha_warnings(adapter: Adapter) -> list[str]:
    # PEFT writes the patterns sorted, so the order of training is lost: the first match may not be training's.
    config = adapter.config
    if not config.alpha_pattern:
        return []
    several = {name: alphas for name in adapter.modules if len(set(alphas := config.matching_alphas(name))) > 1}
    return [
        f"{adapter.folder.name}: several alpha patterns match {name}: {alphas}; the first is used"
        for name, alphas in several.items()
    ]


def untouched_targets(adapter: Adapter, base: Base) -> list[str]:
    """Base tensors that the adapter's configuration targets but its file holds nothing for."""
    touched = {name.split(".base_layer")[0] for name in adapter.modules}
    modules = (
        name.removesuffix(".weight")
        for name, stored in base.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    )
    with time_limit(str(adapter.folder / CONFIG), num_names=len(base.tensors)):
        return [module for module in modules if module not in touched and adapter.config.targets(module)]
