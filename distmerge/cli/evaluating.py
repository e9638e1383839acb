"""`evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distmerge.cli.options import FOLDER, NBYTES, adapter_choices, print_data
from distmerge.errors import UsageError
from distmerge.progress import Display

if TYPE_CHECKING:
    from distmerge.evaluation.run import Evaluation


@click.command("evaluate")
@click.argument("output", type=FOLDER)
@click.option("--base", type=FOLDER, required=True, help="The base of the merge.")
@click.option("--adapter", type=FOLDER, multiple=True, required=True, help="Its adapters, in their order.")
@click.option("--weight", type=float, multiple=True, help="Their weights.  [default: 1]")
@click.option("--initial-adapter", type=str, multiple=True, help="What they began as, where the merge was given it.")
@click.option("--text", type=FOLDER, required=True, help="A .txt file, or a .jsonl file with a field `text`.")
@click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens to predict.")
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a window.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Floats of both models.",
)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or another accelerator type.")
@click.option(
    "--memory-budget",
    type=NBYTES,
    default="8GiB",
    show_default=True,
    help="Weights in memory at once; what does not fit is read from the disk.",
)
@click.option("--scratch", type=FOLDER, help="Folder for temporary files.  [default: the system's]")
@click.option("--max-kl", type=float, help="Largest mean KL, in nats, that passes; exit code 4 beyond.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def evaluate_command(
    output: Path,
    *,
    base: Path,
    adapter: tuple[Path, ...],
    weight: tuple[float, ...],
    initial_adapter: tuple[str, ...],
    text: Path,
    max_tokens: int,
    context: int,
    dtype: str,
    device: str,
    memory_budget: int,
    scratch: Path | None,
    max_kl: float | None,
    as_json: bool,
) -> None:
    """Compare a merged model with the unmerged one on a text: perplexity, KL, most likely tokens.

    The unmerged model is the base as training saw it, with the adapters beside it, loaded by PEFT. The models are
    loaded one after the other. Needs transformers, PEFT and accelerate: pip install 'distmerge[evaluate]'.

    \b
    Example:
      distmerge evaluate merged --base llama-70b-nf4 --adapter my-qlora --text validation.jsonl --max-kl 1e-3
    """
    if weight and len(weight) != len(adapter):
        raise UsageError(f"{len(adapter)} adapters but {len(weight)} weights")
    import distmerge

    found = distmerge.evaluate(
        output,
        base=base,
        adapters=adapter_choices(adapter, weight, initial_adapter),
        text=text,
        max_tokens=max_tokens,
        context=context,
        dtype=dtype,
        device=device,
        memory_budget=memory_budget,
        scratch=scratch,
        max_kl=max_kl,
        display=Display(),
    )
    print_data(json.dumps(asdict(found)) if as_json else render_evaluation(found))


def render_evaluation(found: Evaluation) -> str:
    """What an evaluation found, in lines for people; the last one is the verdict."""
    verb = "equals" if found.is_equal else "differs from"
    return "\n".join(
        (
            f"scored   {found.num_tokens} tokens in {found.num_windows} windows, in {found.dtype}",
            f"perplexity {found.merged_perplexity:.4f} merged, {found.unmerged_perplexity:.4f} unmerged; "
            f"largest KL of a token {found.max_kl:.2e}",
            f"merged {verb} unmerged: mean KL {found.mean_kl:.2e}, top-1 {100 * found.top1_agreement:.2f} %",
        )
    )
