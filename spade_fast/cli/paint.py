"""The command `spade-fast paint`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import progress_bar
from . import options

if TYPE_CHECKING:
    from ..nn import SPADEGenerator
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
    encoder: Annotated[
        Path | None,
        options.file("Its weights, for the style of a photograph; a run has them."),
    ] = None,
    classes: Annotated[
        Path | None,
        options.file("Names, and colours: a line CLASS NAME [R G B] for each class."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than 127.0.0.1 let others in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
) -> None:
    """Paint label maps on a page in your browser, and see the generator's image of them. Exits with
    1 where it cannot listen at the port.
    """
    from ..paint import listening

    try:
        door = listening(host, port)
    except OSError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    try:
        with door:
            _paint(weights, encoder, classes, door, host)
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def _paint(weights, encoder, classes, door, host):
    from ..generation import encoder_of_run
    from ..paint import check_installed, classes_of, serve
    from ..service import Service
    from ..training.run import Run

    check_installed()
    source, known = _generator(weights, {"classes": classes, "encoder": encoder})
    settings = None
    if weights is not None and weights.is_dir():
        run = Run(weights)
        settings = run.settings()
        encoder = encoder_of_run(run) if encoder is None else encoder
    with Service(source, waiting=WAITING) as service:
        if known is None:
            known = classes_of(service.generator_arguments["label_nc"], classes, settings)
        serve(
            service,
            known,
            door,
            host,
            encoder,
            lambda at: typer.echo(f"Paint at {at} (Ctrl-C ends it)"),
        )


def _generator(
    weights: Path | None, given: dict[str, Path | None]
) -> "tuple[Path | SPADEGenerator, Classes | None]":
    """What a service takes, and its classes where they are known without looking at it.

    given: by name, those that the small generator does not take.
    """
    from ..paint import demo_classes, train_demo
    from ..training.run import GENERATOR

    if weights is not None:
        return (weights / GENERATOR if weights.is_dir() else weights), None
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is given without weights, which it should belong to")
    typer.echo("No weights are given: training a small generator on drawn scenes, about 15 s.")
    generator = train_demo(progress=lambda found, count: progress_bar(found, count, "Training"))
    return generator, demo_classes()
