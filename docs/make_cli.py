"""Writes docs/cli.md from the help texts of the commands; a test holds the page to them."""

from __future__ import annotations

from pathlib import Path

import click

from distmerge.cli.main import cli

_INTRO = """\
# Command line

Made from `--help` by `make docs`.

Data goes to stdout, everything else to stderr. Every option of `merge` and `plan` has a variable (`--max-shard-size` is
`DISTMERGE_MAX_SHARD_SIZE`; several adapters are separated by `:`) and a key in the YAML file that `--config` names
(`max-shard-size`). An option wins over its variable, a variable over the file, the file over the default.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | a bug: traceback |
| 2 | usage |
| 3 | input refused; nothing was written; the message names the keys or files |
| 4 | verification failed; nothing was published |
| 5 | the machine could not: no room, no memory, an I/O error, a rank or node lost |
| 75 | interrupted; the same command resumes |

torchrun exits with 1 for every failure of a rank; the code is in its summary and in `OUT.distmerge/status.json`.
"""


def page() -> str:
    """The whole page."""
    context = click.Context(cli, info_name="distmerge", terminal_width=100, **cli.context_settings)
    parts = [_INTRO, f"## distmerge\n\n```text\n{cli.get_help(context)}\n```\n"]
    for name, command in sorted(cli.commands.items()):
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100)
        parts.append(f"## distmerge {name}\n\n```text\n{command.get_help(inner)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page(), encoding="utf-8")
