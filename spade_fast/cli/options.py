"""Options that several commands have, each with one meaning."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def is_there(kind: str) -> Callable[..., Path | None]:
    """What typer calls with a path that was given, to refuse it where there is no such thing.

    kind: "folder", "file" or "file or folder".
    """

    def check(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
        if path is None:
            return None
        found = "not there"
        if path.exists():
            found = "a folder" if path.is_dir() else "a file"
        if found.removeprefix("a ") not in kind.split():
            words = f"{parameter.opts[0]} is {path}, which is {found}; it should be a {kind}"
            typer.echo(f"Error: {words}", err=True)
            raise typer.Exit(2)
        return path

    return check


def folder(help: str) -> Any:
    """An option that names a folder, which is there."""
    return typer.Option(help=help, callback=is_there("folder"))


def file(help: str) -> Any:
    """An option that names a file, which is there."""
    return typer.Option(help=help, callback=is_there("file"))


WORDS = "folder, coco_stuff, ade20k or cityscapes."
Convention = Annotated[str, typer.Option(help=WORDS)]
Palette = Annotated[Path | None, file("For colour-coded maps: a line R G B CLASS per colour.")]
NumClasses = Annotated[int | None, typer.Option(min=1, help='Without "don\'t care".')]
DontCare = Annotated[int | None, typer.Option(help="The number in the maps that is no class.")]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda.")]
