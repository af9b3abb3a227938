"""The command `spade-fast check`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .tables import table_of


def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION", help="Returns (model, arguments); MODULE as for import."
        ),
    ],
    seconds: Annotated[float, typer.Option(min=0, help="How long the two are timed for.")] = 10,
) -> None:
    """Convert a model, compare outputs and gradients with its own, and time both. Exits with 1
    where they differ, where nothing is converted, or where the model itself fails.
    """
    from .. import check as checking

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
    for what, far in result.errors.items():
        colour = "green" if far <= checking.AGREES else "red"
        table.add_row(escape(what), f"[{colour}]{far:.1e}")
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
