"""The command `spade-fast`. It prints its help without importing PyTorch: each command imports what
it needs when it runs.
"""

import functools
import io
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import __version__, import_public
from . import check, check_data, compare, evaluate, export, generate, info, paint, train
from .tables import table_of

__all__ = ["app", "table_of"]


def prepared(command: Callable[..., None]) -> Callable[..., None]:
    """The command, preceded by the import of all public names, so that a user's module finds them
    in spade_fast.
    """

    @functools.wraps(command)
    def run(**given: Any) -> None:
        import_public()
        command(**given)

    return run


app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=True, add_completion=False)
app.command("info")(prepared(info.info))
app.command("check")(prepared(check.check))
app.command("check-data")(prepared(check_data.check_data))
app.command("train")(prepared(train.command()))
app.command("generate")(prepared(generate.generate))
app.command("export")(prepared(export.export))
app.command("evaluate")(prepared(evaluate.evaluate))
app.command("compare")(prepared(compare.compare))
app.command("paint")(prepared(paint.paint))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spade_fast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """SPADE, fast: train, use and score generators, and test the conversion of a model."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The name of a file may not be UTF-8. It is escaped, as Python does in stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
