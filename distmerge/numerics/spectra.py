"""Tuners whose change is a few coefficients of a transform: FourierFT and WaveFT."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distmerge.numerics.operators import Options, Tensors, scaling
from distmerge.numerics.wavelets import FILTERS


def fourierft(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + s * Re(ifft2(F))`, F the spectrum at places that a seed draws, 0 elsewhere: PEFT,
    tuners/fourierft/layer.py, FourierFTLayer.get_delta_weight (arXiv 2405.03003)."""
    spectrum = _scattered(weight, tensors["fourierft_spectrum"], options["seed"])
    transform: Tensor = torch.fft.ifft2(spectrum)
    return weight + scaling(options) * transform.real


def waveft(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + s * idwt2(F)`, F the coefficients at places that a seed draws, 0 elsewhere; without a wavelet `W + s * F`:
    PEFT, tuners/waveft/layer.py, WaveFTLayer.get_delta_weight.

    F is centred in a matrix of even sides that is as much larger as the transform's borders take away, and of what
    comes back the middle is taken."""
    delta = _scattered(weight, tensors["waveft_spectrum"], options["seed"])
    if options["wavelet"]:
        low_pass = FILTERS[options["wavelet"]]
        larger = [size + len(low_pass) - 2 for size in weight.shape]
        spare = [size + size % 2 - own for size, own in zip(larger, weight.shape, strict=True)]
        before = [size // 2 for size in spare]
        down, across = ((first, size - first) for first, size in zip(before, spare, strict=True))
        whole = synthesize(functional.pad(delta, (*across, *down)), low_pass)
        top, left = ((size - own) // 2 for size, own in zip(whole.shape, weight.shape, strict=True))
        delta = whole[top : top + weight.shape[0], left : left + weight.shape[1]]
    return weight + scaling(options) * delta


def _scattered(weight: Tensor, values: Tensor, seed: int) -> Tensor:
    """A matrix like `weight` with `values` at the places that PEFT's generator draws from `seed`, on the CPU."""
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))[: len(values)]
    flat = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    return flat.index_put((places.to(weight.device),), values).view(weight.shape)


def synthesize(coefficients: Tensor, low_pass: tuple[float, ...]) -> Tensor:
    """One level of the inverse wavelet transform of `coefficients` (2 m, 2 n), given in quarters.

    The upper left quarter is low-pass in both directions, the upper right is high-pass down the columns, the lower left
    along the rows: so PEFT hands them to waverec2d. The result is (2 m - f + 2, 2 n - f + 2) for filters of length f:
    borders, where filters overlap the edge, are cut off.
    """
    top, bottom = coefficients.chunk(2)
    (low_low, high_low), (low_high, high_high) = top.chunk(2, dim=1), bottom.chunk(2, dim=1)
    low = _synthesize_columns(low_low, high_low, low_pass)
    high = _synthesize_columns(low_high, high_high, low_pass)
    return _synthesize_columns(low.T, high.T, low_pass).T


def _synthesize_columns(low: Tensor, high: Tensor, low_pass: tuple[float, ...]) -> Tensor:
    """Every column of `low` and `high` (m, n) joined to one of length 2 m - f + 2."""
    taps = torch.tensor(low_pass, dtype=low.dtype, device=low.device)
    signs = torch.ones_like(taps)
    signs[1::2] = -1
    filters = torch.stack([taps, taps.flip(0) * signs])[:, None]  # (2, 1, f)
    joined = functional.conv_transpose1d(torch.stack([low.T, high.T], dim=1), filters, stride=2)
    cut = len(low_pass) - 2
    return joined[:, 0, cut : joined.shape[2] - cut].T
