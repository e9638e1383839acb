"""What training saved, whoever wrote it, as PEFT's save_pretrained would have written it."""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distmerge.adapter.saved import diffusers, kohya, mlx, torchtune
from distmerge.adapter.saved.dialect import Dialect, Source, Target
from distmerge.adapter.saved.folders import LOST, MEGATRON_HINT, Found, find_weights
from distmerge.adapter.saved.pickles import unpickle
from distmerge.adapter.saved.state import derive_config, read_state
from distmerge.adapter.views import View
from distmerge.checkpoint.header import TensorSpec, read_header
from distmerge.errors import InputError, printable
from distmerge.storage.strict_json import read_object

CONFIG = "adapter_config.json"
_DIALECTS: tuple[tuple[Callable[[Source, Target], bool], Callable[[Source, Target], Dialect]], ...] = (
    (kohya.speaks, kohya.read),
    (torchtune.speaks, torchtune.read),
    (mlx.speaks, mlx.read),
    (diffusers.speaks, diffusers.read),
)
_MEGATRON = re.compile(r".*\.adapter\.(adapter_\w+\.)?linear_(in|out)\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A saved adapter: a configuration like adapter_config.json, and views of the stored tensors by PEFT's keys.

    `files` are read, relative to `folder`; a file made of a pickle has an absolute path, and `pickles` tells its
    source. `origins` gives the key in the file where it differs; `unused` says of every other tensor in the files, by
    its key there, why nothing of it is merged. `copies` and `mirrors` are what the files hold of the base, dense and
    packed, by the base's name. `notes` are for the user.
    """

    folder: Path
    files: tuple[str, ...]
    pickles: dict[str, str]
    config: dict[str, Any]
    tensors: dict[str, View]
    origins: dict[str, str]
    unused: dict[str, str]
    copies: dict[str, View]
    mirrors: dict[str, TensorSpec]
    notes: tuple[str, ...]


def read_saved(
    path: Path,
    *,
    base_modules: Collection[str],
    base_config: Mapping[str, Any],
    lora_alpha: float | None,
    use_rslora: bool | None,
    allow_pickle: bool,
    tails: Collection[str] = (),
    scratch: Path | None = None,
) -> Saved:
    """The adapter in the folder, or the file, at `path`, from headers and small files.

    `base_modules` and `base_config` tell how the base calls its modules and how many heads it has, for producers with
    names and layouts of their own; `tails` are those of `keys.parse`. With `allow_pickle`, weights in pickles are
    rewritten as safetensors in the folder `scratch`, without it in a temporary folder that lasts as long as the
    process. Raises InputError, with the command that helps, for everything that is not understood.
    """
    found = find_weights(path)
    files, pickles = _without_pickles(found, allow_pickle, scratch)
    source, notes = _read(found.folder, files)
    target = Target(modules=frozenset(base_modules), config=base_config)
    dialect = _translate(source, target, tails)
    if not dialect.tensors:
        raise InputError("holds no adapter tensors", where=source.where, hint="is it the checkpoint of a whole model?")
    if dialect.config:
        notes = []
    config = dialect.config or source.config
    if config is None:
        config = derive_config(
            dialect.tensors, tails=tails, lora_alpha=lora_alpha, use_rslora=use_rslora, where=source.where
        )
        notes.append(f"{CONFIG} is missing; r {config['r']} is the tensors', alpha {lora_alpha:g} as given")
    given = _given(dialect, lora_alpha=lora_alpha, use_rslora=use_rslora)
    origins = {name: view.spec.name for name, view in dialect.tensors.items() if view.spec.name != name}
    return Saved(
        folder=found.folder,
        files=files,
        pickles=pickles,
        config={**config, **given},
        tensors=dialect.tensors,
        origins=origins,
        unused=dialect.unused,
        copies=dialect.copies,
        mirrors=dialect.mirrors,
        notes=(*notes, *dialect.notes, *torchtune.doubts(source, target)),
    )


def _without_pickles(found: Found, allow_pickle: bool, scratch: Path | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The files with every pickle replaced by its safetensors form, and the sources of those."""
    if found.pickles and not allow_pickle:
        lost = found.pickles[0] == LOST
        raise InputError(
            "holds trained weights that would be lost, in a pickle, which may run code when it is read"
            if lost
            else "the weights are a pickle, which may run code when it is read",
            where=str(found.folder / found.pickles[0]),
            hint="save them as safetensors, or give --allow-pickle: it is then read by a process of its own that "
            "builds tensors and calls nothing",
        )
    files, pickles = [], {}
    for name in found.files:
        if name in found.pickles:
            place = scratch or _temporary()
            place.mkdir(parents=True, exist_ok=True)
            target = place / f"{_mark(found.folder / name)}.safetensors"
            if not target.exists():
                unpickle(found.folder / name, target)
            pickles[str(target)] = name
        files.append(str(target) if name in found.pickles else name)
    return tuple(files), pickles


@cache
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="distmerge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _mark(path: Path) -> str:
    """A name for the file's contents, as far as its status tells them."""
    status = path.stat()
    facts = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    return hashlib.sha256(facts.encode(errors="surrogateescape")).hexdigest()[:32]


def _read(folder: Path, files: tuple[str, ...]) -> tuple[Source, list[str]]:
    specs: dict[str, TensorSpec] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(folder / file, file)
        metadata |= header.metadata
        for spec in header.tensors:
            if spec.name in specs:
                raise InputError(
                    f"{printable(spec.name)!r} is in two files: {specs[spec.name].file} and {file}", where=str(folder)
                )
            specs[spec.name] = spec
    if not specs:
        raise InputError("holds no tensors", where=str(folder / files[0]))
    config, notes = _find_config(folder)
    return Source(folder=folder, specs=tuple(specs.values()), metadata=metadata, config=config), notes


def config_path(folder: Path) -> Path | None:
    """adapter_config.json beside the weights or at most two folders above them, where training runs keep it."""
    folder = folder.absolute()
    return next((place / CONFIG for place in [folder, *folder.parents[:2]] if (place / CONFIG).exists()), None)


def _find_config(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The configuration of the weights in `folder`, and what to say of where it was found."""
    path = config_path(folder)
    if path is None:
        return None, []
    return read_object(path), [f"{path} is used"] * (path.parent != folder.absolute())


def _translate(source: Source, target: Target, tails: Collection[str]) -> Dialect:
    """The tensors by PEFT's keys, by the rules of the producer whose names they have."""
    names = [spec.name for spec in source.specs]
    if flat := [name for name in names if "_flat_param" in name]:
        raise InputError(
            f"{printable(flat[0])!r} is a piece of an FSDP model, not a parameter",
            where=source.where,
            hint="save the model with a full or a sharded state dict; the latter is gathered by `accelerate "
            "merge-weights DIR OUT`",
        )
    if native := [name for name in names if _MEGATRON.fullmatch(name)]:
        # How fused projections lie in these depends on the tensor parallelism of the run, which no file tells.
        raise InputError(f"{printable(native[0])!r} is Megatron's own name", where=source.where, hint=MEGATRON_HINT)
    for speaks, read in _DIALECTS:
        if speaks(source, target):
            return read(source, target)
    return read_state(source, tails=tails)


def _given(dialect: Dialect, *, lora_alpha: float | None, use_rslora: bool | None) -> dict[str, Any]:
    """The fields of the configuration that the user says."""
    given: dict[str, Any] = {}
    if lora_alpha is not None:
        given["alpha" if "alpha" in dialect.config else "lora_alpha"] = lora_alpha
        if dialect.config:
            given["alpha_pattern"] = {}
    if use_rslora is not None:
        given["use_rslora"] = use_rslora
    return given
