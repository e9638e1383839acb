"""Adapters that were trained beside a changed base, or whose change is computed from it: they need all of its rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from distmerge.numerics.operators import Options, Tensors, scaling


def kasa(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W - (the r smallest singular components of W0) + s * (b diag) a`: PEFT, tuners/lora/variants.py,
    KasaLinearVariant (arXiv 2412.06071). Tensors `a` (r, in), `b` (out, r), `diag` (r,)."""
    r = len(tensors["diag"])
    dropped = _singular(base, slice(-r, None))
    return weight - dropped + scaling(options) * ((tensors["b"] * tensors["diag"]) @ tensors["a"])


def pissa(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + s * b a - (the r largest singular components of W0)`, which is what b and a started from: PEFT,
    tuners/lora/layer.py, LoraLayer.pissa_init (arXiv 2404.02948). Tensors `a` (r, in), `b` (out, r)."""
    r = len(tensors["a"])
    return weight + scaling(options) * (tensors["b"] @ tensors["a"]) - _singular(base, slice(0, r))


def olora(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + s * (b a - Q_r R_r)`, Q_r and R_r the first r columns and rows of W0's QR decomposition: PEFT,
    tuners/lora/layer.py, LoraLayer.olora_init (arXiv 2406.01775). Tensors `a` (r, in), `b` (out, r).

    The first r columns of Q only depend on those of W0, and `R_r = Q_r' W0`."""
    q: Tensor = torch.linalg.qr(base[:, : len(tensors["a"])])[0]
    return weight + scaling(options) * (tensors["b"] @ tensors["a"] - q @ (q.T @ base))


def osf(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W - (the k smallest singular components of W0) + U diag(S) V` with k trained components: PEFT,
    tuners/osf/layer.py, OSFLayer.get_delta_weight (arXiv 2504.07097)."""
    names = (f"osf_svd_params.{name}_low" for name in "USV")
    trained_u, trained_s, trained_v = (tensors[name] for name in names)
    return weight - _singular(base, slice(-len(trained_s), None)) + (trained_u * trained_s) @ trained_v


def _singular(matrix: Tensor, part: slice) -> Tensor:
    """The sum of the singular components `part` of `matrix`, counted from the largest."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    result: Tensor = (u[:, part] * s[part]) @ vh[part]
    return result


def deft(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + P (s * R - right' W0)`, P and right the Q of P's QR decomposition, or P and relu(P); without R (PaRa) the
    removal alone: PEFT, tuners/deft/layer.py, DeftLinear.get_delta_weight."""
    left = right = tensors["deft_P"]  # (out, r)
    if options["decomposition"] == "qr":
        q: Tensor = torch.linalg.qr(left)[0]
        left = right = q
    else:
        right = left.relu()
    removed = right.T @ base
    if "deft_R" not in tensors:
        return weight - left @ removed
    return weight + left @ (scaling(options) * tensors["deft_R"] - removed)


def peanut(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + s * (B f(W0' A'))'`, a small network f on the columns of the base: PEFT, tuners/peanut/layer.py,
    Linear._compute_delta_weight. `depth` encoders and as many decoders with residuals lie between A and B."""
    act, depth = ACTIVATIONS[options["activation"]], options["depth"]
    hidden = act(base.T @ tensors["peanut_A.weight"].T)  # (in, r)
    residuals = []
    for number in range(depth):
        residuals.append(hidden)
        hidden = act(hidden @ tensors[f"peanut_encoders.{number}.weight"].T)
    for number in range(depth):
        hidden = act(hidden @ tensors[f"peanut_decoders.{number}.weight"].T) + residuals.pop()
    return weight + scaling(options) * (tensors["peanut_B.weight"] @ hidden.T)


def _gelu_tanh(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")


# By their names in transformers.activations.ACT2FN.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "leaky_relu": functional.leaky_relu,
    "linear": torch.clone,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
