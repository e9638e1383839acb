"""An adapter as its files describe it: the tensors of every tuned module, and the parameters that it holds whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distmerge.adapter.peft_config import PeftConfig, read_config
from distmerge.adapter.saved.keys import Key, parse
from distmerge.adapter.saved.training import Saved, read_saved
from distmerge.adapter.tuners.registry import TUNERS, UNMERGEABLE
from distmerge.adapter.views import View
from distmerge.checkpoint.header import TensorSpec
from distmerge.checkpoint.layers import vocab_sizes
from distmerge.errors import InputError, listing, printable
from distmerge.storage.strict_json import read_object

CONFIG = "adapter_config.json"
ALL_TAILS = tuple(
    sorted({tail for tuner in TUNERS.values() for tail in (*tuner.tails, *tuner.optional, *tuner.shared)})
)
_SAVED = "modules_to_save"
_FLOATS = ("BF16", "F16", "F32")
_INTEGERS = ("I64", "I32", "I16", "U8")
# Tensors of training that the trained function does not depend on.
_IDLE = {
    "lora_velora_embed": "VeLoRA's compression of gradients",
    "lora_monteclora_sampler": "MonteCLoRA's sampler, which only training uses",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """What the user says about adapters, where their files do not."""

    lora_alpha: float | None = None
    use_rslora: bool | None = None
    allow_pickle: bool = False
    rules: tuple[str, ...] = ()
    expert_b_order: str = "auto"
    scratch: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder, as its configuration and headers describe it.

    `modules` gives the tensors of each tuned module by role, `full` the parameters that are held whole by their path,
    `shared` the tensors that belong to all modules, by name. `unused` says of every other tensor in the file why
    nothing of it is merged. `repeats` pairs tensors that must be equal, of which the second is merged; `copies` and
    `mirrors` are what the file holds of the base, dense and packed, by path. `pickles` names what a rewritten file was.
    """

    folder: Path
    files: tuple[str, ...]
    pickles: dict[str, str]
    config: PeftConfig
    options: AdapterOptions
    modules: dict[str, dict[str, View]]
    full: dict[str, View]
    shared: dict[str, View]
    unused: dict[str, str]
    repeats: tuple[tuple[View, View], ...]
    copies: dict[str, View]
    mirrors: dict[str, TensorSpec]
    notes: tuple[str, ...]

    @property
    def where(self) -> str:
        """The file that messages name."""
        return str(self.folder / self.pickles.get(self.files[0], self.files[0]))

    @property
    def is_partial(self) -> bool:
        """True if the files hold the base too."""
        return bool(self.copies or self.mirrors)

    @property
    def views(self) -> list[View]:
        """Every view of a tensor that is merged."""
        tuned = [view for roles in self.modules.values() for view in roles.values()]
        return [*tuned, *self.full.values(), *self.shared.values()]

    @property
    def keys(self) -> tuple[str, ...]:
        """Every tensor that is merged, by its name in the file, once."""
        return tuple(dict.fromkeys(view.spec.name for view in self.views))


def read_adapter(
    path: Path,
    options: AdapterOptions,
    *,
    base_modules: Collection[str] = (),
    base_config: Mapping[str, Any] | None = None,
    initial: bool = False,
) -> Adapter:
    """The adapter in the folder, or the file, at `path`; `base_modules` and `base_config` tell how the base calls its
    parts, for files with names of their own. `initial` says that the adapter as it was before training is given too.

    Raises InputError, naming the keys, for everything that is not understood.
    """
    _refuse_unmergeable(path / CONFIG)
    saved = read_saved(
        path,
        base_modules=base_modules,
        base_config=base_config or {},
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        allow_pickle=options.allow_pickle,
        tails=ALL_TAILS,
        scratch=options.scratch,
    )
    config = read_config(
        saved.config,
        str(saved.folder / CONFIG),
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        initial=initial,
    )
    where = str(saved.folder / saved.pickles.get(saved.files[0], saved.files[0]))
    parts = _sort(saved, vocab_sizes(dict(base_config or {})), where=where)
    repeats = _take_repeats(parts, config)
    return Adapter(
        folder=saved.folder,
        files=saved.files,
        pickles=saved.pickles,
        config=config,
        options=options,
        modules={name: roles for name, roles in sorted(parts.modules.items()) if roles},
        full=dict(sorted(parts.full.items())),
        shared=parts.shared,
        unused={**saved.unused, **parts.unused},
        repeats=repeats,
        copies={**saved.copies, **_copies(parts, where)},
        mirrors=saved.mirrors,
        notes=tuple(saved.notes),
    )


