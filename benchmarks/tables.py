"""Tables that can be read in 80 columns."""

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 100  # columns, for a log or a file, which has no width of its own


def console_of_any_width():
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    return console


def narrow_table(first, *figures, **settings):
    """A table with one column of text and columns of figures. Cells that are too wide are folded
    onto further lines.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title_justify="left", **settings)
    table.add_column(first, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", overflow="fold")
    return table
