"""The command `spade-fast`."""

import typer

from . import check, check_data, compare, evaluate, generate, info, paint, train
from .tables import table_of

__all__ = ["app", "table_of"]

app = typer.Typer(help="The SPADE layer, fast.", no_args_is_help=True, add_completion=False)
app.command("info")(info.info)
app.command("check")(check.check)
app.command("check-data")(check_data.check_data)
app.command("train")(train.command())
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("paint")(paint.paint)
