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
    console.print(
        "Each error is relative to the norm of the model's own result, and at most"
        f" {checking.AGREES:.0e} counts as agreement. Only the worst gradient is shown."
    )
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
    console.print(
        "Times are medians. The last column counts the calls of SPADEs that compute γ and β once"
        " per distinct window of a label map, and those that compute them at every pixel."
    )
    if any(ways["pixels"] for ways in result.ways.values()):
        console.print(
            "γ and β are computed at every pixel because of the layers, or because the condition is"
            " dense or small. For a model of label maps give arguments with label maps: random"
            " numbers have no windows that repeat."
        )
    if not result.agrees:
        raise typer.Exit(1)
