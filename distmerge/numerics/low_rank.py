"""Tuners whose delta is exactly a product: factors b (out, r) and a (r, in), their scaling included."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from distmerge.numerics.operators import Options, Tensors, scaling


def adalora(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """`scaling * B @ (A * E)`, scaling `lora_alpha / (init_r + 1e-5)`: PEFT, tuners/adalora/layer.py,
    SVDLinear.get_delta_weight. Pruning leaves `ranknum` at `init_r` (AdaLoraModel.resize_modules_by_rank_pattern)."""
    return tensors["lora_B"], tensors["lora_A"] * tensors["lora_E"] * scaling(options)


def bdlora(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """`scaling * B @ A`, one of them block-diagonal and stored without its zeros: block k of a (r, in) is rows
    `k r / n` to `(k + 1) r / n` of the stored (r, in / n), and likewise for b: PEFT, tuners/lora/variants.py,
    BlockDiagonalLinear.weight_as_blockdiagonal_matrix. Options `blocks_a` and `blocks_b`, 1 where it is dense."""
    a = _block_diagonal(tensors["a"].chunk(options["blocks_a"]))
    b = _block_diagonal(tensors["b"].chunk(options["blocks_b"]))
    return b, a * scaling(options)


def delora(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """`B diag(lambda / r / (|a_k| |b_k|)) A diag(w_norm)` over the rows a_k of A and the columns b_k of B: PEFT,
    tuners/delora/layer.py, DeloraLayer._compute_delta."""
    a, b = tensors["delora_A"], tensors["delora_B"]
    norms = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    return b * (tensors["delora_lambda"] / len(a) / norms), a * tensors["delora_w_norm"]


def gralora(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """The weight cut into k x k blocks, block (i, j) `scaling * B_i[j-th part]' @ A_j[i-th part]'`, and a plain LoRA
    where `hybrid_r > 0`: PEFT, tuners/gralora/layer.py, Linear.get_delta_weight; A (k, in / k, r), B (k, r, out / k).

    As one product: b holds B_i' in row block i and column block i, a in row block i all A_j[i-th part]'."""
    a_blocks, b_blocks = tensors["gralora_A"], tensors["gralora_B"]
    parts = a_blocks.chunk(len(a_blocks), dim=2)
    a = torch.cat([_block_diagonal(part.transpose(1, 2)) for part in parts])  # (k r, in)
    b = _block_diagonal(b_blocks.transpose(1, 2))  # (out, k r)
    if "gralora_A_general.weight" in tensors:
        a = torch.cat([a, tensors["gralora_A_general.weight"]])
        b = torch.cat([b, tensors["gralora_B_general.weight"]], dim=1)
    return b, a * scaling(options)


def pvera(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """VeRA with the means alone, the first half of lambda_d and A: PEFT, tuners/pvera/layer.py,
    Linear.get_delta_weight; so does the forward in evaluation, unless `sample_at_inference`."""
    lambda_b, lambda_d = tensors["pvera_lambda_b"], tensors["pvera_lambda_d"]
    r = len(lambda_d) // 2
    shared_a = tensors["pvera_A"][:r, : options["in_features"]]
    return lambda_b[:, None] * tensors["pvera_B"][: len(lambda_b)], lambda_d[:r, None] * shared_a


def randlora(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """`scaling * sum_n B_n diag(lambda_n) A_n diag(gamma_n)` over shared random bases, in PEFT's order of the inner
    dimension, transposed where out < in: PEFT, tuners/randlora/layer.py, Linear.get_scaled_bases.

    `randlora_A` (r, 1 or N, >= small), `randlora_B` (>= large, >= n, r), `randlora_lambda` (r, n), `randlora_gamma`
    (n, small), where small and large are the lesser and the greater of out and in."""
    weights, gamma = tensors["randlora_lambda"], tensors["randlora_gamma"]
    num_bases, small = gamma.shape
    wide = tensors["randlora_B"][: options["large"], :num_bases].flatten(1)  # (large, n r)
    narrow = weights[:, :, None] * tensors["randlora_A"][:, :num_bases, :small] * gamma
    narrow = narrow.flatten(0, 1) * scaling(options)  # (r n, small)
    return (narrow.T, wide.T) if options["transposed"] else (wide, narrow)


def unilora(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """`(theta[I_B] * S_B) @ (theta[I_A] * S_A)`, one trained vector for all modules: PEFT, tuners/unilora/layer.py,
    Linear._get_lora_matrices."""
    theta = tensors["unilora_theta_d"]
    a = theta[tensors["unilora_indices_A"].long()] * tensors["unilora_scales_A"]
    return theta[tensors["unilora_indices_B"].long()] * tensors["unilora_scales_B"], a


def vblora(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """`B @ A`, both put together from vectors of a shared bank, each the softmax mixture of the `topk` vectors with the
    largest logits: PEFT, tuners/vblora/layer.py, Linear._get_lora_matrices."""
    a = _mixtures(tensors, "vblora_logits_A", options["topk"])  # (r, in / length, length)
    b = _mixtures(tensors, "vblora_logits_B", options["topk"])  # (out / length, r, length)
    return b.transpose(1, 2).flatten(0, 1), a.flatten(1)


def _mixtures(tensors: Tensors, name: str, topk: int) -> Tensor:
    if name in tensors:
        logits, indices = tensors[name].topk(topk, dim=-1)
        shares = logits.softmax(dim=-1)
    else:
        # save_only_topk_weights: the last share is what the others leave of 1.
        shares, indices = tensors[f"{name}_topk_weights"], tensors[f"{name}_topk_indices"].long()
        shares = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], dim=-1)
    return (shares[..., None] * tensors["vblora_vector_bank"][indices]).sum(-2)


def vera(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """`diag(lambda_b) B diag(lambda_d) A`, A and B the corners of shared random matrices: PEFT, tuners/vera/layer.py,
    Linear.get_delta_weight."""
    lambda_b, lambda_d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
    shared_a = tensors["vera_A"][:, : options["in_features"]]
    return lambda_b[:, None] * tensors["vera_B"][: len(lambda_b)], lambda_d[:, None] * shared_a


def _block_diagonal(blocks: Iterable[Tensor]) -> Tensor:
    result: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return result


LOW_RANK: dict[str, Callable[[Tensors, Options], tuple[Tensor, Tensor]]] = {
    "adalora": adalora,
    "bdlora": bdlora,
    "delora": delora,
    "gralora": gralora,
    "pvera": pvera,
    "randlora": randlora,
    "unilora": unilora,
    "vblora": vblora,
    "vera": vera,
}
