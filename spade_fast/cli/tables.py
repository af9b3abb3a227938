"""Tables for a terminal."""

from typing import Any

from rich.table import Table


def table_of(*columns: str, **settings: Any) -> Table:
    """A table that breaks long words over lines if the terminal is narrow."""
    table = Table(**settings)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
