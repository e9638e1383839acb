"""What downloads from the Hugging Face Hub leave beside a file: the SHA-256 that the Hub has of it."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from distmerge.errors import InputError
from distmerge.storage.files import read_input

_SHA256 = re.compile(r"[0-9a-f]{64}")
_METADATA_NBYTES = 4096
_MAX_PARENTS = 4


def hub_sha256(path: Path) -> str | None:
    """The SHA-256 that the Hub has of the large file at `path`, as its download tells; None where nothing tells.

    In the Hub's cache a file is a link to a blob that is named by its etag, which for files in LFS is the SHA-256. A
    download into a folder of one's own keeps the etag in `.cache/huggingface/download/NAME.metadata`, line 2. Small
    files have a Git hash there, which is none.
    """
    blob = Path(os.path.realpath(path))
    if blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--") and _SHA256.fullmatch(blob.name):
        return blob.name
    path = path.absolute()
    for root in path.parents[:_MAX_PARENTS]:
        metadata = root / ".cache/huggingface/download" / f"{path.relative_to(root)}.metadata"
        with contextlib.suppress(InputError, IndexError, UnicodeDecodeError):
            etag = read_input(metadata, _METADATA_NBYTES).decode().splitlines()[1].strip().strip('"')
            return etag if _SHA256.fullmatch(etag) else None
    return None
