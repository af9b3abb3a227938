"""Options that several commands share, checks of paths, and how a command refuses."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

from ..arguments import counted

REFUSALS: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ModuleNotFoundError)


@contextlib.contextmanager
def refusals(command: Callable[..., None], *others: type[Exception]) -> Iterator[None]:
    """Inside, REFUSALS and the other errors end the command: it prints the message, with its own
    options in place of arguments' names, and exits with 2.
    """
    try:
        yield
    except REFUSALS + others as error:
        typer.echo(f"Error: {as_options(str(error), command)}", err=True)
        raise typer.Exit(2) from None


def as_options(words: str, command: Callable[..., None]) -> str:
    """A message with a command's options in place of the arguments that it begins with, and of
    those of which it says "should be" or "is off".
    """
    parameters = inspect.signature(command).parameters.values()
    names = (one.name for one in parameters if isinstance(get_args(one.annotation)[1], OptionInfo))
    name = rf"(?:{'|'.join(names)})\b"
    listed = rf"{name}(?:(?:, | and ){name})*"
    return re.sub(
        rf"(?<![\w./-])(?:^{listed}(?= )|{listed}(?= (?:should be|is off)))",
        lambda found: re.sub(name, lambda one: as_option(one[0]), found[0]),
        words,
    )


def as_option(name: str) -> str:
    """The option of an argument with this name."""
    return f"--{name.lower().replace('_', '-')}"


def is_there(kind: str) -> Callable[..., Path | None]:
    """A callback for typer that refuses a path unless it exists and is of this kind.

    kind: "folder", "file" or "file or folder".
    """

    def check(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
        if path is None:
            return None
        found = "does not exist"
        if path.exists():
            found = "is a folder" if path.is_dir() else "is a file"
        if found.removeprefix("is a ") not in kind.split():
            words = f"{parameter.opts[0]} is {path}, which {found}; it should be a {kind}"
            typer.echo(f"Error: {words}", err=True)
            raise typer.Exit(2)
        return path

    return check


def folder(help: str, panel: str | None = None) -> Any:
    """An option for the path of a folder that exists."""
    return typer.Option(help=help, callback=is_there("folder"), rich_help_panel=panel)


def file(help: str, panel: str | None = None) -> Any:
    """An option for the path of a file that exists."""
    return typer.Option(help=help, callback=is_there("file"), rich_help_panel=panel)


def report_faults(faults: list[str], each: bool, err: bool = False, more: str = "") -> None:
    """Prints a data set's faults, and exits with 1 if there are any.

    each: whether to print a line for each fault, and not for each cause.
    more: printed after the number of faults.
    """
    from ..data.faults import grouped

    lines = faults if each else grouped(faults)
    for line in lines:
        typer.echo(f"WRONG: {line}", err=err)
    if faults:
        hint = "" if len(lines) == len(faults) else " --all-faults prints a line for each."
        typer.echo(f"{counted(len(faults), 'fault')}.{hint}{more}", err=err)
        raise typer.Exit(1)


AllFaults = Annotated[
    bool, typer.Option("--all-faults", help="Print a line for each fault, not for each cause.")
]
READING = "How label maps are read"  # the panel of the help
CONVENTION = "Layout of the folders: folder, coco_stuff, ade20k or cityscapes."
Convention = Annotated[str, typer.Option(help=CONVENTION, rich_help_panel=READING)]
RunsConvention = Annotated[
    str | None,
    typer.Option(
        help=f"{CONVENTION} By default, that of the run, or folder.", rich_help_panel=READING
    ),
]
Palette = Annotated[
    Path | None,
    file("File for colour-coded label maps: a line R G B CLASS for each colour.", READING),
]
NumClasses = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of classes, without don't care; by default, the convention's.",
        rich_help_panel=READING,
    ),
]
DontCare = Annotated[
    int | None,
    typer.Option(
        help="Label of pixels without a class; by default, the convention's.",
        rich_help_panel=READING,
    ),
]
Device = Annotated[str, typer.Option(help="Device to compute on, such as cpu or cuda.")]
FILE = "File of weights"  # the panel of the help
Key = Annotated[
    str | None,
    typer.Option(
        help="Name of the network to load from a file of several, such as ema.",
        rich_help_panel=FILE,
    ),
]
CropSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Width of the images in pixels, if the file does not say it.",
        rich_help_panel=FILE,
    ),
]
AspectRatio = Annotated[
    float | None,
    typer.Option(
        help="Width of the images over their height, if the file does not say it.",
        rich_help_panel=FILE,
    ),
]
