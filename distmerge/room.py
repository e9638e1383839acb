"""Room for the output on its file system: what it takes, whether it is there, and whether others are taking it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from distmerge.errors import MachineError
from distmerge.plan import Plan
from distmerge.storage.files import free_files, free_nbytes

_OWN_FILES = 32  # configuration, card, receipt and index; manifest, journals and folders of the work folder
_WATCH_SECONDS = 5.0


def room_needed(plan: Plan) -> int:
    """Bytes that the output takes on disk."""
    return plan.nbytes_to_write + sum(file.nbytes for file in plan.side_files) + (1 << 20) + 2000 * len(plan.tasks)


def files_needed(plan: Plan) -> int:
    """Files and folders that a merge makes at most at once, but for the journals of very many ranks."""
    return len(plan.files) + len(plan.side_files) + _OWN_FILES


def check_room(plan: Plan, output: Path, model: Path) -> None:
    """Raises MachineError if the file system of `output` has not the bytes or the files left that the output takes
    beside what `model`, its beginning, has of them already."""
    needed = room_needed(plan) - _nbytes_in(model)
    if (free := free_nbytes(output.parent)) < needed:
        raise MachineError(
            f"the output needs {needed:,} bytes more, {free:,} are free",
            where=str(output.parent),
            hint="free some room or choose another --output",
        )
    wanted = files_needed(plan) - (len(list(model.iterdir())) if model.exists() else 0)
    if (left := free_files(output.parent)) is not None and left < wanted:
        raise MachineError(
            f"the output needs {wanted:,} files more, the file system has room for {left:,} (inodes)",
            where=str(output.parent),
            hint="remove files there, choose another --output, or a larger --max-shard-size",
        )


class RoomWatch:
    """Looks at the file system every few seconds while the weight files of `plan` grow in `model`."""

    def __init__(self, plan: Plan, output: Path, model: Path) -> None:
        self._needed, self._output, self._model = plan.nbytes_to_write, output, model
        self._looked = time.monotonic()

    def is_due(self) -> bool:
        """True every few seconds."""
        return time.monotonic() - self._looked > _WATCH_SECONDS

    def check(self, nbytes_done: int) -> None:
        """Raises MachineError if what is free is less than what is missing of the weight files, of which `nbytes_done`
        bytes were written or found. The little that comes after them may have room by then."""
        self._looked = time.monotonic()
        free = free_nbytes(self._output.parent)  # first: what is there grows while one looks
        # What was reserved is there before it is written; where nothing can be, the disk may learn of it late.
        missing = self._needed - max(nbytes_done, _nbytes_in(self._model))
        if free < missing:
            raise MachineError(
                f"the weight files still need {missing:,} bytes, {free:,} are free: something else takes the room",
                where=str(self._output.parent),
                hint="free some room, then run the same command again: it resumes",
            )


def _nbytes_in(folder: Path) -> int:
    """Bytes that the files in `folder` take on disk."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # it is just getting its final name, and may be missed once
            total += path.stat().st_blocks * 512
    return total
