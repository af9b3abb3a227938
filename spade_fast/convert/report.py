"""The report of `convert`, module by module."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80


class Entry(NamedTuple):
    """The outcome for one module."""

    name: str
    type: str
    recognised_as: str
    converted: bool
    # Why it was not converted; or else how γ and β are computed, on which backend, and in which
    # states the module's own forward runs instead.
    reason: str


class Report(tuple[Entry, ...]):
    """The entries of all modules that looked like a SPADE or its block, in the model's order. It
    prints as a table.
    """

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=WIDTH, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get().rstrip()

    def __rich__(self) -> "Table | str":
        from rich.table import Table

        if not self:
            return (
                "No SPADE was found: no module has a norm and two convolutions that could compute"
                " γ and β, or two parameters with their rows. The model is as it was."
            )
        table = Table("layer and its class", "recognised as; converted: how, or why not")
        for column in table.columns:
            column.overflow = "fold"
        for entry in self:
            converted = "yes" if entry.converted else "no"
            name = entry.name or "(the model)"
            found = f"{entry.recognised_as}\n" if entry.recognised_as else ""
            table.add_row(f"{name}\n  {entry.type}", f"{found}{converted}: {entry.reason}")
        return table

    @property
    def converted(self) -> int:
        """The number of modules that were converted."""
        return sum(entry.converted for entry in self)
