"""An adapter as it was before training, which the base lost: it must be the beginning of the trained one."""

from __future__ import annotations

from distmerge.adapter.peft_adapter import Adapter
from distmerge.errors import InputError, listing

_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def check_initial(trained: Adapter, initial: Adapter) -> None:
    """Raises InputError unless taking `initial` off undoes what the initialisation of `trained` did to the base."""
    if trained.config.init != "given":
        raise InputError(
            f"--initial-adapter is given, but {trained.folder.name} is a {trained.config.peft_type} whose "
            "initialisation left the base as it was",
            where=str(trained.folder),
            hint="leave --initial-adapter out, or give '' for this adapter",
        )
    if initial.config.peft_type != "LORA" or initial.config.use_dora or initial.config.raw.get("kasa_config"):
        raise InputError("is no plain LoRA, so that nothing of it can be taken off", where=str(initial.folder))
    rows = [(role, view) for roles in initial.modules.values() for role, view in roles.items()]
    names = [view.spec.name for role, view in (*rows, *initial.full.items()) if role not in _FACTORS]
    if names:
        raise InputError(
            f"{len(names)} tensors are no factors, and cannot be taken off: {listing(names)}",
            where=initial.where,
            hint="save it anew with its factors alone",
        )
    modules = sorted(trained.modules.keys() | initial.modules.keys())
    if wrong := [name for name in modules if not _alike(trained, initial, name)]:
        raise InputError(
            f"is not what {trained.folder.name} began as: modules, shapes or scaling of {listing(wrong)} differ",
            where=initial.where,
            hint="give the adapter that was saved before the first step of the same training",
        )
    if trained.files == initial.files and trained.folder.resolve() == initial.folder.resolve():
        raise InputError("is the trained adapter itself", where=str(initial.folder))


def _alike(trained: Adapter, initial: Adapter, module: str) -> bool:
    mine, theirs = (
        {role: view.size for role, view in adapter.modules.get(module, {}).items() if role in _FACTORS}
        for adapter in (trained, initial)
    )
    rank = next((size[0] for size in mine.values() if size and size[0]), 1)
    return mine == theirs and trained.config.scaling(module, rank) == initial.config.scaling(module, rank)
