"""Tables on a terminal."""

from typing import Any

from rich.table import Table


def table_of(*columns: str, **settings: Any) -> Table:
    """A table whose long words go on in the next line, where the terminal is narrow."""
    table = Table(**settings)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
