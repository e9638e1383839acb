"""The command line: parse, call one function, render, map errors to exit codes. Imports no torch at start."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distmerge import __version__
from distmerge.config import (
    COMBINE,
    DTYPES,
    EXPERT_B_ORDERS,
    LISTS,
    AdapterChoice,
    MergeConfig,
    parse_nbytes,
    read_recipe,
)
from distmerge.errors import DistmergeError, MachineError, PeerFailed, UsageError
from distmerge.parent import die_with_parent, launched

if TYPE_CHECKING:
    from distmerge.audit import Audit

_FOLDER = click.Path(path_type=Path)


class _NBytes(click.ParamType[int]):
    """A size in bytes, written as 5GB or 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_nbytes(str(value))
        except UsageError as error:
            return self.fail(str(error), param, ctx)


class _Nproc(click.ParamType[int | None]):
    """A number of ranks, or `auto`."""

    name = "n|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto" or value is None:
            return None
        if str(value).isdecimal() and 0 < int(value) < 1 << 20:
            return int(value)
        return self.fail(f"{value!r} is neither a positive number nor 'auto'", param, ctx)


def _load_recipe(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        with _said_by_rank_0():
            recipe = read_recipe(value, recipe_types(ctx.command))
        for name in LISTS:
            if name in recipe and not isinstance(recipe[name], list):
                recipe[name] = [recipe[name]]
        if "json" in recipe:
            recipe["as_json"] = recipe.pop("json")
        ctx.default_map = recipe


def recipe_types(command: click.Command) -> dict[str, tuple[type, ...]]:
    """The types that a YAML file may give to each option of `command`, by the option's name with underscores."""
    types: dict[str, tuple[type, ...]] = {}
    for option in command.params:
        if isinstance(option, click.Option) and option.name not in ("config", "help"):
            name = option.opts[0].lstrip("-").replace("-", "_")
            types[name] = (bool,) if option.is_flag else _YAML_TYPES.get(type(option.type), (str,))
    return types


_YAML_TYPES: dict[type, tuple[type, ...]] = {
    _NBytes: (str, int),
    _Nproc: (str, int),
    click.types.FloatParamType: (float, int),
    click.types.IntParamType: (int,),
}


def _option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option with a `DISTMERGE_` variable of the same name."""
    variable = "DISTMERGE_" + names[0].lstrip("-").split("/")[0].replace("-", "_").upper()
    return click.option(*names, envvar=variable, **settings)


def _merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `merge` and `plan` share: everything that decides the output."""
    for option in reversed([*_input_options(), *_run_options()]):
        command = option(command)
    return command


def _input_options() -> list[Callable[[Any], Any]]:
    return [
        _option("--base", type=_FOLDER, required=True, help="Folder of the checkpoint that is merged into."),
        _option("--adapter", type=_FOLDER, multiple=True, required=True, help="Folder of an adapter; repeatable."),
        _option("--weight", type=float, multiple=True, help="Factor of the adapter at the same place.  [default: 1]"),
        _option(
            "--combine",
            type=click.Choice(COMBINE),
            default="sum",
            show_default=True,
            help="How the adapters' deltas become one; all but sum need --density.",
        ),
        _option("--density", type=float, help="Share of each delta's elements that is kept, above 0 and up to 1."),
        _option("--seed", type=int, default=0, show_default=True, help="What chance goes by in dare_*."),
        _option("--lora-alpha", type=float, help="Replaces lora_alpha of the adapters' configurations."),
        _option("--use-rslora/--no-use-rslora", default=None, help="Replaces use_rslora of the configurations."),
        _option(
            "--initial-adapter",
            type=str,
            multiple=True,
            help="The adapter at the same place as it was before training, for PiSSA, CorDA, LoRA-GA; '' for none.",
        ),
        _option("--map", multiple=True, help="Rename adapter parameters: 'REGEX=>REPLACEMENT'; repeatable, in order."),
        _option(
            "--expert-b-order",
            type=click.Choice(EXPERT_B_ORDERS),
            default="auto",
            show_default=True,
            help="Columns of experts' lora_B: PEFT's order, or expert by expert (Unsloth's kernels).",
        ),
        _option("--allow-pickle", is_flag=True, help="Read adapters in .bin or .pt files, in a process of their own."),
    ]


def _run_options() -> list[Callable[[Any], Any]]:
    return [
        _option("--output", type=_FOLDER, required=True, help="Folder of the merged checkpoint; must not exist yet."),
        _option("--nproc", type=_Nproc(), help="Ranks to start on this machine; auto: one for each accelerator."),
        _option("--device", default="auto", show_default=True, help="auto, cpu, cuda or another accelerator type."),
        _option(
            "--dtype",
            type=click.Choice(list(DTYPES)),
            default="auto",
            show_default=True,
            help="Floats of the output; auto keeps each tensor's own.",
        ),
        _option(
            "--max-shard-size",
            type=_NBytes(),
            help="Largest output file, such as 5GB.  [default: the base's own files; 5GB for a packed base]",
        ),
        _option(
            "--memory-budget",
            type=_NBytes(),
            default="2GiB",
            show_default=True,
            help="Working memory of each rank, beside what torch takes.",
        ),
        _option("--allow-zero-delta", is_flag=True, help="Merge even if every delta is zero."),
        _option("--overwrite", is_flag=True, help="Replace an output that an earlier merge wrote."),
        _option("--timeout", type=float, default=600.0, show_default=True, help="Seconds until a silent rank is lost."),
        click.option(
            "--config",
            type=_FOLDER,
            envvar="DISTMERGE_CONFIG",
            is_eager=True,
            expose_value=False,
            callback=_load_recipe,
            help="YAML file with any of these options; options and variables win over it.",
        ),
        _option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    ]


@contextlib.contextmanager
def _said_by_rank_0() -> Iterator[None]:
    """What every rank finds wrong with the command line, one rank says."""
    try:
        yield
    except UsageError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(UsageError.exit_code)
        raise


def _config(values: dict[str, Any]) -> MergeConfig:
    with _said_by_rank_0():
        return _checked_config(values)


def _checked_config(values: dict[str, Any]) -> MergeConfig:
    adapters, weights = values.pop("adapter"), values.pop("weight")
    if weights and len(weights) != len(adapters):
        raise UsageError(
            f"{len(adapters)} adapters but {len(weights)} weights", hint="give each --adapter its --weight, or none"
        )
    return MergeConfig(adapters=_choices(adapters, weights, values.pop("initial_adapter")), **values)


def _choices(
    adapters: tuple[Path, ...], weights: tuple[float, ...], initial: tuple[str, ...]
) -> tuple[AdapterChoice, ...]:
    if initial and len(initial) != len(adapters):
        raise UsageError(
            f"{len(adapters)} adapters but {len(initial)} initial adapters",
            hint="give each --adapter its --initial-adapter ('' for none), or none at all",
        )
    befores = [Path(name) if name else None for name in initial] or [None] * len(adapters)
    chosen = zip(adapters, weights or [1.0] * len(adapters), befores, strict=True)
    return tuple(AdapterChoice(folder=f, weight=w, initial=i) for f, w, i in chosen)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="distmerge")
