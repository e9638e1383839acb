"""What two runs must have alike to give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distmerge import __version__
from distmerge.checkpoint.base import FileMark
from distmerge.config import MergeConfig

if TYPE_CHECKING:
    from distmerge.plan import PlannedAdapter


def marks(
    config: MergeConfig, base: Sequence[FileMark], adapters: Sequence[PlannedAdapter], device: str
) -> dict[str, str]:
    """What must be equal for a run to continue another: everything that can change a byte of the output."""
    found = _choices(config, device)
    for file in base:
        found[f"base {file.name}"] = f"{file.nbytes} bytes, mtime {file.mtime_ns}, header {file.header_sha256}"
    for number, adapter in enumerate(adapters, start=1):
        found[f"adapter {number}"] = f"weights {adapter.weights_sha256}, config {adapter.config_sha256}"
        found[f"adapter {number} --weight"] = adapter.weight
    return {key: str(value) for key, value in found.items()}


def _choices(config: MergeConfig, device: str) -> dict[str, Any]:
    """The options that can change a byte of the output, and what computes it, by the names that people know."""
    import torch  # only its version is needed

    from distmerge.numerics.compiled import arithmetic

    marks: dict[str, Any] = {"distmerge": __version__, "torch": torch.__version__, "device": device}
    marks["arithmetic"] = arithmetic(device)
    marks |= {"--dtype": config.dtype, "--max-shard-size": config.max_shard_size, "--lora-alpha": config.lora_alpha}
    marks |= {"--use-rslora": config.use_rslora, "--map": list(config.map), "--expert-b-order": config.expert_b_order}
    marks |= {"--quantize": config.quantize, "--quantize-mode": config.quantize_mode}
    marks |= {"--keep-quantized": config.keep_quantized}
    marks |= {"--simulate-quant": config.simulate_quant, "--quant-blocksize": config.quant_blocksize}
    marks |= {"--quant-double": config.quant_double, "--quant-compute-dtype": config.quant_compute_dtype}
    marks |= {"--quant-skip": list(config.quant_skip)}
    marks |= {"--combine": config.combine, "--density": config.density, "--seed": config.seed}
    marks |= {"--digest": config.digest, "--hash-inputs": config.hash_inputs}
    return marks
