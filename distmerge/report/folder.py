"""A report on disk: one page and its figures, from the receipt of an output alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distmerge.checkpoint.base import RECEIPT, folder_name
from distmerge.errors import InputError, MachineError
from distmerge.receipt import Receipt, read_receipt
from distmerge.report.page import Picture, render_page
from distmerge.report.survey import errors, make_grid, spectra
from distmerge.report.verdict import Verdict, judge
from distmerge.runlog import RankLog, read_run_log
from distmerge.storage.files import io_errors, replace_file

if TYPE_CHECKING:
    from distmerge.report.figures import Drawing

PAGE = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A written report: its page, the figures beside it, and the verdict that it gives."""

    page: Path
    figures: tuple[Path, ...]
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figure:
    """A figure by the name of its PNG file, with what it shows and how to read it."""

    name: str
    title: str
    caption: str
    drawing: Drawing


def write_report(output: Path, folder: Path | None = None, *, run_log: Path | None = None) -> Report:
    """Writes report.html and PNG figures on the merged checkpoint `output` to `folder`, by default beside it with
    `-report` at the end of its name; what an earlier report wrote there is replaced.

    Raises InputError where `output` holds no receipt, where `folder` is a file or lies in `output`, and for a `run_log`
    that is none; MachineError where matplotlib is missing or the disk fails.
    """
    receipt = read_receipt(output) if output.is_dir() else None
    if receipt is None:
        raise InputError(f"holds no {RECEIPT}", where=str(output), hint="report takes the output of a merge")
    logs = read_run_log(run_log) if run_log is not None else ()
    folder = _checked(output, folder)
    verdict, figures = judge(receipt.tensors), draw(receipt, logs)
    pictures = [Picture(title=f.title, caption=f.caption, svg=f.drawing.svg) for f in figures]
    page = render_page(folder_name(output), receipt, verdict, pictures, logs)
    with io_errors(folder):
        folder.mkdir(exist_ok=True)
    for figure in figures:
        replace_file(folder / f"{figure.name}.png", figure.drawing.png)
    replace_file(folder / PAGE, page.encode())
    return Report(
        page=folder / PAGE, figures=tuple(folder / f"{figure.name}.png" for figure in figures), verdict=verdict
    )


def draw(receipt: Receipt, logs: tuple[RankLog, ...] = ()) -> list[_Figure]:
    """The figures for which the receipt has numbers. Raises MachineError where matplotlib is missing."""
    try:
        from distmerge.report import figures
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise MachineError(
            "matplotlib is not installed", where="report", hint="pip install 'distmerge[report]'"
        ) from None
    grid, values = make_grid(receipt.tensors), spectra(receipt.tensors)
    found: list[_Figure] = []

    def add(name: str, title: str, caption: str, drawing: Drawing) -> None:
        found.append(_Figure(name=name, title=title, caption=caption, drawing=drawing))

    if grid.is_layered:
        size = figures.heat_map(grid, lambda cell: cell.relative_delta, label="|D| / |W|", unit_range=False)
        add("change", "Size of the change", "|D| / |W| by layer and module; all experts of a layer are one.", size)
        left = figures.heat_map(grid, lambda cell: cell.worst, label="1 is all, 0 is nothing", unit_range=True)
        add("left", "What is left of it", "The lesser of cosine and share left; of experts the worst.", left)
        add("layers", "By layer", "Means over the modules of a layer, and from worst to best.", figures.by_layer(grid))
    elif grid.cells:
        add("left", "What is left", "The lesser of cosine and share left, by module.", figures.by_name(grid))
    if values:
        drawing = figures.spectrum(values)
        add("spectrum", "Singular values of the change", "Medians by module; steep: few directions matter.", drawing)
    for name, title, of in (
        ("quantization", "Error of the rounded base", errors_of_base(receipt)),
        ("packing", "Error of the packed output", errors_of_output(receipt)),
    ):
        if of:
            caption = "Median by module, as a multiple of |D|; right of the line it is larger than the change."
            add(name, title, caption, figures.error_lines(of, label="|error| / |D|"))
    if logs:
        caption = "Blue: segments done; green: kept from an earlier run; grey: waiting, and making files durable."
        add("ranks", "Time of each rank", caption, figures.time_lines(logs))
    return found


def errors_of_base(receipt: Receipt) -> Mapping[str, float]:
    return errors(receipt.tensors, lambda survival: survival.quant_error)


def errors_of_output(receipt: Receipt) -> Mapping[str, float]:
    return errors(receipt.tensors, lambda survival: survival.pack_error)


def _checked(output: Path, folder: Path | None) -> Path:
    """The folder for the report, which is not in the output."""
    whole = output.resolve()
    folder = folder if folder is not None else whole.with_name(f"{whole.name}-report")
    if whole in (folder.resolve(), *folder.resolve().parents):
        raise InputError("lies in the output", where=str(folder), hint="choose another --output; OUT stays as it is")
    if (folder.exists() and not folder.is_dir()) or not folder.parent.is_dir():
        raise InputError("is no folder" if folder.exists() else "its parent is not there", where=str(folder))
    return folder
