"""The weight files that training left in a folder, or the command that makes them out of what is there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from distmerge.checkpoint.base import shards_of_index
from distmerge.errors import InputError, listing
from distmerge.storage.files import lookup_errors
from distmerge.storage.strict_json import read_object

# In the order in which they are looked for: an adapter beside the checkpoint of a whole model is what was trained.
_ADAPTERS = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapters.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
    "pytorch_lora_weights.bin",
)
_CHECKPOINTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model_fsdp.bin",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What trainers leave beside the weights.
_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|trainer_state|rng_state|random_states|recipe_state).*")
_MEGATRON = re.compile(
    r"iter_\d+|mp_rank_\d+.*|latest_checkpointed_iteration\.txt|model_optim_rng\.pt|run_config\.yaml"
)
_DEEPSPEED = re.compile(r"global_step\d+|zero_to_fp32\.py|(bf16_)?zero_pp_rank_.*\.pt|mp_rank_\d+_model_states\.pt")
# LLaVA's trainer and extended vocabularies: trained weights that the adapter file does not have.
LOST, _EXTRA_ROWS = "non_lora_trainables.bin", "new_embeddings.safetensors"
MEGATRON_HINT = "export it with Megatron-Bridge (AutoBridge.save_hf_adapter), then give the exported folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The weight files to read, by their names in `folder`."""

    folder: Path
    files: tuple[str, ...]

    @property
    def pickles(self) -> tuple[str, ...]:
        return tuple(name for name in self.files if name.endswith(_PICKLES))


def find_weights(path: Path) -> Found:
    """The weight files in the folder at `path`, or the file at `path` itself.

    Raises InputError when there are none, with the command that consolidates what is there instead.
    """
    with lookup_errors(path):
        if path.is_file():
            return Found(folder=path.parent, files=(path.name,))
        if not path.is_dir():
            raise InputError("no such folder", where=str(path), hint="--adapter takes a folder that training saved")
        names = {entry.name for entry in path.iterdir()}
    _refuse_lost_rows(path, names)
    for name in _ADAPTERS:
        if name in names:
            return Found(folder=path, files=(name, *sorted({LOST} & names)))
    for single, index in (("model.safetensors", _CHECKPOINTS[0]), ("pytorch_model.bin", _CHECKPOINTS[2])):
        if {single, index} <= names:
            raise InputError(f"both {single} and {index} are there", where=str(path), hint="move the stale one away")
    for name in _CHECKPOINTS:
        if name in names:
            return Found(folder=path, files=_indexed(path, name) if name.endswith(".json") else (name,))
    _refuse_scattered(path, names)
    return Found(folder=path, files=(_only_weights(path, names),))


def _indexed(folder: Path, index: str) -> tuple[str, ...]:
    weight_map = read_object(folder / index).get("weight_map")
    suffix = Path(index.removesuffix(".index.json")).suffix
    return tuple(shards_of_index(folder, weight_map, str(folder / index), suffix=suffix))


def _refuse_lost_rows(folder: Path, names: set[str]) -> None:
    if _EXTRA_ROWS in names:
        raise InputError(
            f"{_EXTRA_ROWS} holds trained rows of new tokens that would be lost",
            where=str(folder),
            hint="resize the base's embeddings, train with modules_to_save or trainable_token_indices, and save again",
        )


def _refuse_scattered(folder: Path, names: set[str]) -> None:
    """Raises InputError if the folder holds a training state whose tensors lie in pieces."""
    if any(_DEEPSPEED.fullmatch(name) for name in names):
        root = folder if any(name.startswith(("global_step", "zero_to_fp32")) for name in names) else folder.parent
        raise InputError(
            "is a DeepSpeed checkpoint that is not consolidated",
            where=str(folder),
            hint=f"run `python {root}/zero_to_fp32.py {root} OUT --safe_serialization`, then give OUT",
        )
    if any(_MEGATRON.fullmatch(name) for name in names):
        raise InputError("is a Megatron checkpoint", where=str(folder), hint=MEGATRON_HINT)
    pieces = sorted(name for name in names if re.fullmatch(r"pytorch_model_fsdp_\d+", name))
    if pieces or any(name.endswith(".distcp") for name in names):
        source = folder / pieces[0] if pieces else folder
        raise InputError(
            "is a sharded FSDP checkpoint that is not consolidated",
            where=str(folder),
            hint=f"run `accelerate merge-weights {source} OUT`, then give OUT",
        )


def _only_weights(folder: Path, names: set[str]) -> str:
    """The one weight file with a name of its own."""
    weights = sorted(
        name for name in names if name.endswith((".safetensors", *_PICKLES)) and not _STATE.fullmatch(name)
    )
    safe = [name for name in weights if name.endswith(".safetensors")]
    candidates = safe or weights
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise InputError(
            f"several weight files are there: {listing(candidates)}", where=str(folder), hint="name the file itself"
        )
    with lookup_errors(folder):
        inner = sorted(found.parent.name for name in _ADAPTERS for found in folder.glob(f"*/{name}"))
    raise InputError(
        f"{_ADAPTERS[0]} is missing",
        where=str(folder),
        hint=f"adapters are in its sub-folders {listing(inner)}; name one of them"
        if inner
        else "--adapter takes a folder that training saved",
    )


def is_adapter(path: Path) -> bool:
    """True if `path` looks like what a training left rather than like a model."""
    if path.is_file():
        return True
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if names & {"adapter_config.json", *_ADAPTERS}:
        return True
    # Checkpoints of training have a model's file names and no configuration.
    return "config.json" not in names and bool(
        names & set(_CHECKPOINTS) or any(_DEEPSPEED.fullmatch(name) or name.endswith(".distcp") for name in names)
    )