def cli() -> None:
    """Merge LoRA and QLoRA adapters into sharded Hugging Face checkpoints, file to file.

    Exit codes: 0 done, 1 a bug, 2 usage, 3 input refused, 4 verification failed, 5 the machine could not,
    75 interrupted (the same command resumes).
    """


@cli.command("merge")
@_merge_options
def merge_command(as_json: bool, **values: Any) -> None:
    """Merge adapters into a base, on as many ranks as there are.

    The output appears whole and verified, or not at all. Interrupted, the same command resumes.

    \b
    Examples:
      distmerge merge --base llama-70b-nf4 --adapter my-qlora --output merged
      torchrun --nproc-per-node 8 -m distmerge merge --config recipe.yaml
    """
    config = _config(values)
    from distmerge.run import run  # torch takes seconds
    from distmerge.world import launched_here

    result = run(config)
    if os.environ.get("RANK", "0") != "0" or launched_here():
        return
    if as_json:
        _print(json.dumps({**asdict(result), "output": str(result.output)}))


@cli.command("plan")
@_merge_options
def plan_command(as_json: bool, **values: Any) -> None:
    """Show what a merge with the same options would do; write nothing.

    Reads headers, and the adapters whole. Refuses what merge would refuse, with the same words and exit code; that the
    disk is too small is a warning here.

    \b
    Example:
      distmerge plan --base llama-70b-nf4 --adapter my-qlora --output merged
    """
    config = _config(values)
    import distmerge
    from distmerge.report.table import plan_facts, plan_table
    from distmerge.share import wanted_lanes
    from distmerge.work import room_needed
    from distmerge.world import default_nproc

    plan = distmerge.plan(config)
    nproc = config.nproc or default_nproc(config.device)
    lanes = wanted_lanes(nproc)
    facts = plan_facts(plan, config, wanted_lanes=lanes, room_nbytes=room_needed(plan), nproc=nproc)
    _print(json.dumps(facts) if as_json else plan_table(facts))


@cli.command("verify")
@click.argument("output", type=_FOLDER)
@click.option("--base", type=_FOLDER, help="The base: recompute every tensor from it in float64.")
@click.option("--adapter", type=_FOLDER, multiple=True, help="The adapters, in the order of the merge.")
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

    found = distmerge.verify(output, base=base, adapters=_choices(adapter, weight, initial_adapter))
    _print(json.dumps(asdict(found)) if as_json else _render_audit(found))


@cli.command("inspect")
@click.argument("path", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON on stdout.")
def inspect_command(path: Path, as_json: bool) -> None:
    """Show what a base, adapter or output folder holds, from headers alone.

    \b
    Example:
      distmerge inspect my-qlora
    """
    from distmerge.inspection import inspect, render

    facts = inspect(path)
    _print(json.dumps(facts) if as_json else render(facts))


@cli.command("demo")
@click.option("--output", type=_FOLDER, default="distmerge-demo", show_default=True, help="Folder for the demo.")
@click.option("--nproc", type=click.IntRange(1), default=2, show_default=True, help="Ranks to start.")
def demo_command(output: Path, nproc: int) -> None:
    """Make a small NF4 base and an adapter, merge them, verify the result; needs no network.

    \b
    Example:
      distmerge demo
    """
    from distmerge.demo import run_demo

    run_demo(output, nproc=nproc, say=_print, verified=_render_audit)


def _render_audit(found: Audit) -> str:
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


def _print(text: str) -> None:
    """Data on stdout. A reader that has left early is no error; a full disk is."""
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise MachineError(f"cannot be written ({error.strerror})", where="stdout") from None


def _open_streams() -> None:
    """Gives a process that was started with closed standard streams empty ones, so that no file takes their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def main() -> None:
    """Runs the command line and exits with the code of what happened."""
    _open_streams()
    if launched():
        die_with_parent()  # before the seconds that importing torch takes
    quiet = os.environ.get("RANK", "0") != "0"
    try:
        cli.main(standalone_mode=False)
        code = 0
    except click.exceptions.Abort:
        code = 75
    except click.ClickException as error:
        if not quiet:
            error.show()
        code = 2
    except PeerFailed as error:
        code = error.exit_code
    except DistmergeError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 75
    sys.exit(code)
