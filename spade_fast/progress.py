"""A progress bar for what takes long."""

from collections.abc import Iterable

from rich.console import Console
from rich.progress import track


def progress_bar(found: Iterable, count: int, words: str = "Reading") -> Iterable:
    """The same, with a bar while it lasts, on a terminal."""
    console = Console(stderr=True)
    return track(
        found,
        words,
        total=count,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
