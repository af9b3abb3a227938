"""A progress bar for long loops."""

from collections.abc import Iterable

from rich.console import Console
from rich.progress import track


def progress_bar(found: Iterable, count: int, words: str = "Reading") -> Iterable:
    """The items of `found`, with a progress bar on standard error if that is a terminal."""
    console = Console(stderr=True)
    return track(
        found,
        words,
        total=count,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
