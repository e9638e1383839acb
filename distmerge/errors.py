"""Every error that a person can meet, with its exit code; nothing here touches files or ranks."""

from __future__ import annotations

from distmerge.redaction import redacted

FAILED_STORAGE = "disk, memory or network storage has failed; run the same command again"


class DistmergeError(Exception):
    """An expected failure: `where: what` with the value, and a hint that says what to do next.

    None of them shows a secret, or colours or moves a terminal, whatever part of an input stands in it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = _shown(what), _escaped(redacted(where)), _shown(hint)
        super().__init__(self.what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\nhint: {self.hint}" if self.hint else text


class UsageError(DistmergeError):
    """The command line, a variable or the recipe does not say what to do."""

    exit_code = 2


class InputError(DistmergeError):
    """An input cannot be merged as it is; nothing was written."""

    exit_code = 3


class VerifyError(DistmergeError):
    """What was written is not what was planned; nothing was published."""

    exit_code = 4


class MachineError(DistmergeError):
    """The machine could not: no room, no memory, an I/O error, a rank or a node lost."""

    exit_code = 5


class Interrupted(DistmergeError):  # noqa: N818 - not an error: it was asked for
    """The run was asked to stop; the same command resumes it."""

    exit_code = 75


class PeerFailed(DistmergeError):  # noqa: N818 - not this rank's error
    """Another rank failed and has said so; this one ends with the same exit code and no words."""

    def __init__(self, what: str, *, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def _shown(text: str) -> str:
    text = redacted(text)
    return text if text.isprintable() else "\n".join(map(_escaped, text.split("\n")))


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str, limit: int = 200) -> str:
    """`text` from an input, safe to show: control characters escaped, cut at `limit` characters."""
    shown = _escaped(text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def shown(value: object, limit: int = 80) -> str:
    """The repr of a value from an input, safe to show and cut at `limit` characters."""
    return printable(repr(value)[: 4 * limit], limit)


def listing(names: list[str], limit: int = 5) -> str:
    """The first `limit` of `names` in their order, quoted, and how many more there are."""
    shown = ", ".join(repr(printable(name)) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
