"""A 16-bit base taken as what bitsandbytes makes of it in 4 bits: the base that a QLoRA was trained on."""

from __future__ import annotations

from dataclasses import replace

from distmerge.adapter.naming.linears import packed_linears
from distmerge.adapter.tied import find_tie
from distmerge.checkpoint.base import Base
from distmerge.checkpoint.header import FLOATS
from distmerge.checkpoint.packing import Simulated, Stored
from distmerge.config import DTYPES, MergeConfig
from distmerge.errors import InputError, listing
from distmerge.outputs import Output, Outputs

_FROM_THE_BASE = ("kasa", "pissa", "olora")


def simulate(outputs: Outputs, base: Base, config: MergeConfig) -> Outputs:
    """`outputs` with every tensor of `base` that bitsandbytes would pack read through 4 bits, as `config` says.

    Whether an adapter changes it or not: training saw all of them so. Raises InputError where it is not known which
    these are, for a base that is packed already, and for adapters that begin with the factors of 16-bit weights.
    """
    if config.simulate_quant == "none":
        return outputs
    if base.packed:
        raise InputError(
            "is packed already: it holds what training saw",
            where=str(base.folder),
            hint="leave out --simulate-quant",
        )
    linears = packed_linears(base, config.quant_skip)
    if strange := [name for name in linears if base.tensors[name].dtype not in FLOATS]:
        raise InputError(f"bitsandbytes packs no tensors of such dtypes: {listing(strange)}", where=str(base.folder))
    if (tie := find_tie(base)) is not None and tie.head in linears:
        raise InputError(
            f"is tied to {tie.embedding}, and would no longer be: --quant-skip lets it be packed",
            where=tie.head,
            hint=f"--quant-skip {tie.head.removesuffix('.weight')} too",
        )
    found = {
        name: _simulated(output, config, transposed=linears[output.source.name])
        for name, output in outputs.tensors.items()
        if not output.origin and output.source.name in linears and output.source.numel
    }
    if not found:
        raise InputError(
            "has no linear layer that bitsandbytes would pack",
            where=str(base.folder),
            hint="leave out --simulate-quant, or name fewer modules with --quant-skip",
        )
    return replace(outputs, tensors={**outputs.tensors, **found})


def _simulated(output: Output, config: MergeConfig, *, transposed: bool) -> Output:
    for change in output.changes:
        if change.operator in _FROM_THE_BASE:
            raise InputError(
                f"{change.operator} takes its first factors from the base, which is rounded through 4 bits here",
                where=output.name,
                hint="leave out --simulate-quant",
            )
    return replace(output, source=_rounded(output.source, config, transposed=transposed))


def trained_base(base: Base, config: MergeConfig) -> Base:
    """`base` as training saw it by `config`: with every tensor that bitsandbytes would pack read through 4 bits, if
    that is asked for."""
    if config.simulate_quant == "none":
        return base
    linears = packed_linears(base, config.quant_skip)
    found = {
        name: _rounded(base.tensors[name], config, transposed=turned)
        for name, turned in linears.items()
        if base.tensors[name].numel
    }
    return replace(base, tensors={**base.tensors, **found})


def _rounded(stored: Stored, config: MergeConfig, *, transposed: bool) -> Stored:
    data = stored.data
    packing = Simulated(
        kind=config.simulate_quant,
        blocksize=config.quant_blocksize,
        double=config.quant_double,
        compute_dtype=DTYPES[config.quant_compute_dtype] or data.dtype,
        transposed=transposed,
        dtype=data.dtype,
        shape=data.shape,
    )
    return replace(stored, packing=packing)
