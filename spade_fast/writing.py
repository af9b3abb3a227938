"""Files that are whole or not there."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished"  # at the end of the name of a file that is being written


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to inside, which becomes `path` at once after it, when all of it is on the
    disk; after an error what was there stays. A process that is killed leaves a hidden file, which
    `remove_unfinished` finds. Errors: OSError, which names the file.
    """
    unfinished = path.with_name(f".{path.stem}{UNFINISHED}{path.suffix}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name as well
        finally:
            os.close(folder)
    except Exception as error:
        raise_of_system(error, path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder, and not below other folders in
    it, which may be somebody else's.
    """
    for path in folder.glob(f".*{UNFINISHED}*"):
        path.unlink(missing_ok=True)


def raise_of_system(error, path):
    """Raises the OSError that an error comes from, such as a full disk, if it does."""
    for found in (error, error.__context__):
        if isinstance(found, OSError) and found.errno is not None:
            raise OSError(found.errno, os.strerror(found.errno), str(path)) from error
    number = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors says it
    if number:
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
