"""Files that are whole or not there."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # what asks for it looks whether it is there

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # as some file systems of clusters say
UNFINISHED = ".unfinished"  # in the name of a file that is being written


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to inside, which becomes `path` at once after it, when all of it is on the
    disk; after an error what was there stays. Permissions stay too, and where `path` is a link the
    file that it points to is replaced. Several processes may write one file: the last one's stays.
    A process that is killed leaves a hidden file, which `remove_unfinished` finds.

    Errors: OSError, which names the file, if there is no such folder, `path` is no file, or the
        disk is full.
    """
    suffix, path = Path(path).suffix, Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} should be a folder to write {path.name} into")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, it should be a file")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a device or the like, it should be a file")
    unfinished = path.with_name(f".{secrets.token_hex(8)}{UNFINISHED}{suffix}")
    try:
        unfinished.touch(exist_ok=False)
        with _locked(unfinished):
            permissions = os.stat(path if path.exists() else unfinished).st_mode & 0o777
            yield unfinished
            os.chmod(unfinished, permissions)
            _to_disk(unfinished)
            os.replace(unfinished, path)
        if fcntl is not None:  # Windows opens no folder
            _to_disk(path.parent)  # the new name as well
    except Exception as error:
        raise_of_system(error, path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path):
    """Inside, no other process has the file locked; where Windows or the file system has no locks,
    nobody knows. Errors: BlockingIOError where one has.
    """
    with open(path, "rb") if fcntl is not None else contextlib.nullcontext() as file:
        try:
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder, and neither what another process
    writes there now nor anything in folders below, which may be somebody else's.
    """
    for path in folder.glob(f".*{UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _locked(path):
            path.unlink()


def raise_of_system(error: BaseException, path: Path) -> None:
    """Raises the OSError that an error comes from, such as a full disk, if it does."""
    for found in (error, error.__context__):
        if isinstance(found, OSError) and found.errno is not None:
            raise OSError(found.errno, os.strerror(found.errno), str(path)) from error
    number = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors says it
    if number:
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
