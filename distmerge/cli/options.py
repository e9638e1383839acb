"""The options of the command line: the same names as DISTMERGE_ variables and in a YAML file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from distmerge.config import (
    COMBINE,
    DIGESTS,
    DTYPES,
    EXPERT_B_ORDERS,
    LISTS,
    QUANTIZE,
    QUANTIZE_MODES,
    SIMULATE_QUANT,
    AdapterChoice,
    MergeConfig,
    parse_nbytes,
    read_recipe,
)
from distmerge.errors import MachineError, UsageError

FOLDER = click.Path(path_type=Path)


class _NBytes(click.ParamType[int]):
    """A size in bytes, written as 5GB or 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_nbytes(str(value))
        except UsageError as error:
            return self.fail(str(error), param, ctx)


NBYTES = _NBytes()


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


def merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `merge` and `plan` share: everything that decides the output."""
    for option in reversed([*_input_options(), *_quant_options(), *_output_options(), *_run_options()]):
        command = option(command)
    return command


def _input_options() -> list[Callable[[Any], Any]]:
    return [
        _option("--base", type=FOLDER, required=True, help="Folder of the checkpoint that is merged into."),
        _option("--adapter", type=FOLDER, multiple=True, required=True, help="Folder of an adapter; repeatable."),
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


def _quant_options() -> list[Callable[[Any], Any]]:
    return [
        _option(
            "--simulate-quant",
            type=click.Choice(SIMULATE_QUANT),
            default="none",
            show_default=True,
            help="Round a 16-bit base through 4 bits first, as bitsandbytes packs it: what a QLoRA was trained on.",
        ),
        _option(
            "--quant-blocksize",
            type=int,
            default=64,
            show_default=True,
            help="Elements of a 4-bit block that share a scale. This and the other --quant-... options hold for "
            "--simulate-quant and --quantize alike.",
        ),
        _option(
            "--quant-double/--no-quant-double",
            default=True,
            show_default=True,
            help="Scales in 8 bits themselves (double quantization).",
        ),
        _option(
            "--quant-compute-dtype",
            type=click.Choice(list(DTYPES)),
            default="auto",
            show_default=True,
            help="What training rounded unpacked weights to; auto is each tensor's own.",
        ),
        _option(
            "--quant-skip",
            multiple=True,
            help="Module that stays as it is, by name, end of a name or pattern; repeatable.  [default: the head, and "
            "what is tied]",
        ),
    ]


def _output_options() -> list[Callable[[Any], Any]]:
    return [
        _option("--output", type=FOLDER, required=True, help="Folder of the merged checkpoint; must not exist yet."),
        _option(
            "--dtype",
            type=click.Choice(list(DTYPES)),
            default="auto",
            show_default=True,
            help="Floats of the output; auto keeps each tensor's own.",
        ),
        _option(
            "--quantize",
            type=click.Choice(QUANTIZE),
            default="none",
            show_default=True,
            help="Pack the output's linears in 4 bits, as bitsandbytes does; much of a tune can be lost.",
        ),
        _option(
            "--quantize-mode",
            type=click.Choice(QUANTIZE_MODES),
            default="plain",
            show_default=True,
            help="Scales of packed blocks: their largest magnitudes, or fitted to make the error small.",
        ),
        _option(
            "--keep-quantized",
            is_flag=True,
            help="Leave packed tensors that nothing changes packed; default is to dequantize all of them.",
        ),
        _option(
            "--max-shard-size",
            type=_NBytes(),
            help="Largest output file, such as 5GB.  [default: the base's own files; 5GB for a packed base]",
        ),
        _option(
            "--digest",
            type=click.Choice(DIGESTS),
            default="sha256",
            show_default=True,
            help="What is computed of each weight file: sha256 or xxh3 of what is read back from it, crc32 of what was "
            "written to it; with none, nothing, and an interrupted merge keeps only files that were whole.",
        ),
        _option(
            "--hash-inputs",
            is_flag=True,
            help="Record the SHA-256 of every file of base and adapters; refuse one that the Hub has another of.",
        ),
        _option(
            "--read-back", is_flag=True, help="Compare what storage, not the page cache, gives back of weight files."
        ),
    ]


def _run_options() -> list[Callable[[Any], Any]]:
    return [
        _option("--nproc", type=_Nproc(), help="Ranks to start on this machine; auto: one for each accelerator."),
        _option("--device", default="auto", show_default=True, help="auto, cpu, cuda or another accelerator type."),
        _option(
            "--memory-budget",
            type=_NBytes(),
            default="2GiB",
            show_default=True,
            help="Working memory of each rank, beside what torch takes.",
        ),
        _option("--allow-zero-delta", is_flag=True, help="Merge even if every delta is zero."),
        _option("--overwrite", is_flag=True, help="Replace an output that an earlier merge wrote."),
        _option("--run-log", type=FOLDER, help="File for what each rank did and when, as JSON lines, for report."),
        _option("--profile", is_flag=True, help="Say at the end where the time of each rank went."),
        _option("--timeout", type=float, default=600.0, show_default=True, help="Seconds until a silent rank is lost."),
        click.option(
            "--config",
            type=FOLDER,
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


def config_of(values: dict[str, Any]) -> MergeConfig:
    with _said_by_rank_0():
        return _checked_config(values)


def _checked_config(values: dict[str, Any]) -> MergeConfig:
    adapters, weights = values.pop("adapter"), values.pop("weight")
    if weights and len(weights) != len(adapters):
        raise UsageError(
            f"{len(adapters)} adapters but {len(weights)} weights", hint="give each --adapter its --weight, or none"
        )
    return MergeConfig(adapters=adapter_choices(adapters, weights, values.pop("initial_adapter")), **values)


def adapter_choices(
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


def print_data(text: str) -> None:
    """Data on stdout. A reader that has left early is no error; a full disk is."""
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise MachineError(f"cannot be written ({error.strerror})", where="stdout") from None
