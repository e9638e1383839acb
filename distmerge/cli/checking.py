"""`verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distmerge.cli.loading import load
from distmerge.cli.options import FOLDER, NBYTES, adapter_choices, print_data
from distmerge.errors import UsageError, VerifyError
from distmerge.progress import Display

if TYPE_CHECKING:
    from distmerge.audit.findings import Audit, Depth, Probed, Recomputed


@click.command("verify")
@click.argument("output", type=FOLDER)
@click.option("--base", type=FOLDER, help="The base: hold the weights against it and the adapters, in float64.")
@click.option("--adapter", type=FOLDER, multiple=True, help="The adapters, in the order of the merge.")
@click.option("--weight", type=float, multiple=True, help="Their weights.  [default: 1]")
@click.option("--initial-adapter", type=str, multiple=True, help="What they began as, where the merge was given it.")
@click.option(
    "--depth",
    type=click.Choice(["digests", "sample", "probe", "full"]),
    help="How deep to look.  [default: digests without --base, full with it]",
)
@click.option("--sample-share", type=float, help="Share of each tensor that a sample looks at.  [default: 0.05]")
@click.option("--seed", type=int, help="What chooses the sample, and the vectors of a probe.  [default: 0]")
@click.option("--activations", type=FOLDER, help="A safetensors file of vectors (n, in) by module, for a probe.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or another accelerator type.")
@click.option("--memory-budget", type=NBYTES, default="2GiB", show_default=True, help="Working memory.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def verify_command(
    output: Path,
    base: Path | None,
    *,
    adapter: tuple[Path, ...],
    weight: tuple[float, ...],
    initial_adapter: tuple[str, ...],
    depth: Depth | None,
    sample_share: float | None,
    seed: int | None,
    activations: Path | None,
    device: str,
    memory_budget: int,
    as_json: bool,
) -> None:
    """Check a merged checkpoint: digests, headers, index and ledger.

    With --base and --adapter also every weight, in float64: full, in a sample of each tensor, or by a probe of what
    merged linears make of vectors. What is wrong is named, with what was done instead; exit code 4.

    \b
    Examples:
      distmerge verify merged
      distmerge verify merged --base llama-70b-nf4 --adapter my-qlora
      distmerge verify merged --base llama-70b-nf4 --adapter my-qlora --depth sample --sample-share 0.02
    """
    if (base is None) != (not adapter):
        raise UsageError("--base and --adapter belong together")
    if weight and len(weight) != len(adapter):
        raise UsageError(f"{len(adapter)} adapters but {len(weight)} weights")
    for name, value, depths in (
        ("--sample-share", sample_share, ("sample",)),
        ("--seed", seed, ("sample", "probe")),
        ("--activations", activations, ("probe",)),
    ):
        if value is not None and depth not in depths:
            raise UsageError(f"{name} is for --depth {' or '.join(depths)}")
    load("distmerge.audit.run")
    import distmerge

    try:
        found = distmerge.verify(
            output,
            base=base,
            adapters=adapter_choices(adapter, weight, initial_adapter),
            depth=depth,
            sample_share=0.05 if sample_share is None else sample_share,
            seed=seed or 0,
            activations=activations,
            device=device,
            memory_budget=memory_budget,
            display=Display(),
        )
    except VerifyError as error:
        if as_json:
            print_data(json.dumps({"findings": [asdict(finding) for finding in getattr(error, "findings", ())]}))
        raise
    print_data(json.dumps(asdict(found)) if as_json else render_audit(found))


def render_audit(found: Audit) -> str:
    """What an audit found, in lines for people."""
    lines = [
        f"verified {_render_files(found.digests)}, {found.num_tensors} tensors by header, "
        f"{found.num_adapter_tensors} adapter tensors by ledger"
    ]
    if found.digests.get("none") and not found.recomputed:
        lines.append("not looked at: the values of the weights, which have no digest (the merge had --digest none)")
    if found.num_inputs:
        lines.append(f"compared {found.num_inputs} files of base and adapters by sha256: all as they were merged")
    if found.probed:
        lines.append(_render_probed(found.probed))
    if found.recomputed and (found.recomputed.num_tensors or not found.probed):
        lines.append(_render_recomputed(found.recomputed, sampled=found.depth == "sample"))
    if found.num_norms:
        lines.append(f"computed {found.num_norms} norms of the ledger again: all as they stand there")
    return "\n".join(lines)


def _render_files(digests: dict[str, int]) -> str:
    words = {"none": "length alone"}
    parts = [f"{count} files by {words.get(kind, kind)}" for kind, count in digests.items()]
    return " and ".join(parts) or "no files"


def _render_recomputed(again: Recomputed, *, sampled: bool) -> str:
    part = f" (of all elements {100 * again.share:.1f} % were looked at)" if sampled else ""
    if again.num_packed == again.num_tensors:
        return (
            f"computed {again.num_tensors} merged tensors again in float64{part}: each element of the output is the "
            "nearest that the 4 bits of its block allow; all others equal"
        )
    return (
        f"computed {again.num_tensors} merged tensors again in float64{part}: largest error "
        f"{again.max_ulp_beyond_noise:.3f} ulp beyond float32 noise ({again.max_ulp:.4g} with it, "
        f"{again.worst_tensor}), {100 * again.share_not_nearest:.4f} % not the nearest value; all others equal"
    )


def _render_probed(probed: Probed) -> str:
    rest = len(probed.by_blocks) + len(probed.doubted)
    given = f", and the given ones of {len(probed.given)}" if probed.given else ""
    more = f"; {rest} more were compared element by element" if rest else ""
    return (
        f"probed   {probed.num_tensors} merged linears with {probed.num_vectors} random vectors{given}: "
        f"largest error {probed.relative_error:.2e} of the output ({probed.worst_tensor}), "
        f"{100 * probed.bound_used:.0f} % of what rounding may make of it; changed by 1 +- {probed.max_deviation:.1e} "
        f"times the delta{more}"
    )
