"""What an audit looks at, what it found right, and what it found wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from distmerge.errors import UsageError, VerifyError

Depth = Literal["digests", "sample", "probe", "full"]
DEPTHS: tuple[Depth, ...] = get_args(Depth)
SHOWN = 5  # what is wrong with that many things is told in full


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong: where, what, and what to do about it."""

    where: str
    what: str
    hint: str = ""


class AuditError(VerifyError):
    """The output is not what it should be; `findings` has everything that is wrong, in the order of the output."""

    def __init__(self, findings: tuple[Finding, ...], *, where: str) -> None:
        self.findings = findings
        hint = next((finding.hint for finding in findings if finding.hint), "")
        if len(findings) == 1:
            super().__init__(findings[0].what, where=findings[0].where, hint=hint)
            return
        lines = [f"\n  {finding.where}: {finding.what}" for finding in findings[:SHOWN]]
        if more := len(findings) - SHOWN:
            lines += [f"\n  and {more} more"] * (more > 0)
        super().__init__(f"{len(findings)} things are wrong{''.join(lines)}", where=where, hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How deep an audit goes.

    - `digests`: every file by its digest, headers and index against each other, the ledger; needs no inputs;
    - `sample`: the first, the last and `share` of the other blocks of every tensor, chosen by `seed`, against float64;
    - `probe`: what every merged linear makes of vectors, against the unmerged one with its adapter beside it;
    - `full`: every element, and the norms of the ledger.
    """

    depth: Depth
    share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise UsageError(f"depth {self.depth!r} is none of {', '.join(DEPTHS)}")
        if not 0 <= self.share <= 1:
            raise UsageError(f"sample-share {self.share} is not a number from 0 to 1")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed {self.seed} is not a whole number from 0 on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """Merged tensors against float64: how many there are, the elements that were looked at, the largest error in ulp of
    the output's dtype and the tensor that has it, the largest error beyond the noise of float32, and how many elements
    are not the nearest value. `num_packed` tensors are packed, and each of their elements is the nearest that its scale
    allows. `share` is that of all elements of the output, unmerged ones too, that were looked at."""

    num_tensors: int
    num_elements: int
    max_ulp: float
    max_ulp_beyond_noise: float
    worst_tensor: str
    num_not_nearest: int
    num_packed: int = 0
    share: float = 1.0

    @property
    def share_not_nearest(self) -> float:
        return self.num_not_nearest / self.num_elements if self.num_elements else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What merged linears make of vectors, against the unmerged ones with their adapters beside them.

    `relative_error` is |merged x - unmerged x| / |unmerged x| of the tensor `worst_tensor`, whose is the largest;
    `bound_used` the largest error in terms of what rounding can make of it; `max_deviation` the largest |k - 1| where k
    is the multiple of its delta that a tensor was changed by. `given` names tensors with given vectors, `by_blocks`
    merged tensors that are no products, and `doubted` those whose probe was not clear: both were compared element by
    element.
    """

    num_tensors: int
    num_vectors: int
    relative_error: float
    worst_tensor: str
    bound_used: float
    max_deviation: float
    given: tuple[str, ...]
    by_blocks: tuple[str, ...]
    doubted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was checked and found right; `recomputed` and `probed` only where base and adapters were given, and the
    depth asks for it. `digests` counts the files by what the receipt has of them: `sha256`, `crc32`, `xxh3`, or `none`,
    whose contents were not hashed. `num_inputs` files of base and adapters are those that the receipt has digests
    of."""

    depth: Depth
    num_files: int
    digests: dict[str, int]
    nbytes: int
    num_tensors: int
    num_adapter_tensors: int
    recomputed: Recomputed | None
    probed: Probed | None
    num_norms: int
    num_inputs: int = 0
