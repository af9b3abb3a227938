"""The command `spade-fast paint`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import progress_bar
from . import options

if TYPE_CHECKING:
    from ..nn import SPADEGenerator
    from ..paint import Classes

WAITING = 16  # most images that wait, of all tabs together; a tab waits for one at a time


def paint(
    weights: Annotated[
        Path | None,
        typer.Argument(
            callback=options.is_there("file or folder"),
            help="File of a generator's weights, or folder of a run; without it, a small generator"
            " is trained first.",
        ),
    ] = None,
    encoder: Annotated[
        Path | None,
        options.file(
            "File of an encoder's weights, for the styles of photographs; by default, the run's."
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        options.file("File of names and colours: a line CLASS NAME [R G B] for each class."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at. By default, only this machine can connect; 0.0.0.0 lets in"
            " other machines."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
) -> None:
    """Paint label maps on a page in your browser, and see the generator's images of them.

    Exits with 1 if it cannot listen at the port, and with 2 if something else is wrong.
    """
    from ..paint import listening

    try:
        door = listening(host, port)
    except OSError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    with options.refusals(paint, RuntimeError):
        with door:
            _paint(weights, encoder, classes, door, host)


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
    """The weights or the generator for a service, and its classes if they are known already.

    given: by name, the options that only a generator of the user's takes.
    """
    from ..paint import demo_classes, train_demo

    if weights is not None:
        return weights, None
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is given without the weights that it belongs to")
    typer.echo("No weights are given: training a small generator on drawn scenes, about 15 s.")
    generator = train_demo(progress=lambda found, count: progress_bar(found, count, "Training"))
    return generator, demo_classes()
