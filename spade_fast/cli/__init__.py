"""The command `spade-fast`. What it imports to say its help is light: PyTorch is imported by the
command that needs it.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import __version__, import_public
from . import check, check_data, compare, evaluate, generate, info, paint, train
from .tables import table_of

__all__ = ["app", "table_of"]


def prepared(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which begins as a program does that has imported spade_fast: a user's modules
    find all of it.
    """

    @functools.wraps(command)
    def run(**given: Any) -> None:
        import_public()
        command(**given)

    return run


app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command("info")(prepared(info.info))
app.command("check")(prepared(check.check))
app.command("check-data")(prepared(check_data.check_data))
app.command("train")(prepared(train.command()))
app.command("generate")(prepared(generate.generate))
app.command("evaluate")(prepared(evaluate.evaluate))
app.command("compare")(prepared(compare.compare))
app.command("paint")(prepared(paint.paint))


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spade_fast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Say the version."),
    ] = False,
) -> None:
    """The SPADE layer, fast."""
