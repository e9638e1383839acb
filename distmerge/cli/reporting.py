"""`report`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from distmerge.cli.loading import load
from distmerge.cli.options import FOLDER, print_data


@click.command("report")
@click.argument("merged", metavar="OUT", type=FOLDER)
@click.option("--output", type=FOLDER, help="Folder for the report.  [default: OUT-report, beside OUT]")
@click.option("--run-log", type=FOLDER, help="What merge --run-log wrote: adds the time of each rank.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def report_command(merged: Path, output: Path | None, *, run_log: Path | None, as_json: bool) -> None:
    """Make a page with figures of what a merge changed and how much of it is left after rounding.

    Reads the receipt of OUT alone. Writes report.html, which needs no other file and no network, and its figures as PNG
    for the model card. Needs matplotlib: pip install 'distmerge[report]'.

    \b
    Example:
      distmerge report merged && open merged-report/report.html
    """
    load("distmerge.report.folder")
    from distmerge.report.folder import write_report

    made = write_report(merged, output, run_log=run_log)
    if as_json:
        facts = {**asdict(made.verdict), "level": made.verdict.level, "sentence": made.verdict.sentence}
        print_data(json.dumps({"page": str(made.page), "figures": [str(path) for path in made.figures], **facts}))
    else:
        print_data(f"{made.verdict.sentence}\n{made.page}  and {len(made.figures)} figures beside it")
