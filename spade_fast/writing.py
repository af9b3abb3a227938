"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished"  # at the end of the name of a file that is being written


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to inside, which becomes `path` at once after it, when all of it is on the
    disk; after an error what was there stays. A process that is killed leaves a hidden file, which
    `remove_unfinished` finds.
    """
    unfinished = path.with_name(f".{path.stem}{UNFINISHED}{path.suffix}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name as well
    finally:
        os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left half-written below a folder."""
    for path in folder.rglob(f".*{UNFINISHED}*"):
        path.unlink(missing_ok=True)
