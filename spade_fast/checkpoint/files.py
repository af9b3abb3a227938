"""Files of weights: `.safetensors`, or files of torch.save, read with weights_only=True."""

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
from ..optional import needed
from ..writing import written

MOST_LISTED = 5  # items of a list in an error message


class UnreadableFile(ValueError, pickle.UnpicklingError):
    """A file that contains no weights, is incomplete, or would run code."""


def write(source: nn.Module | Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes a module's state_dict, or a given state_dict, to a file: as `.safetensors` if the path
    ends so, and otherwise with torch.save. An existing file is replaced only once the new one is
    complete, and keeps its permissions (see `written`).

    The metadata of a state_dict of this package's networks contains the arguments that made the
    network. They are written too, so `load` can make the same network from the file.
    `load_state_dict` and torch.load can read the file as well.

    Errors: ValueError if a part of the network was replaced, so that its arguments no longer make
        the same network: the message says what was replaced. OSError if the folder does not exist,
        `path` is not a file, or the disk is full. TypeError if source is neither; this, or an error
        of torch.save, if a value cannot be written.
    """
    if not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(
            f"source is a {type(source).__name__}; it should be a module or its state_dict"
        )
    weights = source.state_dict() if isinstance(source, nn.Module) else source
    _check_makes_itself(weights)
    with written(path) as unfinished:
        if _is_safetensors(Path(path)):
            _write_safetensors(weights, unfinished)
        else:
            with open(unfinished, "wb") as file:
                torch.save(weights, file)


def _check_makes_itself(weights):
    """Raises ValueError if `load` would make a different network from the written arguments."""
    for entry in getattr(weights, "_metadata", {}).values():
        changed = entry.get(ENTRY, {}).get("changed")
        if changed:
            raise ValueError(
                f"source is not what its arguments make: {first_of(changed)}."
                " write(dict(source.state_dict()), path) writes only the weights, for load_into"
            )


def first_of(words: Sequence[str]) -> str:
    """The first MOST_LISTED items as text, and the number of those left out."""
    more = len(words) - MOST_LISTED
    return ", ".join(words[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def contents(path: Path) -> Any:
    """The contents of a file of weights."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; it should be a file of weights")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it should be a file of weights")
    if not path.is_file():
        raise OSError(f"{path} is not a regular file; it should be a file of weights")
    with open(path, "rb") as file:  # errors of the file system are raised unchanged here
        beginning = file.read(16)
    if not beginning:
        raise unreadable(path, "it is empty")
    try:
        if _is_safetensors(path):
            return _read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of any type, depending on the file's contents
        raise unreadable(path, _reason(error, beginning)) from error


def unreadable(path: Path, reason: str) -> UnreadableFile:
    return UnreadableFile(f"{path} is not a file of weights, or is incomplete: {reason}")


def _reason(error, beginning):
    """The reason why a file is unreadable, from the error and the file's first bytes."""
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if refused:
        return f"it contains {refused[1]}, which may run code, or it ends within that name"
    if isinstance(error, (pickle.UnpicklingError, KeyError)):  # their messages only name a byte
        return f"it begins with {beginning}"
    return str(error).partition("\n")[0] or repr(error)


def _is_safetensors(path):
    return path.suffix.lower() == ".safetensors"


def _read_safetensors(path):
    with _safetensors("safetensors", "reading").safe_open(path, "pt") as file:
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
                f"{key!r} is a {type(tensor).__name__}; .safetensors should have strings as names"
                " and tensors as values"
            )
    entries = {
        place: entry[ENTRY]
        for place, entry in getattr(weights, "_metadata", {}).items()
        if ENTRY in entry
    }
    _safetensors("safetensors.torch", "writing").save_file(
        {
            key: tensor.detach().clone(memory_format=torch.contiguous_format)
            for key, tensor in weights.items()
        },
        path,
        {"format": "pt"} | ({ENTRY: json.dumps(entries)} if entries else {}),
    )


def _safetensors(module, doing):
    return needed(module, f"{doing} .safetensors", "safetensors")
