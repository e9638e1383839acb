"""The files of an output against its receipt: digests, strangers, headers and index, the names in the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distmerge.audit.findings import Finding
from distmerge.checkpoint.base import INDEX, RECEIPT, SINGLE
from distmerge.checkpoint.header import TensorSpec, read_header
from distmerge.errors import DistmergeError, listing, printable
from distmerge.progress import Counter
from distmerge.receipt import FileEntry, Receipt
from distmerge.storage.checksums import digest_of
from distmerge.storage.strict_json import read_object

_STALE = "the file changed after the merge; merge again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The tensors of an output by name, and everything that is wrong with the headers, the index and the ledger."""

    tensors: dict[str, TensorSpec]
    findings: tuple[Finding, ...]


def check_files(output: Path, files: dict[str, FileEntry], counter: Counter) -> list[Finding]:
    """Everything that is wrong with the files of `output`, by their digests, and with files that are too many."""
    strangers = sorted(
        path.name for path in output.iterdir() if path.suffix in (".safetensors", ".bin") and path.name not in files
    )
    findings = []
    if strangers or (output / "adapter_config.json").exists():
        findings.append(
            Finding(
                where=str(output),
                what=f"holds files that loaders would pick up: {listing(strangers or ['adapter_config.json'])}",
                hint="they were added after the merge; move them away",
            )
        )
    for name, expected in files.items():
        counter.doing = printable(name)
        if (finding := _check_file(output, name, expected, files)) is not None:
            findings.append(finding)
        counter.add(expected.bytes)
    return findings


def _check_file(output: Path, name: str, expected: FileEntry, files: dict[str, FileEntry]) -> Finding | None:
    path = output / name
    if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
        what = f"names a file outside of the folder: {printable(name)!r}"
        return Finding(where=str(output / RECEIPT), what=what)
    if not path.is_file():
        return Finding(where=str(path), what="is missing")
    nbytes = path.stat().st_size
    if nbytes != expected.bytes and all(entry.bytes != nbytes for entry in files.values()):
        what = f"has {nbytes} bytes, the receipt says {expected.bytes}"
        return Finding(where=str(path), what=what, hint=_STALE)
    if expected.kind == "none":
        what = f"has {nbytes} bytes, the receipt says {expected.bytes}"
        return Finding(where=str(path), what=what, hint=_STALE) if nbytes != expected.bytes else None
    if (digest := digest_of(path, expected.kind)) == expected.digest:
        return None
    known = (expected.kind, digest, nbytes)
    others = [other for other, entry in files.items() if (entry.kind, entry.digest, entry.bytes) == known]
    if others:
        what = f"holds what {printable(others[0])} should hold, by its {expected.kind}"
        return Finding(where=str(path), what=what, hint="files were swapped or copied over each other after the merge")
    if nbytes != expected.bytes:
        what = f"has {nbytes} bytes, the receipt says {expected.bytes}"
    else:
        what = f"{expected.kind} is {digest}, the receipt says {printable(expected.digest)}"
    return Finding(where=str(path), what=what, hint=_STALE)


def read_contents(output: Path, receipt: Receipt) -> Contents:
    """The tensors of the output, from the headers; these against the index, and the ledger against both."""
    findings: list[Finding] = []
    tensors: dict[str, TensorSpec] = {}
    shards = sorted(name for name in receipt.files if name.endswith(".safetensors"))
    for shard in shards:
        try:
            specs = read_header(output / shard, shard).tensors
        except DistmergeError as error:
            findings.append(Finding(where=error.where or str(output / shard), what=error.what, hint=error.hint))
            continue
        for spec in specs:
            if spec.name in tensors:
                what = f"holds {printable(spec.name)!r}, and so does {tensors[spec.name].file}"
                findings.append(Finding(where=str(output / shard), what=what))
            tensors[spec.name] = spec
    if not findings:
        findings += [*_check_index(output, receipt, shards, tensors), *_check_ledger(output, receipt, tensors)]
    return Contents(tensors=tensors, findings=tuple(findings))


def _check_index(output: Path, receipt: Receipt, shards: list[str], tensors: dict[str, TensorSpec]) -> list[Finding]:
    if shards == [SINGLE] and INDEX not in receipt.files:
        return []
    where = str(output / INDEX)
    index = read_object(output / INDEX)
    weight_map = index.get("weight_map")
    findings = []
    if weight_map != (found := {name: spec.file for name, spec in tensors.items()}):
        findings.append(Finding(where=where, what="weight_map is not what the headers say" + _moved(weight_map, found)))
    total = sum(spec.nbytes for spec in tensors.values())
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("total_size") != total:
        findings.append(Finding(where=where, what=f"total_size is not {total}"))
    return findings


def _moved(weight_map: object, found: dict[str, str]) -> str:
    """Which file holds what another one should, if whole files changed places."""
    if not isinstance(weight_map, dict) or weight_map.keys() != found.keys():
        return ""
    moves = {(found[name], file) for name, file in weight_map.items() if file != found[name]}
    if len(moves) > len(set(found.values())):
        return ""
    told = [f"{held} holds what {printable(str(named))} should hold" for held, named in sorted(moves)]
    return f": {'; '.join(told[:3])}"


def _check_ledger(output: Path, receipt: Receipt, tensors: dict[str, TensorSpec]) -> list[Finding]:
    where = str(output / RECEIPT)
    findings = []
    targets = {name for entry in receipt.ledger.values() for name in entry.tensors}
    if lost := sorted(targets - tensors.keys()):
        findings.append(Finding(where=where, what=f"the ledger names tensors that are not there: {listing(lost)}"))
    if len(receipt.ledger) != sum(adapter.num_tensors for adapter in receipt.adapters):
        findings.append(Finding(where=where, what="the ledger does not list every adapter tensor once"))
    return findings
