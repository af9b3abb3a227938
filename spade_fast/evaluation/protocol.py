"""The protocol of scores, which is how they were measured: two scores can be compared only if
their protocols are equal.
"""

import json
import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, writing

SCORES = {"fid": "FID", "mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy"}
MOST_SHOWN = 100  # characters of a value that differs
PACKAGES = ("pillow", "torchmetrics")


def versions(others: Iterable[str]) -> dict[str, str]:
    """The version of each package that a score may depend on: these, PACKAGES, and others."""
    found = {"spade_fast": __version__, "torch": torch.__version__}
    return found | {name: metadata.version(name) for name in sorted({*PACKAGES, *others})}


def check_writable(path: Path) -> None:
    """Raises ValueError if no file can be written at this path."""
    writing.check_writable("json", path)


def write(result: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes scores and protocol, whole or not at all."""
    with writing.written(path) as unfinished:
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        # What UTF-8 cannot express of a folder's name is escaped as in JSON.
        unfinished.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Scores and protocol from a file. Errors: OSError; ValueError if they are not in it."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        scores, protocol, notes = found["scores"], found["protocol"], found["notes"]
        is_right = isinstance(protocol, dict) and isinstance(notes, list)
        is_right &= all(
            scores[name] is None or isinstance(scores[name], (int, float)) for name in SCORES
        )
    except (ValueError, KeyError, TypeError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"{path} has no scores; it should be a file from `spade-fast evaluate --json`"
        )
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The differences between two protocols, a line for each; empty if they are equal."""
    flat, others = dict(_leaves(one)), dict(_leaves(other))
    return [
        f"{name}: {_words(flat, name)} and {_words(others, name)}"
        for name in dict.fromkeys((*flat, *others))
        if name not in flat or name not in others or flat[name] != others[name]
    ]


def _leaves(value, name=""):
    """The dotted names and the values of everything that is not a dictionary."""
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, part in value.items():
        yield from _leaves(part, f"{name}.{key}" if name else key)


def _words(flat, name):
    if name not in flat:
        return "nothing"
    words = json.dumps(flat[name], ensure_ascii=False)
    return words if len(words) <= MOST_SHOWN else words[:MOST_SHOWN] + "…"
