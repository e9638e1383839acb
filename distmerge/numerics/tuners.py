"""Every way in which an adapter other than plain LoRA changes a weight, by name: operators, and factors of products."""

from __future__ import annotations

from torch import Tensor

from distmerge.numerics import decompositions, products, rotations, spectra
from distmerge.numerics.low_rank import LOW_RANK
from distmerge.numerics.operators import Operator, Options, Tensors

__all__ = ["LOW_RANK", "OPERATORS", "Operator", "Options", "Tensors", "misplaced"]

OPERATORS: dict[str, Operator] = {
    "beft": Operator(apply=products.beft, row_local=True),
    "boft": Operator(apply=rotations.boft, row_local=True, prepare=rotations.prepare_boft),
    "c3a": Operator(apply=products.c3a, row_local=True),
    "deft": Operator(apply=decompositions.deft, row_local=False),
    "dora": Operator(apply=products.dora, row_local=True),
    "fourierft": Operator(apply=spectra.fourierft, row_local=False),
    "glora": Operator(apply=products.glora, row_local=True),
    "hira": Operator(apply=products.hira, row_local=True),
    "hra": Operator(apply=rotations.hra, row_local=True),
    "ia3": Operator(apply=products.ia3, row_local=True),
    "kasa": Operator(apply=decompositions.kasa, row_local=False),
    "loha": Operator(apply=products.loha, row_local=True),
    "lokr": Operator(apply=products.lokr, row_local=True),
    "miss": Operator(apply=products.miss, row_local=True),
    "oft": Operator(apply=rotations.oft, row_local=True, prepare=rotations.prepare_oft),
    "olora": Operator(apply=decompositions.olora, row_local=False),
    "osf": Operator(apply=decompositions.osf, row_local=False),
    "peanut": Operator(apply=decompositions.peanut, row_local=False),
    "pissa": Operator(apply=decompositions.pissa, row_local=False),
    "road": Operator(apply=rotations.road, row_local=False),
    "rows": Operator(apply=products.replaced_rows, row_local=True),
    "shira": Operator(apply=products.shira, row_local=True),
    "supertuning": Operator(apply=products.supertuning, row_local=True),
    "waveft": Operator(apply=spectra.waveft, row_local=False),
}


def misplaced(tensors: Tensors, size: tuple[int, int]) -> list[str]:
    """The names of the index tensors that point outside of what they index, for a weight of `size` (out, in): data
    that operators take on trust, since they only look at the rows they are given."""
    out, into = size
    limits = {"shira_indices": (out, into), "supertuning_indices": (out * into,)}
    for name in tensors:
        if name.startswith("unilora_indices"):
            limits[name] = (len(tensors["unilora_theta_d"]),)
        elif name.endswith("_topk_indices"):
            limits[name] = (len(tensors["vblora_vector_bank"]),)
    return [name for name, tensor in tensors.items() if name in limits and not _within(tensor, limits[name])]


def _within(indices: Tensor, limits: tuple[int, ...]) -> bool:
    rows = indices if len(limits) > 1 else indices[None]
    pairs = zip(rows, limits, strict=True)
    return all(bool(((row >= 0) & (row < limit) & (row == row.long())).all()) for row, limit in pairs)
