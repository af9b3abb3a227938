"""Writing files so that they are either complete or absent."""

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
    fcntl = None  # type: ignore[assignment]  # its uses check for None

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # from some file systems of clusters
UNFINISHED = ".unfinished"  # in the name of a file that is being written


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
    """Gives the block a path to write to. When the block ends and the file is on the disk, it
    replaces `path` atomically; after an error the previous file stays. Permissions are kept, and if
    `path` is a link, the file that it points to is replaced. If several processes write one file,
    the last one's stays. A killed process leaves a hidden file, which `remove_unfinished` removes.

    Errors: OSError, which names the file, if its folder does not exist, `path` is not a file, or
        the disk is full.
    """
    suffix, path = Path(path).suffix, Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} should be a folder to write {path.name} into")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; it should be a file")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a device or the like; it should be a file")
    unfinished = path.with_name(f".{secrets.token_hex(8)}{UNFINISHED}{suffix}")
    try:
        unfinished.touch(exist_ok=False)
        with _locked(unfinished):
            permissions = os.stat(path if path.exists() else unfinished).st_mode & 0o777
            yield unfinished
            os.chmod(unfinished, permissions)
            _to_disk(unfinished)
            os.replace(unfinished, path)
        if fcntl is not None:  # Windows cannot open folders
            _to_disk(path.parent)  # the new name as well
    except Exception as error:
        raise_of_system(error, path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(name: str, path: Path) -> None:
    """Raises ValueError, naming the argument, unless a file can be written at this path: for use
    before the work that makes its contents.
    """
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"{name} is {path}; it should be a file in a folder that can be written to"
        )


@contextlib.contextmanager
def _locked(path):
    """Holds a lock on the file in the block, and gives the block whether it does: Windows and some
    file systems have no locks. Errors: BlockingIOError if another process holds the lock.
    """
    with open(path, "rb") if fcntl is not None else contextlib.nullcontext() as file:
        is_locked = file is not None
        try:
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            is_locked = False
        yield is_locked


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Removes the unfinished files that killed processes left in a folder. Subfolders, which may be
    somebody else's, are left alone, and so is a file that another process is writing. Without locks
    (see `_locked`) such a file cannot be told apart, and all are left.
    """
    for path in folder.glob(f".*{UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _locked(path) as is_locked:
            if is_locked:
                path.unlink()


def raise_of_system(error: BaseException, path: Path) -> None:
    """Raises the OSError behind an error, such as a full disk, if there is one."""
    for found in (error, error.__context__):
        if isinstance(found, OSError) and found.errno is not None:
            raise OSError(found.errno, os.strerror(found.errno), str(path)) from error
    number = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors reports it
    if number:
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
