"""The page of a report: HTML that holds all it needs, and asks nobody for anything."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from typing import Any

from distmerge.errors import printable
from distmerge.progress import clock, gigabytes
from distmerge.receipt import Receipt, hashed
from distmerge.report.profile import HEAD, profile_rows
from distmerge.report.verdict import Verdict
from distmerge.runlog import RankLog

# Should a name ever get past the escaping: nothing is fetched, nothing is sent.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_COLUMNS = (
    "tensor",
    "elements",
    "|D|/|W|",
    "share left",
    "cosine",
    "noise",
    "unchanged",
    "largest |D|",
)
_PACKED_COLUMNS = ("|packing error|/|W|", "with plain scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure of the page: what it shows, how to read it, and its <svg> element."""

    title: str
    caption: str
    svg: str


def render_page(
    name: str, receipt: Receipt, verdict: Verdict, pictures: Sequence[Picture], logs: Sequence[RankLog]
) -> str:
    """The page on the output called `name`. Everything that comes from inputs is escaped."""
    title = f"{printable(name)}: what the merge did"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_resource('page.css')}</style></head><body>",
        f"<h1>{escape(printable(name))}</h1>",
        f'<p class="soft">{_subtitle(receipt)}</p>',
        _strip(receipt, verdict),
        "<h2>What is left of the change</h2>" if pictures else "",
        f"<p>{_reading()}</p>" if pictures else "",
        '<div class="figures">' if pictures else "",
        *(_figure(picture) for picture in pictures),
        "</div>" if pictures else "",
        _ranks(logs),
        _inputs(receipt),
        _tensors(receipt),
        f"<script>{_resource('page.js')}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _subtitle(receipt: Receipt) -> str:
    adapters = [printable(adapter.name) for adapter in receipt.adapters if not adapter.initial]
    names = ", ".join(adapters[:4]) + (f" and {len(adapters) - 4} more" if len(adapters) > 4 else "")
    environment = receipt.environment
    made = f"distmerge {environment.get('distmerge', '?')}, torch {environment.get('torch', '?')}"
    text = f"{printable(receipt.base.name)} with {names} merged in, by {made} on {environment.get('device', '?')}"
    return escape(printable(text, 1000))


def _strip(receipt: Receipt, verdict: Verdict) -> str:
    ledger, wanted = len(receipt.ledger), sum(adapter.num_tensors for adapter in receipt.adapters)
    applied = "adapter tensors, each applied exactly once" if ledger == wanted else f"of {wanted} adapter tensors"
    unchanged = "" if verdict.unchanged is None else f", {100 * verdict.unchanged:.0f} % of their elements unchanged"
    advice = f"To keep it: {verdict.remedy}." if verdict.is_lost else _size(verdict)
    head, _, rest = verdict.sentence.partition(": ")
    tiles = [
        f'<div class="tile verdict {verdict.level}"><b>{escape(head.removesuffix("."))}</b>'
        f"<span>{_with_options((rest[:1].upper() + rest[1:] + ' ' + advice).strip())}</span></div>",
        _tile(str(ledger), applied),
        _tile(str(verdict.num_changed), f"tensors changed{unchanged}"),
        _tile(*_files(receipt)),
        _packing(verdict),
    ]
    return f'<div class="strip">{"".join(tiles)}</div>'


def _files(receipt: Receipt) -> tuple[str, str]:
    nbytes = gigabytes(sum(file.bytes for file in receipt.files.values()))
    number, _, words = hashed(receipt.files.values()).partition(" ")
    return number, f"{words}, {nbytes}"


def _packing(verdict: Verdict) -> str:
    if verdict.pack_error is None:
        return ""
    plain = verdict.plain_pack_error
    other = "" if plain in (None, verdict.pack_error) else f"; with plain scales {100 * (plain or 0):.3g} %"
    return _tile(f"{100 * verdict.pack_error:.3g} %", f"of |W|: what packing moves the changed weights by{other}")


def _size(verdict: Verdict) -> str:
    return (
        "" if verdict.relative_delta is None else f"It is {100 * verdict.relative_delta:.2g} % as large as the weights."
    )


def _with_options(text: str) -> str:
    """`text`, escaped, with options of the command line kept in one piece."""
    return re.sub(r"--[a-z-]+( float32)?", r"<code>\g<0></code>", escape(text))


def _tile(number: str, words: str) -> str:
    return f'<div class="tile"><b>{escape(number)}</b><span>{escape(words)}</span></div>'


def _reading() -> str:
    return (
        "W are the values of the base, D is what was added to them in float32, A what of it is left once each element "
        "is rounded. <em>Share left</em> is the part of D that A still has, along D; the <em>cosine</em> falls with "
        "the noise that rounding adds. That many elements are unchanged is normal in 16 bits."
    )


