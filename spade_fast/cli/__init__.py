"""The command `spade-fast`."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from .. import __version__, backends
from .. import check as checking
from ..kernels import cpu_backend
from .train import command as train

app = typer.Typer(help="The SPADE layer, fast.", no_args_is_help=True, add_completion=False)
app.command("train")(train())


@app.callback()
def commands():
    """The SPADE layer, fast."""  # typer drops a lone command's name without this callback


@app.command()
def info():
    """Which backends run here and why not the others, versions, CPU features, devices."""
    console = Console()
    table = table_of("backend", "runs", "why not", title="Backends, best first")
    for status in backends():
        table.add_row(status.name, "yes" if status.runs else "no", escape(status.reason))
    console.print(table)
    table = table_of("", "", title="This machine", show_header=False)
    for name, fact in facts().items():
        table.add_row(name, escape(fact))
    console.print(table)


@app.command()
def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION", help="Returns (model, arguments); MODULE as for import."
        ),
    ],
    seconds: Annotated[float, typer.Option(min=0, help="How long the two are timed for.")] = 10,
):
    """Convert a model, compare outputs and gradients with its own, and time both. Exits with 1
    where they differ, where nothing is converted, or where the model itself fails.
    """
    try:
        try:
            model, arguments = checking.load(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="MODULE:FUNCTION") from None
        result = checking.check(model, arguments, seconds)
    except checking.Failed as failure:
        typer.echo(failure, err=True)
        raise typer.Exit(1) from None
    console = Console()
    console.print(result.report)
    if not result.report.converted:
        console.print("Nothing was converted: there is nothing to compare and to time.")
        raise typer.Exit(1)
    table = table_of("", "relative error in float64", title="Beside the model's own")
    for what, error in result.errors.items():
        colour = "green" if error <= checking.AGREES else "red"
        table.add_row(escape(what), f"[{colour}]{error:.1e}")
    console.print(table)
    table = table_of(
        "", "its own", "converted", "times as fast", "γ and β at", title="Time of a call"
    )
    for mode, (own, fast) in result.seconds.items():
        table.add_row(
            mode,
            f"{own * 1e3:.1f} ms",
            f"{fast * 1e3:.1f} ms",
            f"{own / fast:.2f}" if result.agrees else "[red]differs",
            ", ".join(f"{way}: {count}" for way, count in sorted(result.ways[mode].items()))
            or "as its own",
        )
    console.print(table)
    if any(ways["pixels"] for ways in result.ways.values()):
        console.print(
            "Pixels: the calls of SPADEs in which γ and β were computed at every pixel, because of"
            " what the layers are, or of the condition: dense, or small. For a model of label maps"
            " give arguments with label maps: random numbers have no windows that repeat."
        )
    if not result.agrees:
        raise typer.Exit(1)


@app.command("check-data")
def check_data(
    labels: Annotated[Path, typer.Option(help="Folder of label maps.")],
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    instances: Annotated[Path | None, typer.Option(help="Folder of instance maps.")] = None,
    convention: Annotated[
        str, typer.Option(help="folder, coco_stuff, ade20k or cityscapes.")
    ] = "folder",
    palette: Annotated[
        Path | None, typer.Option(help="Of colour-coded maps: a line R G B CLASS per colour.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help='Without "don\'t care".')] = None,
    dont_care: Annotated[
        int | None, typer.Option(help="The number in the maps that is no class.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="A PNG to write: photographs beside their labels.")
    ] = None,
):
    """Read label maps and photographs before they are trained on: a line for each fault, what the
    classes take, and which --num-classes and --dont-care they need. Exits with 1 where something
    is wrong.
    """
    try:
        from .. import data

        report = data.check_data(
            labels,
            images,
            instances,
            convention=convention,
            palette=None if palette is None else data.read_palette(palette),
            num_classes=num_classes,
            dont_care=dont_care,
            sheet=sheet,
            progress=progress_bar,
        )
    except (ValueError, OSError, ImportError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    console = Console()
    console.print(table_of_classes(report))
    for note in report.notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"{report.pairs} pairs, the shortest side {report.shortest} pixels.")
    for fault in report.faults:
        typer.echo(f"WRONG: {fault}")
    if report.faults:
        typer.echo(f"{len(report.faults)} faults.")
        raise typer.Exit(1)
    typer.echo("Nothing is wrong.")


def table_of_classes(report):
    """What each class takes of a checked data set."""
    table = table_of("class", "pixels", "share", "images", title="Classes that occur")
    pixels = max(1, sum(report.pixels.values()))
    for label, (count, images) in report.classes.items():
        name = str(label)
        if label == report.num_classes:
            name = f"don't care ({report.dont_care})"
        table.add_row(name, f"{count:,}", f"{count / pixels:.2%}", f"{images:,}")
    rest = sum(report.pixels.values()) - sum(count for count, _ in report.classes.values())
    if rest:
        table.add_row("[red]out of range", f"{rest:,}", f"{rest / pixels:.2%}", "")
    return table


def progress_bar(found, count):
    """The same, with a bar while it lasts, on a terminal."""
    console = Console(stderr=True)
    return track(
        found,
        "Reading",
        total=count,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def table_of(*columns, **settings):
    """A table whose long words go on in the next line, where the terminal is narrow."""
    table = Table(**settings)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def facts():
    """What `info` says of the machine: name to text."""
    found = {
        "spade_fast": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch's CUDA"] = torch.version.cuda or "none: this torch is built for the CPU"
    found["processor"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    library = cpu_backend.library
    found["instruction sets"] = "unknown: spade_fast._cpu is not there"
    if library is not None:
        found["instruction sets"] = (
            f"{', '.join(library.instruction_sets())}; {library.instruction_set()} is used"
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found[f"cuda:{index}"] = (
            f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.cuda.device_count() == 0:
        found["GPUs"] = "none"
    return found
