"""The command `spade-fast check-data`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..arguments import counted
from ..progress import progress_bar
from . import options
from .tables import table_of

if TYPE_CHECKING:
    from ..data.check import Report

MOST_OUTSIDE = 10  # labels out of range that have a row in the table


def check_data(
    labels: Annotated[Path, options.folder("Folder of label maps.")],
    images: Annotated[Path, options.folder("Folder of their photographs.")],
    instances: Annotated[Path | None, options.folder("Folder of instance maps.")] = None,
    convention: options.Convention = "folder",
    palette: options.Palette = None,
    num_classes: options.NumClasses = None,
    dont_care: options.DontCare = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG to write: some photographs beside their label maps.")
    ] = None,
    all_faults: options.AllFaults = False,
) -> None:
    """Check a folder of label maps and photographs before training on it.

    Prints the faults, the share of the pixels that each class has, and the --num-classes and
    --dont-care that the label maps need. Exits with 1 if there is a fault, with 2 if the check
    cannot be made.
    """
    from .. import data as checking

    with options.refusals(check_data):
        report = checking.check_data(
            labels,
            images,
            instances,
            convention=convention,
            palette=None if palette is None else checking.read_palette(palette),
            num_classes=num_classes,
            dont_care=dont_care,
            sheet=sheet,
            progress=progress_bar,
        )
    console = Console()
    console.print(table_of_classes(report))
    typer.echo(
        "Pixels and share are of all label maps; images are the label maps that have the class."
    )
    if report.label_shift:
        typer.echo(f"A class is its number in the files minus {-report.label_shift}.")
    for note in report.notes:
        typer.echo(f"Note: {note}")
    typer.echo(
        f"{counted(report.pairs, 'pair')}; the shortest side of a photograph is"
        f" {counted(report.shortest, 'pixel')}."
    )
    options.report_faults(report.faults, all_faults, more=" Rows and columns are counted from 0.")
    typer.echo("Nothing is wrong.")


def table_of_classes(report: "Report") -> Table:
    """The pixels and images of each class in a checked data set."""
    table = table_of("class", "pixels", "share", "images", title="Classes that occur")
    pixels = max(1, sum(report.pixels.values()))
    for label, (count, images) in report.classes.items():
        name = str(label)
        if label == report.num_classes:
            name = f"don't care ({report.dont_care})"
        table.add_row(name, f"{count:,}", f"{count / pixels:.2%}", f"{images:,}")
    for label in report.outside[:MOST_OUTSIDE]:
        count = report.pixels[label]
        cells = f"{count:,}", f"{count / pixels:.2%}", f"{report.images[label]:,}"
        table.add_row(f"[red]{label}: out of range", *cells)
    if rest := sum(report.pixels[label] for label in report.outside[MOST_OUTSIDE:]):
        table.add_row("[red]others out of range", f"{rest:,}", f"{rest / pixels:.2%}", "")
    return table
