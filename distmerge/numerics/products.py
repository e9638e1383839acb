"""Tuners whose new rows are made of sums and products, and need no other rows of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from distmerge.numerics.operators import Options, Tensors, row_numbers, scaling


def dora(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`m / |W0 + s b a|_row * (W + s b a)`, the norms of the unmerged base's rows: PEFT 0.21, tuners/lora/variants.py,
    DoraLinearVariant.merge_safe (arXiv 2402.09353). Tensors `a` (r, in), `b` (out, r), `magnitude` (out,)."""
    delta = scaling(options) * (tensors["b"][rows] @ tensors["a"])
    factor: Tensor = tensors["magnitude"][rows] / torch.linalg.vector_norm(base + delta, dim=1)
    return factor[:, None] * (weight + delta)


def loha(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + alpha / r * (w1_a w1_b) * (w2_a w2_b)`, the middle product by elements: PEFT, tuners/loha/layer.py,
    make_weight."""
    first = tensors["hada_w1_a"][rows] @ tensors["hada_w1_b"]
    return weight + scaling(options) * first * (tensors["hada_w2_a"][rows] @ tensors["hada_w2_b"])


def lokr(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + alpha / r * kron(w1, w2)`, each factor whole or a product: PEFT, tuners/lokr/layer.py,
    LoKrLayer.get_delta_weight. Row i of the Kronecker product is kron(w1[i // n], w2[i % n]), n rows in w2."""
    w1, w2 = (
        tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    number = row_numbers(weight, rows)
    left, right = w1[number // len(w2)], w2[number % len(w2)]
    return weight + scaling(options) * (left[:, :, None] * right[:, None, :]).flatten(1)


def hira(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + W0 * (B A)`, by elements: PEFT, tuners/hira/layer.py, HiraLayer._merge."""
    return weight + base * (tensors["hira_B"][rows] @ tensors["hira_A"])


def glora(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + W0 * A + B`, A and B each a product, a column, a number or nothing: PEFT, tuners/glora/layer.py,
    GloraLayer.merge."""
    return weight + base * _glora_path(tensors, "glora_A", rows) + _glora_path(tensors, "glora_B", rows)


def _glora_path(tensors: Tensors, name: str, rows: slice) -> Tensor:
    if f"{name}.Xd" in tensors:
        return tensors[f"{name}.Xd"][rows] @ tensors[f"{name}.Xu"]
    if f"{name}.X" in tensors:
        value = tensors[f"{name}.X"]  # (out, 1) or (1,)
        return value if value.dim() == 1 else value[rows]
    return tensors[f"{name}.zeros"][rows]


def c3a(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + C / in`, C of circulant blocks: element (p, q) of a block is kernel[(q - p) mod size]: PEFT,
    tuners/c3a/utils.py, get_circulant_fast, which computes the same by Fourier transforms."""
    kernel = tensors["c3a_kernel"]  # (out / size, in / size, size)
    size = kernel.shape[2]
    number = row_numbers(weight, rows)
    shift = (torch.arange(size, device=weight.device) - (number % size)[:, None]) % size  # (h, size)
    blocks = kernel[number // size]  # (h, in / size, size)
    delta = blocks.gather(2, shift[:, None, :].expand_as(blocks)).flatten(1)
    return weight + delta / weight.shape[1]


def miss(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W + B'` with the columns of B (r, out) repeated along the inputs, those of "mini" (r, mini_r) along the outputs
    too: PEFT, tuners/miss/layer.py, MissLinear.get_delta_weight_miss. With "bat": `miss_bat`."""
    block = tensors["miss_block"] if "miss_block" in tensors else tensors["bone_block"]
    if block.dim() == 3:
        return _miss_bat(weight, block, rows)
    r, period = block.shape
    columns = block.T[row_numbers(weight, rows) % period]  # (h, r)
    width = weight.shape[1]
    return weight + columns.repeat(1, -(-width // r))[:, :width]


def _miss_bat(weight: Tensor, blocks: Tensor, rows: slice) -> Tensor:
    """`W + W_ij B_i + B_i` for every r x r block of the running weight: PEFT, tuners/miss/layer.py,
    MissLinear.get_delta_weight; `blocks` is (out / r, r, r)."""
    r, width = blocks.shape[2], weight.shape[1]
    result = weight.clone()
    for number in range(rows.start // r, -(-rows.stop // r)):
        first, last = max(rows.start, number * r), min(rows.stop, (number + 1) * r)
        part, block = weight[first - rows.start : last - rows.start], blocks[number]
        product = part.reshape(-1, r) @ block + block[first - number * r : last - number * r].repeat_interleave(
            width // r, dim=0
        )
        result[first - rows.start : last - rows.start] += product.reshape(part.shape)
    return result


def ia3(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W * l`, l a column (out, 1), or in feed-forward modules a row (1, in): PEFT, tuners/ia3/layer.py,
    Linear.merge. A column scales the bias, as (out, 1), too; `keeps_bias` says that it is a row."""
    scale = tensors["ia3_l"]
    return weight * (scale if options["keeps_bias"] else scale[rows])


def beft(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`bias + beft_bias`, of the bias alone, as (out, 1): PEFT, tuners/beft/layer.py, Linear.merge."""
    return weight + tensors["beft_bias"][0, rows, None]


def shira(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W[i, j] + v` at the stored places, indices (2, n): PEFT, tuners/shira/layer.py, ShiraLayer.get_delta_weight.
    Files that were saved on Windows hold the indices as floats."""
    row, col = tensors["shira_indices"].long()
    return _add_at(weight, row, col, tensors["shira_weight"], rows)


def supertuning(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W.flat[i] + v` at the stored places, and `alpha / r * B A` where it has factors: PEFT,
    tuners/supertuning/layer.py, Linear.merge."""
    flat = tensors["supertuning_indices"].long()
    width = weight.shape[1]
    result = _add_at(weight, flat // width, flat % width, tensors["supertuning_values"], rows)
    if "supertuning_lora_A.weight" not in tensors:
        return result
    b, a = tensors["supertuning_lora_B.weight"], tensors["supertuning_lora_A.weight"]
    return result + scaling(options) * (b[rows] @ a)


def _add_at(weight: Tensor, row: Tensor, col: Tensor, values: Tensor, rows: slice) -> Tensor:
    here = (row >= rows.start) & (row < rows.stop)
    return weight.index_put((row[here] - rows.start, col[here]), values[here], accumulate=True)


def replaced_rows(weight: Tensor, base: Tensor, tensors: Tensors, options: Options, rows: slice) -> Tensor:
    """`W` with the rows `indices` replaced by the rows of its one tensor (n, dim): PEFT,
    tuners/trainable_tokens/layer.py, TrainableTokensLayer.merge."""
    (values,) = tensors.values()
    indices = torch.tensor(options["indices"], dtype=torch.int64, device=weight.device)
    here = (indices >= rows.start) & (indices < rows.stop)
    return weight.index_put((indices[here] - rows.start,), values[here])
