"""Tuners that rotate the inputs or the outputs of a weight: OFT, BOFT, HRA, RoAd."""

from __future__ import annotations

import torch
from torch import Tensor

from distmerge.numerics.operators import Options, Tensors


def cayley(skew: Tensor) -> Tensor:
    """`(I + Q)^-1 (I - Q)` of skew-symmetric matrices (n, size, size): orthogonal matrices."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    result: Tensor = torch.linalg.solve(eye + skew, eye - skew)
    return result


def cayley_neumann(skew: Tensor, *, terms: int, halves_last: bool) -> Tensor:
    """`I + 2 Q + 2 Q^2 + ...`, the Neumann series of a Cayley transform: PEFT, tuners/oft/layer.py,
    OFTRotationModule._cayley_batch.

    The last power counts once with `halves_last` (PEFT 0.18 and newer; what 3 terms give, 4 give too), else twice.
    """
    result = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    last = (max(terms - 1, 3) if terms > 2 else terms - 1) if halves_last else terms - 1
    power = skew
    for number in range(1, last + 1):
        result = result + (1 if halves_last and number == last > 1 else 2) * power
        power = power @ skew
    return result


def prepare_oft(tensors: Tensors, options: Options) -> Tensors:
    """`tensors` and the rotations (blocks or 1, size, size) that they stand for."""
    return {**tensors, "rotations": _oft_rotations(tensors, options)}


def oft(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W R'`, R block-diagonal of Cayley transforms, one block for all with block_share: PEFT, tuners/oft/layer.py,
    Linear.merge and OFTRotationModule.get_weight."""
    rotations = tensors["rotations"] if "rotations" in tensors else _oft_rotations(tensors, options)
    return _rotate(weight, rotations)


def _oft_rotations(tensors: Tensors, options: Options) -> Tensor:
    upper = tensors["oft_R.weight"]  # (blocks, size (size - 1) / 2)
    size = options["block_size"]
    skew = upper.new_zeros(len(upper), size, size)
    row, col = torch.triu_indices(size, size, 1, device=upper.device)
    skew[:, row, col] = upper
    skew = skew - skew.transpose(1, 2)
    if options["coft_eps"]:
        # PEFT, OFTRotationModule._project_batch: constrained OFT keeps each block within a ball around 0.
        limit = options["coft_eps"] / len(upper) ** 0.5
        norm = torch.linalg.matrix_norm(skew, keepdim=True)
        skew = torch.where(norm <= limit, skew, limit * skew / norm)
    if not options["neumann_terms"]:
        return cayley(skew)
    return cayley_neumann(skew, terms=options["neumann_terms"], halves_last=options["halves_last"])


def _rotate(weight: Tensor, rotations: Tensor) -> Tensor:
    """`weight` (h, in) times the transposed block-diagonal matrix of `rotations` (blocks or 1, size, size)."""
    blocks = weight.reshape(len(weight), -1, rotations.shape[-1]).transpose(0, 1)  # (blocks, h, size)
    return (blocks @ rotations.transpose(1, 2)).transpose(0, 1).reshape(weight.shape)


def prepare_boft(tensors: Tensors, options: Options) -> Tensors:
    """`tensors` and the rotations (factors, blocks, size, size) that they stand for."""
    return {**tensors, "rotations": _boft_rotations(tensors)}


def boft(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`s * W (Q_m ... Q_1)'`, `Q_i = P_i D_i P_i'`, D_i block-diagonal of Cayley transforms, P_i a butterfly
    permutation: PEFT, tuners/boft/layer.py, Linear.get_delta_weight (arXiv 2311.06243).

    The number of factors is that of the tensor: without its CUDA extension PEFT trains one, whatever the
    configuration says."""
    rotations = tensors["rotations"] if "rotations" in tensors else _boft_rotations(tensors)
    factors, blocks, size, _ = rotations.shape
    result = weight
    for number in range(factors):
        order = butterfly(weight.shape[1], blocks >> number, size // 2, factors, device=weight.device)
        mixed = _rotate(result[:, torch.argsort(order)], rotations[number])
        result = mixed[:, order]
    return result * tensors["boft_s"][rows]


def _boft_rotations(tensors: Tensors) -> Tensor:
    raw = tensors["boft_R"]
    return cayley((raw - raw.transpose(2, 3)) / 2)


def butterfly(width: int, blocks: int, half: int, factors: int, *, device: torch.device | None = None) -> Tensor:
    """The permutation of a butterfly factor: in each of `blocks` equal parts, the runs of `half` elements with even
    numbers before those with odd ones: PEFT, tuners/boft/layer.py, BOFTLayer.block_butterfly_perm."""
    numbers = torch.arange(width, device=device)
    if factors == 1:
        return numbers
    return numbers.view(blocks, -1, 2, half).transpose(1, 2).reshape(width)


def hra(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W H_1 ... H_r`, `H_i = I - 2 u_i u_i'` with unit vectors u_i, or, with apply_GS, `W (I - 2 sum u_i u_i')` with
    orthonormal ones: PEFT, tuners/hra/layer.py, HRALinear.get_delta_weight."""
    vectors = tensors["hra_u"]  # (in, r)
    if options["orthogonal"]:
        unit = _gram_schmidt(vectors)
        return weight - 2 * (weight @ unit) @ unit.T
    unit = vectors / torch.linalg.vector_norm(vectors, dim=0)
    result = weight
    for number in range(unit.shape[1]):
        u = unit[:, number : number + 1]
        result = result - 2 * (result @ u) @ u.T
    return result


def _gram_schmidt(vectors: Tensor) -> Tensor:
    """The columns made orthonormal one by one, as PEFT does: columns that nearly depend on earlier ones (HRA starts
    with equal pairs) come out as rounding leaves them, and a QR decomposition would leave something else."""
    unit: list[Tensor] = []
    for column in vectors.unbind(1):
        rest = column
        for other in unit:
            rest = rest - (other @ rest) * other
        unit.append(rest / torch.linalg.vector_norm(rest))
    return torch.stack(unit, dim=1)


def road(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`R W`, R rotating and scaling pairs of outputs, one of each pair in the first half of a group, the other in the
    second; of the bias, as (out, 1), too: PEFT, tuners/road/layer.py, _prepare_cols and _apply_road.

    `angles` is how many sets of angles and scales a group has: road_1 shares one within a pair, road_2 has one for each
    output, road_4 one for each of the four numbers of a pair's rotation."""
    half, angles = options["group_size"] // 2, options["angles"]
    theta, alpha = (tensors[name].reshape(-1, angles, half) for name in ("road_theta", "road_alpha"))
    own, other = (slice(0, 2), slice(2, 4)) if angles == 4 else (slice(None), slice(None))
    cosine, sine = (alpha * theta.cos())[:, own, :, None], (alpha * theta.sin())[:, other, :, None]
    first, second = weight.reshape(-1, 2, half, weight.shape[1]).unbind(1)
    straight, turned = torch.stack([first, second], dim=1), torch.stack([-second, first], dim=1)
    return (cosine * straight + sine * turned).reshape(weight.shape)
