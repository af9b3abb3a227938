"""The command `spade-fast`."""

import platform
from importlib import metadata
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import __version__, backends
from . import check as checking
from .kernels import cpu_backend

app = typer.Typer(help="The SPADE layer, fast.", no_args_is_help=True, add_completion=False)


@app.callback()
def commands():
    """The SPADE layer, fast."""  # typer drops a lone command's name without this callback


@app.command()
def info():
    """Which backends run here and why not the others, versions, CPU features, devices."""
    console = Console()
    table = Table("backend", "runs", "why not", title="Backends, best first")
    for status in backends():
        table.add_row(status.name, "yes" if status.runs else "no", status.reason)
    console.print(table)
    table = Table("", "", title="This machine", show_header=False)
    for name, fact in facts().items():
        table.add_row(name, fact)
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
    where they differ.
    """
    try:
        model, arguments = checking.load(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="MODULE:FUNCTION") from None
    result, console = checking.check(model, arguments, seconds), Console()
    console.print(result.report)
    table = Table("", "relative error in float64", title="Beside the model's own")
    for what, error in result.errors.items():
        table.add_row(what, f"[{'green' if error <= checking.AGREES else 'red'}]{error:.1e}")
    console.print(table)
    table = Table("", "its own", "converted", "times as fast", title="Time of a call")
    for mode, (own, fast) in result.seconds.items():
        table.add_row(
            mode,
            f"{own * 1e3:.1f} ms",
            f"{fast * 1e3:.1f} ms",
            f"{own / fast:.2f}" if result.agrees else "[red]differs",
        )
    console.print(table)
    if not result.agrees:
        raise typer.Exit(1)


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
