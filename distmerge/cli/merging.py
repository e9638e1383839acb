"""`merge`, `plan`, `inspect` and `demo`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from distmerge.cli.checking import render_audit
from distmerge.cli.loading import load
from distmerge.cli.options import FOLDER, config_of, merge_options, print_data


@click.command("merge")
@merge_options
def merge_command(as_json: bool, **values: Any) -> None:
    """Merge adapters into a base, on as many ranks as there are.

    The output appears whole and verified, or not at all. Interrupted, the same command resumes.

    \b
    Examples:
      distmerge merge --base llama-70b-nf4 --adapter my-qlora --output merged
      torchrun --nproc-per-node 8 -m distmerge merge --config recipe.yaml
    """
    config = config_of(values)
    fresh = load("distmerge.run")
    from distmerge.run import run
    from distmerge.world import launched_here

    result = run(config, fresh=fresh)
    if os.environ.get("RANK", "0") != "0" or launched_here():
        return
    if as_json:
        print_data(json.dumps({**asdict(result), "output": str(result.output)}))


@click.command("plan")
@merge_options
def plan_command(as_json: bool, **values: Any) -> None:
    """Show what a merge with the same options would do; write nothing.

    Reads headers, and the adapters whole. Refuses what merge would refuse, with the same words and exit code; that the
    disk is too small is a warning here.

    \b
    Example:
      distmerge plan --base llama-70b-nf4 --adapter my-qlora --output merged
    """
    config = config_of(values)
    load("distmerge.publish")
    import distmerge
    from distmerge.report.table import plan_facts, plan_table
    from distmerge.room import room_needed
    from distmerge.share import wanted_lanes
    from distmerge.world import default_nproc

    plan = distmerge.plan(config)
    nproc = config.nproc or default_nproc(config.device)
    lanes = wanted_lanes(nproc)
    facts = plan_facts(plan, config, wanted_lanes=lanes, room_nbytes=room_needed(plan), nproc=nproc)
    print_data(json.dumps(facts) if as_json else plan_table(facts))


@click.command("inspect")
@click.argument("path", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON on stdout.")
def inspect_command(path: Path, as_json: bool) -> None:
    """Show what a base, adapter or output folder holds, from headers alone.

    \b
    Example:
      distmerge inspect my-qlora
    """
    load("distmerge.inspection")
    from distmerge.inspection import inspect, render

    facts = inspect(path)
    print_data(json.dumps(facts) if as_json else render(facts))


@click.command("demo")
@click.option("--output", type=FOLDER, default="distmerge-demo", show_default=True, help="Folder for the demo.")
@click.option("--nproc", type=click.IntRange(1), default=2, show_default=True, help="Ranks to start.")
def demo_command(output: Path, nproc: int) -> None:
    """Make a small NF4 base and an adapter, merge them, verify the result; needs no network.

    \b
    Example:
      distmerge demo
    """
    load("distmerge.demo")
    from distmerge.demo import run_demo

    run_demo(output, nproc=nproc, say=print_data, verified=render_audit)
