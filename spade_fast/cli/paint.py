"""The command `spade-fast paint`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import progress_bar
from . import options

if TYPE_CHECKING:
    from ..paint import Classes

WAITING = 16  # images that wait, of all tabs together; each has one at a time


def paint(
    weights: Annotated[
        Path | None,
        typer.Argument(
            callback=options.is_there("file or folder"),
            help="A generator's file or a run's folder; without, a small one is trained first.",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        options.file("Names, and colours: a line CLASS NAME [R G B] for each class."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than 127.0.0.1 let others in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
):
    """Paint label maps on a page in your browser, and see the generator's image of them."""
    from ..paint import classes_of, serve
    from ..service import Service

    try:
        source, known = _generator(weights, classes)
        with Service(source, waiting=WAITING) as service:
            if known is None:
                known = classes_of(service.generator_arguments["label_nc"], classes)
            typer.echo(f"Paint at http://{host}:{port}/ (Ctrl-C ends it)")
            serve(service, known, host, port)
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def _generator(weights: Path | None, classes: Path | None) -> "tuple[object, Classes | None]":
    """What a service takes, and its classes where they are known without looking at it."""
    from ..paint import demo_classes, train_demo
    from ..training.run import GENERATOR

    if weights is not None:
        return (weights / GENERATOR if weights.is_dir() else weights), None
    if classes is not None:
        raise ValueError("classes is given without weights: the small generator has its own")
    typer.echo("No weights are given: training a small generator on drawn scenes, about 15 s.")
    generator = train_demo(progress=lambda found, count: progress_bar(found, count, "Training"))
    return generator, demo_classes()
