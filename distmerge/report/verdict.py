"""How much of a merge's changes is left, in a sentence, and what to do where a tune is being lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distmerge.errors import printable
from distmerge.numerics.survival import Survival
from distmerge.receipt import TensorEntry

# Half of a change, in size along its direction or in direction. In bfloat16 that is a delta of a thousandth of the
# weights: single values of a low-rank delta are then mostly below half a step of the weights that they are added to.
_LOST = 0.5
_FEW = 0.05
_FAITHFUL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is left of the changes to `num_changed` tensors: of how many half or more is lost, in size or in direction,
    and of which the most; over all of them together the cosine between what was added and what is left, the share of it
    that is left, |D|/|W|, and the share of unchanged elements. Of cosines the range; null where nothing was added.

    Where the output is `packed`, `pack_error` is what that cost the changed tensors together, and `plain_pack_error`
    what it would have with plain scales, as shares of |W|; null where they are not known."""

    num_changed: int
    num_lost: int
    worst: str
    worst_kept: float | None
    worst_cosine: float | None
    cosine: float | None
    cosines: tuple[float, float] | None
    kept: float | None
    relative_delta: float | None
    unchanged: float | None
    packed: bool
    pack_error: float | None
    plain_pack_error: float | None

    @property
    def is_lost(self) -> bool:
        """True if of more than a few tensors most of the change is lost."""
        return self.num_lost > _FEW * self.num_changed

    @property
    def level(self) -> str:
        """`kept`, `weakened`, `lost`, or `unknown` where nothing was added."""
        if self.cosine is None and not self.num_lost:
            return "unknown"
        if self.is_lost:
            return "lost"
        return "kept" if self.cosine is not None and self.cosine >= _FAITHFUL else "weakened"

    @property
    def sentence(self) -> str:
        """The verdict for people."""
        if self.level == "unknown":
            return "Nothing was added to any tensor."
        kept = f"{100 * (self.kept or 0):.1f} % of the change is left (cosine {self.cosine or 0:.3f})"
        if self.level == "lost":
            few = f"{self.num_lost} of {self.num_changed} tensors keep less than half of it in size or direction"
            return f"The tune is being lost: {few}; {kept}."
        if self.level == "weakened":
            return f"The tune is weakened by rounding: {kept}."
        return f"The tune is there: {kept}."

    @property
    def remedy(self) -> str:
        """What to do where a tune is being lost."""
        if self.packed:
            return "leave out --quantize, or serve the adapter unmerged"
        return "merge with --dtype float32, or serve the adapter unmerged"

    @property
    def packing(self) -> str:
        """What packing the output cost, empty where it is not packed or nothing is known of it."""
        if self.pack_error is None:
            return ""
        told = f"packing moves the changed weights by {100 * self.pack_error:.3g} % of their norm"
        if self.plain_pack_error in (None, self.pack_error):
            return told
        return f"{told}, with plain scales it would be {100 * (self.plain_pack_error or 0):.3g} %"

    @property
    def warning(self) -> str:
        """A line for the end of a merge, empty unless a tune is being lost."""
        if not self.is_lost:
            return ""
        return (
            f"the tune is being lost in rounding: of {self.num_changed} changed tensors {self.num_lost} keep less than "
            f"half of their change in size or direction, least {printable(self.worst)} ({self._least}); {self.remedy}"
        )

    @property
    def _least(self) -> str:
        """Of the worst tensor the figure for which it is: the lesser of both."""
        kept, cosine = self.worst_kept or 0.0, self.worst_cosine or 0.0
        return f"cosine {cosine:.2f}" if cosine < kept else f"{100 * kept:.0f} % left"


def judge(tensors: Mapping[str, TensorEntry]) -> Verdict:
    """The verdict on the changed tensors of a receipt; those to which nothing was added do not count."""
    changed = {name: e.survival for name, e in tensors.items() if e.survival is not None and e.survival.delta_norm}
    found = list(changed.values())
    worst = min(changed, key=lambda name: (score(changed[name]), name), default="")
    numel = sum(tensors[name].numel for name in changed)
    delta = math.hypot(*(one.delta_norm for one in found))
    applied = math.hypot(*(one.applied_norm for one in found))
    product = math.fsum((one.cosine or 0.0) * one.delta_norm * one.applied_norm for one in found)
    base = math.hypot(*(one.base_norm for one in found))
    cosines = [one.cosine or 0.0 for one in found]
    packed = [e.survival for e in tensors.values() if e.survival is not None and e.survival.pack_error is not None]
    return Verdict(
        num_changed=len(changed),
        num_lost=sum(score(one) < _LOST for one in found),
        worst=worst,
        worst_kept=changed[worst].kept if worst else None,
        worst_cosine=changed[worst].cosine if worst else None,
        cosine=product / delta / applied if delta and applied else None,
        cosines=(min(cosines), max(cosines)) if cosines else None,
        kept=product / delta**2 if delta else None,
        relative_delta=delta / base if base else None,
        unchanged=sum(one.unchanged * tensors[name].numel for name, one in changed.items()) / numel if numel else None,
        packed=bool(packed),
        pack_error=_relative([(one.pack_error, one.base_norm) for one in packed]),
        plain_pack_error=_relative([(one.plain_pack_error, one.base_norm) for one in packed]),
    )


def _relative(errors: Sequence[tuple[float | None, float]]) -> float | None:
    """The norm of all `errors` as a share of that of the weights beside them; null where one is not known."""
    known = [error for error, _ in errors if error is not None]
    weights = math.hypot(*(weight for _, weight in errors))
    return math.hypot(*known) / weights if weights and len(known) == len(errors) else None


def score(survival: Survival) -> float:
    """The lesser of the cosine and the share of the change that is left; 1 is all of it, 0 nothing."""
    return min(survival.cosine or 0.0, survival.kept or 0.0)
