"""`verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distmerge.cli.options import FOLDER, adapter_choices, print_data
from distmerge.errors import UsageError

if TYPE_CHECKING:
    from distmerge.audit import Audit


@click.command("verify")
@click.argument("output", type=FOLDER)
@click.option("--base", type=FOLDER, help="The base: recompute every tensor from it in float64.")
@click.option("--adapter", type=FOLDER, multiple=True, help="The adapters, in the order of the merge.")
@click.option("--weight", type=float, multiple=True, help="Their weights.  [default: 1]")
@click.option("--initial-adapter", type=str, multiple=True, help="What they began as, where the merge was given it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def verify_command(
    output: Path,
    base: Path | None,
    *,
    adapter: tuple[Path, ...],
    weight: tuple[float, ...],
    initial_adapter: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check a merged checkpoint: digests, headers, index and ledger.

    With --base and --adapter every merged tensor is recomputed in float64 and every other one compared with the base.

    \b
    Example:
      distmerge verify merged --base llama-70b-nf4 --adapter my-qlora
    """
    if (base is None) != (not adapter):
        raise UsageError("--base and --adapter belong together")
    if weight and len(weight) != len(adapter):
        raise UsageError(f"{len(adapter)} adapters but {len(weight)} weights")
    import distmerge

    found = distmerge.verify(output, base=base, adapters=adapter_choices(adapter, weight, initial_adapter))
    print_data(json.dumps(asdict(found)) if as_json else render_audit(found))


def render_audit(found: Audit) -> str:
    lines = [
        f"verified {found.num_files} files by sha256, {found.num_tensors} tensors by header, "
        f"{found.num_adapter_tensors} adapter tensors by ledger"
    ]
    if again := found.recomputed:
        lines.append(
            f"computed {again.num_tensors} merged tensors again in float64: largest error "
            f"{again.max_ulp_beyond_noise:.3f} ulp beyond float32 noise ({again.max_ulp:.3f} with it, "
            f"{again.worst_tensor}), {100 * again.share_not_nearest:.4f} % not the nearest value; all others equal"
        )
    return "\n".join(lines)
