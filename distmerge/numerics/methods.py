"""The ways in which the deltas of several adapters become one, by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

_HISTOGRAM_NBYTES = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Combine:
    """How deltas are combined: `sum`, `ties`, `dare_ties`, `dare_linear` or `magnitude_prune`. `density` is the share
    of each delta's elements that is kept, all of them if it is None; where chance decides which, it goes by `seed`."""

    method: str = "sum"
    density: float | None = None
    seed: int = 0

    @property
    def is_sum(self) -> bool:
        return self.method == "sum"

    @property
    def prunes(self) -> bool:
        """True if the largest elements of each delta are kept, False if chance decides."""
        return self.method in ("ties", "magnitude_prune")

    @property
    def elects(self) -> bool:
        """True if only the elements count whose sign is the majority's, and their mean is taken."""
        return self.method in ("ties", "dare_ties")

    @property
    def share(self) -> float:
        """The density, 1 for a sum."""
        return 1.0 if self.density is None else self.density

    @property
    def scale(self) -> float:
        """What kept elements are multiplied with."""
        return 1.0 if self.prunes else 1 / self.share

    def scratch_nbytes(self, num_deltas: int, numel: int) -> int:
        """Bytes of the temporaries for a block of `numel` elements at most: each delta, its mask and what the mask is
        made from, six more of the block's size, and the histograms of the search for thresholds."""
        return num_deltas * (10 * numel + _HISTOGRAM_NBYTES) + 24 * numel

    def __str__(self) -> str:
        """The method as people read it."""
        if self.is_sum:
            return "sum"
        chance = "" if self.prunes else f", seed {self.seed}"
        return f"{self.method}, density {self.share:g}{chance}"


SUM = Combine()
