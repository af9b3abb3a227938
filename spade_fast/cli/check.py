"""The command `spade-fast check`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .tables import table_of

# Printed below each table.
OF_LAYERS = (
    "“yes”: on small random tensors the layer has the outputs, gradients and buffers of its own"
    " class. After it: how γ and β are computed, and on which backend."
)
OF_ERRORS = (
    "Each error is relative to the norm of the model's own result, and at most {bound:.0e} counts"
    " as agreement. Only the worst gradient is shown."
)
OF_TIMES = (
    "Times are medians. The last column counts the calls of SPADEs that compute γ and β once per"
    " distinct window of a label map, and those that compute them at every pixel."
)
OF_PIXELS = (
    "γ and β are computed at every pixel because of the layers, or because the condition is dense"
    " or small. For a model of label maps, give arguments with label maps: random numbers have no"
    " windows that repeat."
)


def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns (model, arguments), in a module that"
            " Python can import from here.",
        ),
    ],
    seconds: Annotated[float, typer.Option(min=0, help="Seconds to spend on timing.")] = 10,
) -> None:
    """Convert a copy of a model, compare it with the original, and time both.

    Outputs and gradients are compared in float64. Exits with 1 if they differ, if nothing is
    converted, or if the model itself fails.
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
        console.print("Nothing was converted, so there is nothing to compare or to time.")
        raise typer.Exit(1)
    console.print(OF_LAYERS)
    table = table_of("", "relative error in float64", title="Agreement with the original")
    for what, far in result.errors.items():
        colour = "green" if far <= checking.AGREES else "red"
        table.add_row(escape(what), f"[{colour}]{far:.1e}")
    console.print(table)
    console.print(OF_ERRORS.format(bound=checking.AGREES))
    table = table_of(
        "", "original", "converted", "times as fast", "γ and β at", title="Time of a call"
    )
    for mode, (own, fast) in result.seconds.items():
        table.add_row(
            mode,
            f"{own * 1e3:.1f} ms",
            f"{fast * 1e3:.1f} ms",
            f"{own / fast:.2f}" if result.agrees else "[red]differs",
            ", ".join(f"{way}: {count}" for way, count in sorted(result.ways[mode].items()))
            or "as the original",
        )
    console.print(table)
    console.print(OF_TIMES)
    if any(ways["pixels"] for ways in result.ways.values()):
        console.print(OF_PIXELS)
    if not result.agrees:
        raise typer.Exit(1)
