"""What two runs must have alike, the inputs apart, to give the same bytes."""

from __future__ import annotations

from typing import Any

from distmerge import __version__
from distmerge.config import MergeConfig


def choices(config: MergeConfig, device: str) -> dict[str, Any]:
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
    marks |= {"--digest": config.digest}
    return marks
