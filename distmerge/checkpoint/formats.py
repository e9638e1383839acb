"""Stored formats: which tensors of a checkpoint are plain, and which are packed and with what beside them.

What a tensor is, its companions tell; the configuration must not say otherwise. Companions may lie in other files than
their weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from distmerge.checkpoint.foreign import find_foreign
from distmerge.checkpoint.four_bit import find_four_bit
from distmerge.checkpoint.header import FLOATS, TensorSpec
from distmerge.checkpoint.packing import Foreign, Packing, Stored
from distmerge.checkpoint.quantization import Quantization, told_dtype
from distmerge.checkpoint.scaled import Finder
from distmerge.errors import InputError

# Architectures whose linear layers are transformers' Conv1D: stored (in, out), packed transposed.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D_MODULES = ("c_attn", "c_fc", "c_proj", "q_attn")


def group(
    specs: dict[str, TensorSpec],
    read: Callable[[TensorSpec], bytes],
    quantization: Quantization | None,
    config: dict[str, Any],
) -> dict[str, Stored]:
    """The stored tensors among `specs` by the names of their dense forms, in their order; `read` gives the bytes of a
    (small) companion.

    Raises InputError, naming tensors, for companions that are missing or contradict their weight or the configuration.
    """

    def is_transposed(weight: str) -> bool:
        return config.get("model_type") in CONV1D_MODELS and weight.split(".")[-2:-1] in [[m] for m in CONV1D_MODULES]

    foreign, data = find_foreign(specs, quantization)
    others = {part.name for packing in foreign.values() for part in packing.parts} | set(data.values())
    specs_left = {name: spec for name, spec in specs.items() if name not in others}
    packings: dict[str, Packing] = {**foreign}
    if quantization is None or quantization.is_known:
        packings |= find_four_bit(specs_left, read, is_transposed)
        finder = Finder(
            specs=specs_left,
            quantization=quantization,
            dtype=_dense_dtype(specs_left, quantization, config),
            read=read,
            is_transposed=is_transposed,
        )
        found = finder.find()
        packings |= found.packings
        data |= found.data
    _check_agree(packings, quantization)
    firsts = {data.get(name, name): name for name in packings}
    used = {part.name for packing in packings.values() for part in packing.companions}
    return {
        firsts.get(name, name): Stored(data=spec, packing=packings.get(firsts.get(name, name)))
        for name, spec in specs.items()
        if name not in used
    }


def _check_agree(packings: dict[str, Packing], quantization: Quantization | None) -> None:
    """Raises InputError where configuration and tensors are of different methods."""
    if quantization is None:
        return
    for name, packing in packings.items():
        if quantization.is_known and not isinstance(packing, Foreign) and packing.kind not in quantization.kinds:
            raise InputError(
                f"is packed as {packing.kind}, but the configuration says {quantization.shown}",
                where=name,
                hint=f"are {quantization.where} and the weights of the same checkpoint?",
            )
    # A section of 4 bits may stand beside weights that were dequantized since.
    if not packings and quantization.kinds != ("nf4", "fp4"):
        raise InputError(
            f"says that the weights are packed by {quantization.shown}, but none of them is",
            where=quantization.where,
            hint="download the checkpoint again, or merge into the 16-bit base instead",
        )


def _dense_dtype(specs: dict[str, TensorSpec], quantization: Quantization | None, config: dict[str, Any]) -> str:
    """The dtype that loaders give to dense weights where the packed ones do not record it: the configuration's, or that
    of most other floats."""
    if quantization is not None and quantization.method == "fbgemm_fp8":
        return "BF16"  # transformers overrides any other
    counts: Counter[str] = Counter()
    for name, spec in specs.items():
        counts[spec.dtype] += spec.numel * (spec.dtype in FLOATS and "scale" not in name.rpartition(".")[2])
    most = counts.most_common(1)[0] if counts else ("BF16", 0)
    return told_dtype(config) or (most[0] if most[1] else "BF16")
