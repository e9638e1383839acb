"""What one rounding can cost: spacing of floats, and the distance of stored elements from a float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# significant bits, exponent of the smallest subnormal
_FORMATS = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far elements lie from an oracle: the largest distance in ulp, the largest beyond the noise that float32
    arithmetic may add, how many are not the nearest value of their dtype, and how many lie farther off than half an
    ulp plus that noise. Where base and delta cancel, the noise alone can be many ulp of the small result."""

    max_ulp: float
    max_ulp_beyond_noise: float
    num_not_nearest: int
    num_beyond: int


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at and above |values|, float64."""
    bits, smallest = _FORMATS[dtype]
    _, exponent = torch.frexp(values.abs())
    spacing = torch.ldexp(torch.ones_like(values), (exponent - bits).clamp_min(smallest))
    return torch.where(values == 0, torch.full_like(spacing, 2.0**smallest), spacing)


def distance(stored: Tensor, oracle: Tensor, noise: Tensor) -> Distance:
    """The distance of `stored` (bfloat16, float16 or float32) from `oracle`, float64.

    `noise`, float64, is the most that float32 arithmetic may have moved each element before it was rounded.
    """
    value = stored.double()
    error = (value - oracle).abs()
    above = ulp(value, stored.dtype)
    # Just below a power of two the floats are twice as dense.
    mantissa, _ = torch.frexp(value.abs())
    below = torch.where((mantissa == 0.5) & (oracle.abs() < value.abs()), above / 2, above)
    below = torch.maximum(below, torch.full_like(below, 2.0 ** _FORMATS[stored.dtype][1]))
    beyond = ~(error <= above / 2 + noise)  # NaN counts
    return Distance(
        max_ulp=float((error / above).max()) if len(error) else 0.0,
        max_ulp_beyond_noise=float(((error - noise).clamp_min(0) / above).max()) if len(error) else 0.0,
        num_not_nearest=int((~(error <= below / 2)).sum()),
        num_beyond=int(beyond.sum()),
    )


def not_surely_nearest(stored: Tensor, oracle: Tensor) -> Tensor:
    """The places of the elements of `stored` (flat) that may not be the nearest value of their dtype to `oracle`,
    float64. All others are, so that they lie within half an ulp. Far quicker than `distance`."""
    rough = oracle.float()
    doubt = rough.to(stored.dtype) != stored  # NaN counts
    if stored.dtype != torch.float32:
        # Rounding to float32 on the way may have made a tie of what was none.
        tail = 1 << 24 - _FORMATS[stored.dtype][0]
        doubt |= (rough.view(torch.int32) & (tail - 1)) == tail // 2
        doubt |= rough.abs() < torch.finfo(stored.dtype).tiny  # whose ties lie elsewhere
    return doubt.nonzero().view(-1)


def half_ulp(stored: Tensor) -> Tensor:
    """Half the spacing of the dtype of `stored` (bfloat16, float16 or float32) at and above each |value|, float64: the
    most that one rounding to nearest moves a value to there."""
    bits, smallest = _FORMATS[stored.dtype]
    powers = (stored.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^exponent, 0 for subnormals
    return (powers.double() * 2.0**-bits).clamp_min_(2.0 ** (smallest - 1))
