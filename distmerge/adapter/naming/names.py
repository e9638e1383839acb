"""An adapter's names on a base's tensors: as they stand, renamed as a whole, or by transformers' conversion tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property

from distmerge.adapter.naming.conversion import ModelNames, read_names
from distmerge.adapter.naming.slots import Slot
from distmerge.adapter.naming.tables import Renaming, Rule, apply_rules, rename
from distmerge.checkpoint.base import Base
from distmerge.checkpoint.formats import CONV1D_MODELS, CONV1D_MODULES
from distmerge.checkpoint.packing import Foreign
from distmerge.errors import InputError, listing, printable

_IN_PROJ = "in_proj_weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A path of the adapter on disk: `part` is the box of a parameter that the path names, `slots` are the tensors that
    hold the parameter."""

    part: Slot
    slots: tuple[Slot, ...]


@dataclass(frozen=True, kw_only=True)
class Names:
    """How the names of an adapter lead to the tensors of `base`; `how` says it to the user, empty where they stand as
    they are. Answers in the adapter's own names."""

    base: Base
    how: str
    renaming: Renaming
    model: ModelNames | None = field(repr=False)
    _places: dict[str, Found | None] = field(default_factory=dict, repr=False, compare=False)

    def place(self, path: str) -> Found | None:
        """Where the parameter `path` lies; None if the base has none of that name."""
        if path not in self._places:
            self._places[path] = self._find(path)
        return self._places[path]

    def _find(self, path: str) -> Found | None:
        disk = self._renamed(path)
        if stored := self.base.tensors.get(disk):
            whole = Slot.whole(disk, stored.shape)
            return Found(part=whole, slots=(whole,))
        if self.model is None:
            return None
        part = self.model.find(disk)
        slots = self.model.slots(part.name) if part else ()
        return Found(part=part, slots=slots) if part and slots else None

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The shape of the parameter `path` as the adapter sees it."""
        found = self.place(path)
        return found.part.shape if found else None

    def order(self, module: str) -> Sequence[str] | None:
        """The parameters of `module` in the order of registration; None where no class tells."""
        if self._model is None:
            return None
        inside = f"{self._model_module(self._model, module)}."
        names = [name.removeprefix(inside) for name in self._model.shapes if name.startswith(inside)]
        return [name for name in names if "." not in name] or None

    def holds_transposed(self, path: str) -> bool:
        """True for the weights of transformers' Conv1D layers."""
        module = path.removesuffix(".weight").rsplit(".", 1)[-1]
        return self.base.config.get("model_type") in CONV1D_MODELS and module in CONV1D_MODULES

    def marks_transposed(self, module: str) -> bool | None:
        """What the class of the experts `module` says of their layout; None where no class tells."""
        return self._model.is_transposed(self._model_module(self._model, module)) if self._model else None

    @cached_property
    def _model(self) -> ModelNames | None:
        if self.model is not None:
            return self.model
        read = _read_model(self.base)
        return read if isinstance(read, ModelNames) else None

    def _model_module(self, model: ModelNames, module: str) -> str:
        """What the class calls a module that holds parameters."""
        disk = self._renamed(f"{module}.").removesuffix(".")
        for name in self.base.tensors:
            if name.startswith(f"{disk}.") and (part := model.find(name)):
                return part.name.rsplit(".", 1)[0]
        return disk

    def _renamed(self, path: str) -> str:
        """The name on disk of a parameter whose module was renamed, or of that parameter itself."""
        paths = self.renaming.paths
        if path in paths:
            return paths[path]
        module, _, name = path.rpartition(".")
        if (weight := paths.get(f"{module}.weight")) is not None:
            return f"{weight.rpartition('.')[0]}.{name}"
        return self.renaming.apply(path)


def find_names(
    paths: Sequence[str], base: Base, rules: tuple[Rule, ...], where: str, *, also: Sequence[str] = ()
) -> Names:
    """How `paths`, the parameters that an adapter tunes, lead to the tensors of `base`: as they stand, by the user's
    `rules`, by one table of renamings for all of them, or by transformers' own tables. Of the paths in `also` the base
    may lack some; ways that find all of them come first.

    Raises InputError, naming paths, where none of these finds all of them, or several tables do.
    """

    def known(path: str) -> bool:
        return path in base.tensors or path.removesuffix("weight") + _IN_PROJ in base.tensors

    every = [*paths, *also]
    if found := rename(every, known, rules):
        return Names(base=base, how=found.name, renaming=found, model=None)
    model = _read_model(base)
    mapped = Renaming(name="", paths=apply_rules(every, rules), rules=rules)
    names = None
    if not isinstance(model, str):
        names = Names(base=base, how="transformers' conversion tables", renaming=mapped, model=model)
    complete = names is not None and all(map(names.place, every))
    if also and not complete and (found := rename(paths, known, rules)):
        return Names(base=base, how=found.name, renaming=found, model=None)
    if names is None:
        lost = [path for path in paths if not known(mapped.paths[path])]
        raise _not_found(lost, paths, base, where, f"; {model}")
    if lost := [path for path in paths if names.place(path) is None]:
        raise _not_found(lost, paths, base, where, "")
    return names


def refuse_foreign(paths: Sequence[str], names: Names, where: str) -> None:
    """Raises InputError for the first of `paths` that lies in a tensor which another method packed."""
    for path in paths:
        found = names.place(path)
        for slot in found.slots if found else ():
            if isinstance(packing := names.base.tensors[slot.name].packing, Foreign):
                raise InputError(
                    f"{slot.name!r} is packed by {packing.kind}, which cannot be merged into",
                    where=where,
                    hint="merge into the 16-bit base instead",
                )


def _read_model(base: Base) -> ModelNames | str:
    return read_names(base.folder, {name: stored.shape for name, stored in base.tensors.items()})


def _not_found(lost: list[str], paths: Sequence[str], base: Base, where: str, why: str) -> InputError:
    wanted = lost[0]
    alike = [name for name in base.tensors if name.rsplit(".", 2)[-2:] == wanted.rsplit(".", 2)[-2:]]
    near = get_close_matches(wanted, alike[:2000], n=2, cutoff=0.5)
    found = f"the base has {listing(near)}" if near else "is this the base that the adapter was trained on?"
    return InputError(
        f"{len(lost)} of {len(paths)} modules are not in the base: {listing(lost)}",
        where=where,
        hint=f"looked for {printable(wanted)!r}; {found}{why}; --map 'REGEX=>REPLACEMENT' renames",
    )
