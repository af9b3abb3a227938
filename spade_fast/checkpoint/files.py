"""Files of weights: `.safetensors`, or else what torch.save writes, read with weights_only=True."""

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..nn.arguments import ENTRY
from ..writing import written

MOST_LISTED = 5  # keys that do not fit, or networks that do, in a message


class UnreadableFile(ValueError, pickle.UnpicklingError):
    """A file that is none of weights, or not a whole one, or that would run code."""


def write(source: nn.Module | Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes a module's state_dict, or a state_dict, to a file: as `.safetensors`, or as torch.save
    does. What was there stays until all is written, and so do its permissions (see `written`).

    The state_dict of a network of this package has the arguments that made it in its metadata, and
    so has the file: `load` makes the same network of it. `load_state_dict` and torch.load find
    nothing in it that they do not know.

    Errors: ValueError if a network is no longer what its arguments make, since something in it was
        exchanged: the message says what. OSError, if there is no such folder, `path` is no file or
        the disk is full; TypeError or what torch.save raises, if something cannot be written.
    """
    weights = source.state_dict() if isinstance(source, nn.Module) else source
    _check_makes_itself(weights)
    with written(path) as unfinished:
        if _is_safetensors(Path(path)):
            _write_safetensors(weights, unfinished)
        else:
            with open(unfinished, "wb") as file:
                torch.save(weights, file)


def _check_makes_itself(weights):
    """Raises where `load` would make another network of what a state_dict says of itself."""
    for entry in getattr(weights, "_metadata", {}).values():
        changed = entry.get(ENTRY, {}).get("changed")
        if changed:
            raise ValueError(
                f"source is not what its arguments make: {first_of(changed)}."
                " write(dict(source.state_dict()), path) writes the weights alone, for load_into"
            )


def first_of(words: Sequence[str]) -> str:
    """The first of several things, and how many more there are."""
    more = len(words) - MOST_LISTED
    return ", ".join(words[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def contents(path: Path) -> Any:
    """The contents of a file of weights."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, it should be a file of weights")
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there, it should be a file of weights")
    if not path.is_file():
        raise OSError(f"{path} is a device or the like, it should be a file of weights")
    with open(path, "rb") as file:  # errors of the file system are raised here, as they are
        beginning = file.read(16)
    if not beginning:
        raise unreadable(path, "it is empty")
    try:
        if _is_safetensors(path):
            return _read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of any type, by where it ends or what it is instead
        raise unreadable(path, _reason(error, beginning)) from error


def unreadable(path: Path, reason: str) -> UnreadableFile:
    return UnreadableFile(f"{path} is no file of weights, or not a whole one: {reason}")


def _reason(error, beginning):
    """What an error says of a file that begins so."""
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if refused:
        return f"it has {refused[1]} in it, which may run code, or ends within that name"
    if isinstance(error, (pickle.UnpicklingError, KeyError)):  # whose messages mean a byte
        return f"it begins with {beginning}"
    return str(error).partition("\n")[0] or repr(error)


def _is_safetensors(path):
    return path.suffix.lower() == ".safetensors"


def _read_safetensors(path):
    with _safetensors("to read").safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        weights = OrderedDict((key, file.get_tensor(key)) for key in list(file.keys()))
    try:
        entries = json.loads(metadata.get(ENTRY, "{}"))
    except ValueError:
        entries = None
    if isinstance(entries, dict):
        metadata = OrderedDict((place, {ENTRY: entry}) for place, entry in entries.items())
        setattr(weights, "_metadata", metadata)
    return weights


def _write_safetensors(weights, path):
    for key, tensor in weights.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{key!r} is {type(tensor).__name__}, .safetensors should have names and tensors"
            )
    entries = {
        place: entry[ENTRY]
        for place, entry in getattr(weights, "_metadata", {}).items()
        if ENTRY in entry
    }
    _safetensors("to write").torch.save_file(
        {
            key: tensor.detach().clone(memory_format=torch.contiguous_format)
            for key, tensor in weights.items()
        },
        path,
        {"format": "pt"} | ({ENTRY: json.dumps(entries)} if entries else {}),
    )


def _safetensors(purpose):
    try:
        import safetensors.torch
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{purpose} .safetensors this needs: pip install safetensors ({error})"
        ) from error
    return safetensors
