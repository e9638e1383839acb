"""From a finished work folder to the output: side files, receipt, index last, then one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmerge.checkpoint.base import INDEX, RECEIPT, SINGLE, folder_name
from distmerge.checkpoint.sidefiles import copy_side_file
from distmerge.config import MergeConfig
from distmerge.errors import FAILED_STORAGE, InputError, MachineError, VerifyError, listing, printable
from distmerge.input_files import InputRecord
from distmerge.journal import ShardRecord
from distmerge.plan import Plan
from distmerge.receipt import (
    FileEntry,
    Receipt,
    build_ledger,
    build_receipt,
    build_tensors,
    merged_adapters,
    read_receipt,
)
from distmerge.report.card import model_card
from distmerge.report.verdict import judge
from distmerge.storage.checksums import crc32, crc32_text, join_crc32s
from distmerge.storage.files import fsync_dir, io_errors, machine_error, rename, replace_file, sha256_of
from distmerge.storage.records import decode
from distmerge.storage.strict_json import read_object
from distmerge.stream import SegmentRecord
from distmerge.work import WorkFolder


def check_output(config: MergeConfig) -> None:
    """Raises InputError if the output may not be written where `config` says, before anything is read or written."""
    output = config.output
    if output.name in ("", ".."):
        raise InputError("is no name for a new folder", where=f"--output {output}")
    if _is_no_text(output):
        raise InputError(
            "the path is not UTF-8, and the safetensors library opens no file below it",
            where=f"--output {output}",
            hint="choose another --output",
        )
    try:
        _check_places(config, WorkFolder(output).path)
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise InputError("is there and is not a folder", where=str(output), hint="choose another --output")
        if os.path.ismount(output):
            raise InputError(
                "is a mount point, which no rename can replace", where=str(output), hint=f"--output {output / 'model'}"
            )
        if not output.exists() or not any(output.iterdir()):
            return
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks
        raise InputError(
            f"cannot be looked at ({printable(str(getattr(error, 'strerror', None) or error))})",
            where=printable(str(output)),
            hint="choose another --output",
        ) from None
    receipt = read_receipt(output)
    if receipt is None:
        raise InputError(
            "is there, is not empty, and was not written by distmerge",
            where=str(output),
            hint="choose another --output; --overwrite replaces only outputs of distmerge",
        )
    added = sorted(found for found in _files_in(output) if found not in receipt.files and found != RECEIPT)
    if config.overwrite and added:
        raise InputError(
            f"holds files that the merge did not write: {listing(added)}",
            where=str(output),
            hint="move them away; --overwrite replaces only outputs of distmerge",
        )


def _is_no_text(path: Path) -> bool:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return True
    return False


def _check_places(config: MergeConfig, work: Path) -> None:
    inputs = [("base", config.base), *(("adapter", adapter.home) for adapter in config.all_adapters)]
    for place in (config.output, work):
        resolved = place.parent.resolve() / place.name
        for what, folder in inputs:
            taken = folder.resolve()
            if resolved == taken or taken in resolved.parents or resolved in taken.parents:
                raise InputError(f"is, holds or lies in the {what} {folder}", where=str(place))


def is_published(config: MergeConfig, plan: Plan) -> bool:
    """True if the output holds the result of `plan` already. Raises InputError if it holds that of another one and
    may not be replaced, and if the base is a merge that holds one of the adapters."""
    _refuse_merged_before(config, plan)
    receipt = read_receipt(config.output) if config.output.is_dir() else None
    if receipt is None or config.overwrite:
        return False
    sizes = {name: (config.output / name) for name in receipt.files}
    whole = all(path.is_file() and path.stat().st_size == receipt.files[name].bytes for name, path in sizes.items())
    if receipt.plan == plan.digest and whole:
        return True
    raise InputError(
        "holds the result of another merge" if whole else "holds a damaged result",
        where=str(config.output),
        hint="choose another --output, or replace it with --overwrite",
    )


def _refuse_merged_before(config: MergeConfig, plan: Plan) -> None:
    already = merged_adapters(config.base)
    for adapter in plan.adapters:
        if adapter.weights_sha256 in already:
            raise InputError(
                f"adapter {adapter.name!r} is merged into this base already ({RECEIPT})",
                where=str(config.base),
                hint="--base takes the checkpoint before the merge",
            )


def publish(
    config: MergeConfig,
    plan: Plan,
    work: WorkFolder,
    segments: Sequence[SegmentRecord],
    shards: Sequence[ShardRecord],
    *,
    inputs: Sequence[InputRecord] = (),
) -> Receipt:
    """Completes the model in the work folder and makes it the output; returns the receipt.

    Every file is durable before the rename, the index is the last to appear, and after the rename the work folder is
    removed. Killed anywhere in between, the next run does what is left.
    """
    ledger, tensors = build_ledger(plan, segments), build_tensors(plan, segments)
    files = _weight_files(plan, segments, shards)
    folders = (config.base, *(adapter.home for adapter in config.all_adapters))
    for side in plan.side_files:
        _make_parents(work.model, side.name)
        copy_side_file(folders[side.source], side, work.model / side.name)
        files[side.name] = FileEntry(kind="sha256", digest=side.sha256, bytes=side.nbytes)
    contents: dict[str, bytes] = {}
    if plan.config_json is not None:
        contents["config.json"] = plan.config_json.encode()
    told = json.loads(plan.config_json) if plan.config_json is not None else _base_config(config.base)
    contents["README.md"] = model_card(plan, folder_name(config.base), len(ledger), told, judge(tensors)).encode()
    index = _index(plan)
    for name, data in {**contents, **index}.items():
        files[name] = FileEntry(kind="sha256", digest=hashlib.sha256(data).hexdigest(), bytes=len(data))
    receipt = build_receipt(plan, config, ledger, tensors, dict(sorted(files.items())), inputs=inputs)
    made = {**contents, RECEIPT: receipt.to_json(), **index}
    for name, data in made.items():
        replace_file(work.model / name, data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}
    _read_back(work.model, {**digests, **{side.name: side.sha256 for side in plan.side_files}})
    _sweep(work.model, {*files, RECEIPT})
    _rename(work, config)
    return receipt


def _weight_files(plan: Plan, segments: Sequence[SegmentRecord], shards: Sequence[ShardRecord]) -> dict[str, FileEntry]:
    """The weight files by name, with the digests that were computed of them or follow from those of their segments."""
    digests = {shard.file: shard.digest for shard in shards}
    if plan.file_digest == "crc32":
        crcs = {record.segment: record.crc32 or 0 for record in segments}
        for file in digests:
            header = plan.header_of(file)
            parts = [(crcs[number], plan.segments[number].nbytes) for number in plan.segments_of(file)]
            digests[file] = crc32_text(join_crc32s([(crc32(header), len(header)), *parts]))
    kind = plan.file_digest
    values = {plan.files[s.file].name: {"kind": kind, "digest": digests[s.file], "bytes": s.nbytes} for s in shards}
    return {name: decode(FileEntry, value) for name, value in values.items()}


def _index(plan: Plan) -> dict[str, bytes]:
    """The index file, unless the model is the one file that needs none."""
    if [file.name for file in plan.files] == [SINGLE]:
        return {}
    index = {
        "metadata": {
            "total_parameters": sum(task.source.numel for task in plan.tasks),
            "total_size": sum(task.nbytes for task in plan.tasks),
        },
        "weight_map": dict(sorted((p.name, plan.files[task.file].name) for task in plan.tasks for p in task.parts)),
    }
    return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _make_parents(folder: Path, name: str) -> None:
    path = folder
    for part in name.split("/")[:-1]:
        with io_errors(path / part):
            (path / part).mkdir(exist_ok=True)
        fsync_dir(path)
        path /= part


def _read_back(folder: Path, digests: dict[str, str]) -> None:
    """Raises VerifyError for the first file whose SHA-256 is not the one that it should have."""
    for name, digest in digests.items():
        if sha256_of(folder / name) != digest:
            raise VerifyError(
                "was read back with other bytes than were written",
                where=str(folder / name),
                hint=FAILED_STORAGE,
            )


def _files_in(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def _sweep(folder: Path, expected: set[str]) -> None:
    """Removes what an interrupted publish left behind. Raises VerifyError for anything that is not ours."""
    with io_errors(folder):
        found = _files_in(folder)
        for name, path in found.items():
            if name not in expected and name.endswith(".tmp"):
                path.unlink()
    strangers = sorted(name for name in found if name not in expected and not name.endswith(".tmp"))
    if strangers or (missing := sorted(expected - found.keys())):
        raise VerifyError(
            f"strange files {listing(strangers)}" if strangers else f"missing files {listing(missing)}",
            where=str(folder),
        )
    fsync_dir(folder)


def _rename(work: WorkFolder, config: MergeConfig) -> None:
    """One rename makes the model the output; only with `--overwrite` what is there steps aside first."""
    output, replaced = config.output, work.path / "replaced"
    with io_errors(output):
        if config.overwrite and output.exists() and any(output.iterdir()):
            shutil.rmtree(replaced, ignore_errors=True)
            rename(output, replaced)
        try:
            rename(work.model, output)
        except OSError as error:
            # Network file systems may report failure for a rename that happened.
            if work.model.exists() or not (output / RECEIPT).exists():
                if replaced.exists() and not output.exists():
                    rename(replaced, output)
                said = machine_error(error, output)
                made = "it was made while the merge ran; choose another --output" if output.exists() else ""
                raise MachineError(
                    f"cannot be renamed to: {said.what}", where=str(output), hint=made or said.hint
                ) from None
    fsync_dir(output.parent)
    fsync_dir(work.path)
    work.discard()


def _base_config(base: Path) -> dict[str, Any]:
    return read_object(base / "config.json") if (base / "config.json").exists() else {}
