"""Medians with quartiles, ratios by round, and straight lines through points."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of `count` values, and their quartiles."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A straight line by least squares: y = start + slope x, and the share of the variance that it explains."""

    start: float
    slope: float
    r2: float


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles (with 2 values or less, the extremes); of no values, not a number."""
    if not values:
        nan = float("nan")
        return Spread(median=nan, low=nan, high=nan, count=0)
    if len(values) > 2:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    else:
        low, high = min(values), max(values)
    return Spread(median=statistics.median(values), low=low, high=high, count=len(values))


def ratios(values: Sequence[float], to: Sequence[float]) -> list[float]:
    """Each value over that of `to` of the same round."""
    return [mine / theirs for mine, theirs in zip(values, to, strict=True)] if values and to else []


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """The line through the points. All points on it, or all `ys` equal, is an r2 of 1."""
    slope, start = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    total = sum((y - mean) ** 2 for y in ys)
    left = sum((y - start - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return Line(start=start, slope=slope, r2=1 - left / total if total else 1.0)
