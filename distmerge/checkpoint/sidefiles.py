"""Side files: what stands beside the weights in the output, and the configuration made true to the weights."""

from __future__ import annotations

import json
import stat
from collections.abc import Container, Iterator
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from distmerge.checkpoint.base import Base
from distmerge.checkpoint.quantization import add_skipped, drop_sections, nested_configs
from distmerge.errors import InputError, MachineError, printable
from distmerge.storage.files import copy_file, io_errors, sha256_of
from distmerge.storage.strict_json import read_object

_NEVER = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data"),
    *("*.safetensors.index*.json", "*.bin.index*.json", "adapter_config.json", "merge_receipt.json", "*.tmp", "*.part"),
)
_NEVER_FOLDERS = ("original", "onnx", ".git", ".cache", "__pycache__", ".distmerge")
_OVERLAY = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece*", "chat_template*", "*.jinja", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json"),
)
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file that is copied byte for byte: `name` inside the output, from folder 0 (base) or 1, 2, ... (adapters)."""

    name: str
    source: int
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHead:
    """A head that the base lacks, of `num_labels` outputs, trained for a task as PEFT calls it; `where` names it."""

    task_type: str
    num_labels: int
    where: str


@dataclass(frozen=True, kw_only=True)
class ConfigEdits:
    """What the merge changes in the configuration, which begins as `config`: embeddings no longer tied, a vocabulary of
    another size (old and new), a new head. `skipped` are the modules that are no longer packed while others are; None
    where nothing is. `skipped_by_default` are those that loaders skip if no list tells them.
    """

    config: dict[str, Any]
    untie: bool = False
    vocab: tuple[int, int] | None = None
    head: NewHead | None = None
    skipped: tuple[str, ...] | None = None
    skipped_by_default: tuple[str, ...] = ()


def find_side_files(
    base: Path,
    adapters: tuple[Path, ...],
    *,
    weights: tuple[tuple[str, ...], ...],
    made: set[str],
    silent: Container[int] = (),
) -> tuple[SideFile, ...]:
    """Every file that goes into the output unchanged, by name: those of the base, overlaid by tokenizer and template
    files of the adapters in their order, those in `silent` (counted from 1) apart, but for the names in `made`, which
    the merge writes itself.

    `weights` are the weight files of the base and of each adapter. Raises InputError for a link that leads elsewhere
    than to the folder or to where its weights are."""
    chosen = {name: 0 for name in _walk(base) if name not in made and not _is_weight(name)}
    for number, folder in enumerate(adapters, start=1):
        if number in silent:
            continue
        for name in _walk(folder):
            if "/" not in name and any(fnmatch(name, pattern) for pattern in _OVERLAY) and not _is_weight(name):
                chosen[name] = number
    if taken := [name for name in chosen if "/" in name and name.split("/")[0] in made]:
        raise InputError("is a folder where the output has a file", where=str(base / taken[0].split("/")[0]))
    folders = (base, *adapters)
    files = []
    homes = [_homes(folder, names) for folder, names in zip(folders, weights, strict=True)]
    for name, source in sorted(chosen.items()):
        path = folders[source] / name
        _check_inside(folders[source], name, homes[source])
        with io_errors(path):
            files.append(SideFile(name=name, source=source, nbytes=path.stat().st_size, sha256=sha256_of(path)))
    return tuple(files)


def copy_side_file(folder: Path, file: SideFile, target: Path) -> None:
    """Copies `file` of `folder` to `target`. Raises MachineError when its bytes are no longer those planned."""
    if copy_file(folder / file.name, target) != file.sha256:
        raise MachineError("changed during the merge", where=str(folder / file.name), hint="run the same command again")


def output_config(
    base: Base,
    dtypes: dict[str, int],
    edits: ConfigEdits,
    *,
    recast: bool,
    quantization: dict[str, Any] | None = None,
) -> bytes | None:
    """config.json of the output, or None when the base's own bytes stay true.

    `dtypes` counts the output's elements by dtype; `recast` says that `--dtype` was given. Quantization sections go,
    at every level, if nothing in the output is packed, else their skip lists grow, or `quantization` takes their place;
    `dtype` becomes that of most floats when it changed.
    """
    config = edited_config(edits)
    stale = edits.skipped is None and drop_sections(config)
    if edits.skipped is not None:
        add_skipped(config, edits.skipped, edits.skipped_by_default)
    if recast or (base.packed and edits.skipped is None):
        floats = {dtype: count for dtype, count in dtypes.items() if dtype in _DTYPE_NAMES}
        _set_dtype(config, _DTYPE_NAMES[max(floats, key=lambda dtype: floats[dtype])])
    if quantization is not None:
        config["quantization_config"] = quantization
    # The base's layers may have been repeated, so that `edits.config` is not what is on disk.
    stored = read_object(base.folder / "config.json") if (base.folder / "config.json").exists() else {}
    if config == stored and not stale:
        return None
    return (json.dumps(config, indent=2) + "\n").encode()


def edited_config(edits: ConfigEdits) -> dict[str, Any]:
    """The configuration with ties, vocabulary and head of the output; packing and dtype are the base's still."""
    config = deepcopy(edits.config)
    if edits.untie:
        for part in nested_configs(config):
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
        config["tie_word_embeddings"] = False
    if edits.vocab is not None:
        for part in nested_configs(config):
            if part.get("vocab_size") == edits.vocab[0]:
                part["vocab_size"] = edits.vocab[1]
    if edits.head is not None:
        _set_head(config, edits.head)
    return config