def _figure(picture: Picture) -> str:
    return (
        f'<figure role="img" aria-label="{escape(picture.title)}"><h3>{escape(picture.title)}</h3>'
        f"<figcaption>{escape(picture.caption)}</figcaption>{picture.svg}</figure>"
    )


def _ranks(logs: Sequence[RankLog]) -> str:
    if not logs:
        return ""
    rows = [
        (
            log.rank,
            printable(log.host),
            printable(log.device),
            len(log.spans),
            gigabytes(log.nbytes),
            clock(log.seconds),
            f"{100 * log.busy_seconds / log.seconds:.0f} %" if log.seconds > 0 else "",
        )
        for log in logs
    ]
    head = ("rank", "host", "device", "segments", "output", "time", "of it busy")
    times = profile_rows(logs)
    return (
        f'<h2>Ranks</h2><div class="wide">{_table(head, rows, numbers={3, 4, 5, 6})}</div>'
        + ("<p>Seconds of each step, over all lanes of a rank, and GB of output a second of it.</p>" if times else "")
        + (f'<div class="wide">{_table(HEAD, times, numbers=set(range(1, len(HEAD))))}</div>' if times else "")
    )


def _inputs(receipt: Receipt) -> str:
    rows = [
        (
            printable(adapter.name) + (" (as it began, taken off)" if adapter.initial else ""),
            adapter.tuner,
            f"{adapter.weight:g}",
            adapter.num_tensors,
            adapter.fingerprint,
        )
        for adapter in receipt.adapters
    ]
    adapters = _table(
        ("adapter", "kind", "weight", "tensors", "SHA-256 of its weights"), rows, numbers={2, 3}, digests=4
    )
    options = {key.replace("_", "-"): _said(value) for key, value in asdict(receipt.options).items()}
    facts = {
        "base": receipt.base.name,
        "base files": receipt.base.fingerprint,
        "plan": receipt.plan,
        **receipt.environment,
    }
    return (
        f'<h2>Inputs and options</h2><div class="wide">{adapters}</div><div class="facts">'
        f"{_pairs(facts)}{_pairs(options)}</div>"
    )


def _said(value: Any) -> str:
    if value is None or value == ():
        return "not given"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _pairs(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{escape(printable(key))}</th><td>{escape(printable(str(value), 1000))}</td></tr>"
        for key, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _table(
    head: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: set[int], digests: int | None = None
) -> str:
    def line(tag: str, cells: Sequence[object]) -> str:
        kinds = ["n" if place in numbers else "name" if place == digests else "" for place in range(len(cells))]
        marks = [f' class="{kind}"' if kind else "" for kind in kinds]
        shown = (f"<{tag}{m}>{escape(str(cell))}</{tag}>" for m, cell in zip(marks, cells, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    return f"<table><thead>{line('th', head)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"


def _tensors(receipt: Receipt) -> str:
    """The table of all tensors that the receipt lists, as data that the page's script shows."""
    came: dict[str, list[str]] = {}
    for key, entry in receipt.ledger.items():
        for name in entry.tensors:
            came.setdefault(name, []).append(printable(key))
    packed = any(found.survival.pack_error is not None for found in receipt.tensors.values() if found.survival)
    columns = (*_COLUMNS, *(_PACKED_COLUMNS * packed), "adapter tensors")
    rows: list[list[Any]] = []
    for name in dict.fromkeys([*receipt.tensors, *came]):
        found = receipt.tensors.get(name)
        one = found.survival if found is not None else None
        numbers: list[float | None] = [None] * (len(columns) - 3)
        if one is not None:
            relative = _share(one.delta_norm, one.base_norm)
            numbers = [relative, one.kept, one.cosine, one.noise, one.unchanged, one.largest_delta]
            if packed:
                numbers += [_share(error, one.base_norm) for error in (one.pack_error, one.plain_pack_error)]
        rows.append([printable(name), found.numel if found else None, *numbers, came.get(name, [])])
    if not rows:
        return ""
    data = json.dumps(rows, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    marks = ["" if place == 0 else ' class="n"' for place in range(len(columns))]
    heads = "".join(
        f'<th{mark}><button type="button">{escape(name)}</button></th>'
        for mark, name in zip(marks, columns, strict=True)
    )
    return (
        '<h2>Tensors</h2><div id="tools"><input id="filter" type="search" placeholder="Filter: parts of names" '
        'aria-label="Filter by parts of names"><span id="count" class="soft" role="status"></span></div>'
        f'<div class="wide"><table id="table"><thead><tr>{heads}</tr></thead><tbody></tbody></table></div>'
        '<button id="more" type="button">Show more</button>'
        "<noscript><p>The table needs a script; merge_receipt.json holds the same.</p></noscript>"
        f'<script type="application/json" id="rows">{data}</script>'
    )


def _share(norm: float | None, whole: float) -> float | None:
    return norm / whole if norm is not None and whole else None


def _resource(name: str) -> str:
    return resources.files("distmerge.report").joinpath(name).read_text(encoding="utf-8")
