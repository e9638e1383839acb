"""The plan as a run keeps it on disk: rank 0 writes it, all others read it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from distmerge.errors import InputError
from distmerge.plan import SAID, Plan
from distmerge.storage.collector import uncollected
from distmerge.storage.files import read_input
from distmerge.storage.records import decode_fields, encode_rows
from distmerge.storage.strict_json import MAX_NBYTES

_VERSION = 2
_HEAD = b'{"plan":'
_TAIL = b',"said":'


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest as it lies on disk, JSON; its plan ends at byte `end`, and `digest` is that of these bytes alone."""

    data: bytes
    end: int
    digest: str

    @staticmethod
    def of(plan: Plan) -> Manifest:
        """The manifest of `plan`: what it only says stands apart, behind the bytes that its digest is made from."""
        said = encode_rows({name: getattr(plan, name) for name in SAID})
        head = _HEAD + plan.canonical()
        data = head + _TAIL + f'{said},"version":{_VERSION}}}'.encode()
        return Manifest(data=data, end=len(head), digest=plan.digest)

    @staticmethod
    def found(data: bytes) -> Manifest | None:
        """The manifest in `data`, which a file held; None if that is none."""
        end = data.rfind(_TAIL)
        if not data.startswith(_HEAD) or end < 0:
            return None
        return Manifest(data=data, end=end, digest=hashlib.sha256(memoryview(data)[len(_HEAD) : end]).hexdigest())

    def plan(self) -> Plan | None:
        """The plan; None if it is of another version, or damaged."""
        with uncollected():
            try:
                # In two parts, so that no key that stands twice takes the place of what was hashed.
                values = json.loads(b"{" + self.data[self.end + 1 :])
                if values["version"] != _VERSION:
                    return None
                hashed = json.loads(str(memoryview(self.data)[len(_HEAD) : self.end], "utf-8"))
                plan: Plan = decode_fields(Plan, {**values["said"], **hashed})
            except (ValueError, KeyError, TypeError, RecursionError):
                return None
        vars(plan)["digest"] = self.digest  # its bytes were hashed; encoding all of it again would tell the same
        return plan


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in the file at `path`; None if there is none."""
    try:
        return Manifest.found(read_input(path, MAX_NBYTES))
    except InputError:
        return None
