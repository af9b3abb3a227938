"""Faults of files by their causes."""

import re
from collections.abc import Iterable

from .pairs import MOST_LISTED, SUFFIXES

_FILE = rf"\.(?:{'|'.join(suffix[1:] for suffix in SUFFIXES)})\b"
# A fault begins with its file, whose path may have spaces; it may mention others.
_FIRST, _VARIES = re.compile(rf".+?{_FILE}", re.I), re.compile(rf"\S+{_FILE}|\d+", re.I)


def words_of(error: Exception) -> str:
    """An error's message, which begins with the file if the error is the file system's."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def grouped(faults: Iterable[str]) -> list[str]:
    """A line for each cause, in the order of the first faults: this fault, the number of others
    with the same cause, and the first files that have them. Faults have the same cause if they
    differ in files and numbers only.
    """
    causes: dict[str, list[str]] = {}
    for fault in faults:
        causes.setdefault(_VARIES.sub("", _FIRST.sub("", fault, count=1)), []).append(fault)
    return [_line(*found) for found in causes.values()]


def _line(first, *others):
    if not others:
        return first
    files = [found[0] for found in map(_FIRST.match, others[:MOST_LISTED]) if found]
    rest = ", …" if len(others) > MOST_LISTED else ""
    return f"{first} ({len(others):,} more like this: {', '.join(files)}{rest})"