_HEADS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_OTHER_HEADS = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "LMHeadModel",
    "ForMaskedLM",
    "ForPreTraining",
    *_HEADS.values(),
    "Model",
)


def _set_head(config: dict[str, Any], head: NewHead) -> None:
    """Names the class that has the new head, and its labels. Raises InputError where they cannot be known."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    tail = _HEADS.get(head.task_type)
    if tail is None or not isinstance(name, str) or not name.endswith(_OTHER_HEADS):
        raise InputError(
            f"is a head that the base lacks, and task_type {printable(head.task_type)!r} does not tell its class",
            where=printable(head.where),
            hint="merge into a base that has the head, or set task_type in adapter_config.json",
        )
    stem = next(name.removesuffix(other) for other in _OTHER_HEADS if name.endswith(other))
    config["architectures"] = [stem + tail]
    labels = config.get("id2label")
    if head.task_type != "QUESTION_ANS" and (not isinstance(labels, dict) or len(labels) != head.num_labels):
        config["id2label"] = {str(number): f"LABEL_{number}" for number in range(head.num_labels)}
        config["label2id"] = {f"LABEL_{number}": number for number in range(head.num_labels)}


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for part in nested_configs(config):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype


def _is_weight(name: str) -> bool:
    basename = name.rsplit("/", 1)[-1]
    return any(fnmatch(basename, pattern) for pattern in _NEVER)


def _walk(folder: Path, inside: str = "") -> Iterator[str]:
    for path in sorted((folder / inside).iterdir()):
        name = f"{inside}{path.name}"
        if not name.isprintable() or len(path.name.encode(errors="replace")) > 240:
            raise InputError("a file name is too long or holds control characters", where=printable(name))
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", where=str(path)) from None
        if stat.S_ISDIR(mode):
            left_out = path.name in _NEVER_FOLDERS or path.name.endswith(".distmerge") or name.count("/") >= 8
            if not left_out and not path.is_symlink():
                yield from _walk(folder, f"{name}/")
        elif stat.S_ISREG(mode):
            yield name


def _check_inside(folder: Path, name: str, homes: set[Path]) -> None:
    """Raises InputError for a link that leads out of the folder, and not to where its weights are either."""
    resolved = (folder / name).resolve()
    if not any(home in resolved.parents for home in homes):
        raise InputError(
            f"is a link that leads out of the folder, to {resolved}",
            where=str(folder / name),
            hint="put the file in its place, or remove the link",
        )


def _homes(folder: Path, weights: tuple[str, ...]) -> set[Path]:
    """Where files of `folder` may lie: in it, beside its weights, or in the repository of a Hugging Face cache."""
    homes = {folder.resolve(), *((folder / name).resolve().parent for name in weights)}
    if folder.resolve().parent.name == "snapshots":
        homes.add(folder.resolve().parent.parent)
    return homes
