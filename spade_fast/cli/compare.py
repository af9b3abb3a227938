"""The command `spade-fast compare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import options
from .evaluate import table_of_scores


def compare(
    one: Annotated[
        Path,
        typer.Argument(
            callback=options.is_there("file"), help="File written by `spade-fast evaluate --json`."
        ),
    ],
    other: Annotated[
        Path, typer.Argument(callback=options.is_there("file"), help="Another such file.")
    ],
) -> None:
    """Print the scores of two evaluations side by side.

    Scores measured by different protocols cannot be compared: the command then prints what differs,
    and exits with 1.
    """
    from .. import evaluation

    with options.refusals(compare):
        results = [(str(path), evaluation.read(path)) for path in (one, other)]
    different = evaluation.differences(*(result["protocol"] for _, result in results))
    if different:
        typer.echo(f"{one} and {other} cannot be compared, their protocols differ:", err=True)
        for line in different:
            typer.echo(f"  {line}", err=True)
        raise typer.Exit(1)
    Console().print(table_of_scores(results))
    for note in dict.fromkeys(note for _, result in results for note in result["notes"]):
        typer.echo(f"Note: {note}")