def _refuse_unmergeable(path: Path) -> None:
    """Says that a tuner cannot be merged before anything is said of its tensors."""
    peft_type = read_object(path).get("peft_type") if path.is_file() else None
    if isinstance(peft_type, str) and peft_type in UNMERGEABLE:
        raise InputError(f"peft_type {peft_type!r} cannot be merged: {UNMERGEABLE[peft_type]}", where=str(path))


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The tensors of a file by what they are."""

    modules: dict[str, dict[str, View]] = field(default_factory=dict)
    full: dict[str, View] = field(default_factory=dict)
    shared: dict[str, View] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    copies: list[tuple[Key, View]] = field(default_factory=list)


def _sort(saved: Saved, vocab: list[int], where: str) -> _Sorted:
    """`vocab` are the sizes of the base's vocabulary: a table of another size was made for the adapter."""
    found = _Sorted()
    for name, view in saved.tensors.items():
        key = parse(name, ALL_TAILS)
        idle = _IDLE.get(key.role.split(".")[0])
        rows = view.size[0] if vocab and view.size else None
        resized = key.role.startswith("token_adapter.base_layer.") and rows is not None and rows not in vocab
        if key.role.startswith(("original_module.", "token_adapter.base_layer.")) and not resized:
            found.unused[view.spec.name] = "copy of the base"
            found.copies.append((key, view))
        elif idle:
            found.unused[view.spec.name] = idle
        elif key.shared:
            found.shared[key.role] = view
        elif key.is_full or key.is_copy:
            if key.tensor in found.full:
                names = [found.full[key.tensor].spec.name, view.spec.name]
                raise InputError(f"{printable(key.tensor)!r} is there twice: {listing(names)}", where=where)
            found.full[key.tensor] = view
        else:
            found.modules.setdefault(key.module, {})[key.role] = view
    pruned = saved.config.get("peft_type") == "ADALORA"
    tuned = [view for roles in found.modules.values() if not (pruned and _is_pruned(roles)) for view in roles.values()]
    _check_views([*tuned, *found.shared.values(), *found.full.values()], where)
    _check_kinds(found, where)
    return found


def _copies(found: _Sorted, where: str) -> dict[str, View]:
    """The copies of the base that are left to be compared: not those of modules that were trained beside them."""
    rest = [(key, view) for key, view in found.copies if key.tensor not in found.full]
    if lost := [view.spec.name for key, view in rest if key.role.startswith("original_module.")]:
        raise InputError(
            f"{len(lost)} tensors are the originals of modules whose trained copies are missing: {listing(lost)}",
            where=where,
            hint="the file is incomplete",
        )
    return {key.tensor: view for key, view in rest}


def _take_repeats(found: _Sorted, config: PeftConfig) -> tuple[tuple[View, View], ...]:
    """Takes out of the modules what they hold once more of the tensors that they share, and trained tables that are
    there under the name of their wrapper too, as PEFT saves those of a vocabulary that was resized."""
    tuner = TUNERS.get(config.peft_type)
    repeats = []
    for path in [path for path in found.full if f".{_SAVED}." in path]:
        view, name = found.full.pop(path), path.replace(f".{_SAVED}.", ".")
        if name in found.full:
            found.unused[view.spec.name] = f"{found.full[name].spec.name} once more"
            repeats.append((view, found.full[name]))
        else:
            found.full[name] = view
    for roles in found.modules.values():
        for name in (name for name in tuner.shared if name in roles and name in found.shared) if tuner else ():
            view = roles.pop(name)
            found.unused[view.spec.name] = f"the shared {name} once more"
            repeats.append((view, found.shared[name]))
    return tuple(repeats)


def _is_pruned(roles: Mapping[str, View]) -> bool:
    """True for a module that AdaLoRA left no rank, whose tensors are empty for that reason."""
    a, b, e = (roles[role].size if role in roles else () for role in ("lora_A", "lora_B", "lora_E"))
    return len(a) == len(b) == 2 and e == (0, 1) and a[0] == b[1] == 0 and bool(a[1] and b[0])


def _check_views(views: list[View], where: str) -> None:
    if empty := [view.spec for view in views if view.numel == 0]:
        raise InputError(
            f"{printable(empty[0].name)!r} is empty, shape {empty[0].shape}",
            where=where,
            hint="ZeRO-3 or FSDP shards were not gathered when it was saved; gather them and save again",
        )
    if strange := [view.spec for view in views if view.spec.dtype not in (*_FLOATS, *_INTEGERS)]:
        kinds = sorted({spec.dtype for spec in strange})
        raise InputError(
            f"{printable(strange[0].name)!r} has dtype {listing(kinds)}, need one of {_FLOATS}",
            where=where,
        )


def _check_kinds(found: _Sorted, where: str) -> None:
    """Only indices are integers, and no module is both held whole and tuned but for the table that lies under it."""
    for role, view in (row for roles in (*found.modules.values(), found.shared) for row in roles.items()):
        known = _INTEGERS if "_indices" in role else _FLOATS
        if view.spec.dtype not in (*known, *(("F32",) if role == "shira_indices" else ())):  # F32: saved on Windows
            raise InputError(
                f"{printable(view.spec.name)!r} has dtype {view.spec.dtype}, need one of {known}", where=where
            )
    for path, view in found.full.items():
        module, _, param = path.rpartition(".")
        factors = [role for role in found.modules.get(module, {}) if not role.endswith("trainable_tokens_delta")]
        if factors and param == "weight" and ".base_layer." not in view.spec.name and "lora_embedding_A" not in factors:
            names = [view.spec.name, *(found.modules[module][role].spec.name for role in sorted(factors))]
            raise InputError(
                f"{printable(module)!r} is held whole and tuned, which no training makes: {listing(names)}",
                where=where,
            )
