"""Finds the weights in a file, through nested dictionaries, prefixes and equivalent names, and
checks whether they fit a module.
"""

import contextlib
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..nn.arguments import ENTRY, WRAPPED
from ..nn.modules import Model
from .files import MOST_LISTED, contents, first_of, unreadable

# A path, a state_dict, or a dictionary that contains state_dicts.
Source = str | os.PathLike | Mapping[str, Any]
Dictionaries = list[tuple[str, dict[str, torch.Tensor]]]
RENAMED = (
    (rf"(^|\.)(?:{'|'.join(WRAPPED)})\.", r"\1"),
    (r"(^|\.)shared\.0\.", r"\1mlp_shared.0."),
    (r"(^|\.)conv_(gamma|beta)\.", r"\1mlp_\2."),
    (r"(^|\.)parametrizations\.weight\.original$", r"\1weight_orig"),
    (r"(^|\.)parametrizations\.weight\.0\._([uv])$", r"\1weight_\2"),
)
OF_EACH_NETWORK = re.compile(  # the names of one weight of each network, after its prefix
    r"(|.*\.)(?:conv_img\.weight|fc_mu\.weight|discriminator_0\.model0\.0\.weight)"
)
COUNTERS = ("num_batches_tracked", "n_averaged")  # old files lack them


class Part(NamedTuple):
    """The weights of one network, with the names that this package uses."""

    name: str  # the dictionaries' keys and the prefix that lead to the weights, joined by dots
    tensors: dict[str, torch.Tensor]
    written: dict[str, Any] | None  # the network and its arguments, if they are in the metadata
    is_whole: bool  # whether the dictionary contains no other weights


def dictionaries(source: Source) -> Dictionaries:
    """All pairs (name, dictionary of tensors) in a source. Errors: ValueError if there are none;
    for a path, UnreadableFile.
    """
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    source = source if path is None else contents(path)
    found = list(_dictionaries_in(source)) if isinstance(source, Mapping) else []
    if not found and source != {}:
        shown = (
            f"a dictionary of {first_of(list(map(str, source)))}"
            if isinstance(source, Mapping)
            else f"a {type(source).__name__}"
        )
        if path is not None:
            raise unreadable(path, f"it contains {shown}")
        raise ValueError(
            f"source is {shown}; it should be a state_dict, names and tensors, or the path of one"
        )
    return found or [("", {})]


def _dictionaries_in(source, name=""):
    named = {key: value for key, value in source.items() if isinstance(key, str)}
    tensors = OrderedDict(
        (key, value) for key, value in named.items() if isinstance(value, torch.Tensor)
    )
    if tensors:
        if hasattr(source, "_metadata"):
            setattr(tensors, "_metadata", source._metadata)
        yield name, tensors
    for key, value in named.items():
        if isinstance(value, Mapping):
            yield from _dictionaries_in(value, f"{name}.{key}".lstrip("."))


def known_networks(dictionaries: Dictionaries) -> list[Part]:
    """A Part for each known network in the dictionaries. Errors: ValueError if there are none."""
    parts = [
        _part(name, weights, renamed, prefix)
        for name, weights in dictionaries
        for renamed in [named_as_here(weights)]
        for prefix in prefixes(renamed)
    ]
    if not parts:
        raise unknown(key for _, weights in dictionaries for key in weights)
    return parts


def prefixes(weights: dict[str, torch.Tensor]) -> list[str]:
    """The prefixes of the known networks in a dictionary that `named_as_here` returned."""
    matches = [
        OF_EACH_NETWORK.fullmatch(key) for key, tensor in weights.items() if tensor.dim() > 1
    ]
    return sorted({match[1] for match in matches if match})


def networks_of(part: Part) -> list[Part]:
    return [part] if part.written else known_networks([("", part.tensors)])


def parts_like(wanted: dict[str, torch.Tensor], dictionaries: Dictionaries) -> list[Part]:
    """A Part for each dictionary and each prefix in it that precedes names in `wanted`. The Parts
    are sorted by the number of such names, largest first.
    """
    parts = []
    for name, weights in dictionaries:
        renamed, found = named_as_here(weights), Counter[str]()
        for key in renamed:
            steps = key.split(".")
            for depth in range(len(steps)):
                if ".".join(steps[depth:]) in wanted:
                    found["".join(f"{step}." for step in steps[:depth])] += 1
        for prefix, count in (found or {"": 0}).items():
            parts.append((count, _part(name, weights, renamed, prefix)))
    return [part for _, part in sorted(parts, key=lambda pair: -pair[0])]


def _part(name, weights, renamed, prefix):
    """The Part of the weights in a dictionary that have this prefix. `renamed` is the dictionary as
    `named_as_here` returned it.
    """
    tensors = {
        key.removeprefix(prefix): tensor
        for key, tensor in renamed.items()
        if key.startswith(prefix)
    }
    others = [key for key in renamed if not key.startswith(prefix) and key not in COUNTERS]
    written = {
        _renamed(f"{place}.").strip("."): entry[ENTRY]
        for place, entry in getattr(weights, "_metadata", {}).items()
        if isinstance(entry, dict) and _is_description(entry.get(ENTRY))
    }
    return Part(f"{name}.{prefix}".strip("."), tensors, written.get(prefix.strip(".")), not others)


def _is_description(entry):
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("network"), str)
        and isinstance(entry.get("arguments"), dict)
    )


def with_name(parts: list[Part], key: str | None) -> list[Part]:
    """The Parts that `key` names, or all if it is None. Errors: ValueError if it names none."""
    if key is None:
        return parts
    found = [part for part in parts if part.name == key] or [
        part for part in parts if f".{key}." in f".{part.name}."
    ]
    if not found:
        names = ", ".join(repr(part.name) for part in parts)
        raise ValueError(f"key is {key!r}; it should be one of {names}")
    return found


def choose(parts: list[Part], key: str | None) -> Part:
    """The only Part, or the Part that `key` names. Errors: ValueError if the choice is ambiguous,
    or if `key` names none.
    """
    parts = with_name(parts, key)
    names = ", ".join(repr(part.name) for part in parts)
    if len(parts) > 1:
        raise ValueError(f"there are several networks; key should name one of them: {names}")
    if key is None and not parts[0].is_whole:
        raise ValueError(f"there are other weights beside these; key={names} selects only these")
    return parts[0]


def named_as_here(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state_dict with the names that this package uses, and with any missing v of spectral norm.
    Errors: ValueError if two of the weights get the same name.
    """
    renamed = {_renamed(key): tensor for key, tensor in weights.items()}
    if len(renamed) < len(weights):
        twice = Counter(map(_renamed, weights)).most_common(1)[0][0]
        raise ValueError(
            "two of these weights have the same name here; one of them should be left out:"
            f" {' and '.join(key for key in weights if _renamed(key) == twice)}"
        )
    for key in [key for key in renamed if key.rpartition(".")[2] == "weight_orig"]:
        prefix = key.removesuffix("_orig")
        divided = renamed.pop(prefix, None)  # weight / σ, which old versions keep
        weight, u = renamed[key], renamed.get(f"{prefix}_u")
        if f"{prefix}_v" in renamed or u is None or u.shape != weight.shape[:1]:
            continue
        if divided is None or divided.shape == weight.shape:
            renamed[f"{prefix}_v"] = _right_vector(weight, u, divided)
    return renamed


def _renamed(key):
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def _right_vector(weight, u, divided):
    """Spectral norm's v for a weight and its u. If the divided weight is known, v is such that
    σ = u · W v is the number it was divided by; otherwise v is the normalised Wᵀ u.
    """
    v = torch.mv(weight.flatten(1).t(), u)
    if divided is None:
        return F.normalize(v, dim=0)
    largest = weight.abs().argmax()
    factor = weight.flatten()[largest] / divided.flatten()[largest] / v.square().sum()
    return torch.where(factor.isfinite(), v * factor, F.normalize(v, dim=0))  # W, or W u, may be 0


def _own_names(own):
    """A dictionary from the names that this package uses, without DataParallel's prefix, to the own
    names in a module's state_dict.
    """
    names = {_renamed(key): key for key, tensor in own.items() if isinstance(tensor, torch.Tensor)}
    while any(key not in COUNTERS for key in names) and all(
        key.startswith("module.") or key in COUNTERS for key in names
    ):
        names = {key.removeprefix("module."): own_name for key, own_name in names.items()}
    return names


def wanted_of(own: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A module's state_dict, with the names that this package uses."""
    return {key: own[name] for key, name in _own_names(own).items()}


def differences(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Descriptions of everything that does not fit; empty if the weights fit."""
    both = [key for key in wanted if key in weights]
    lists = {
        "is missing": [key for key in wanted if key not in weights and not key.endswith(COUNTERS)],
        "is not known": [key for key in weights if key not in wanted and key not in COUNTERS],
        "differs in shape": [
            f"{key} {list(weights[key].shape)} for {list(wanted[key].shape)}"
            for key in both
            if weights[key].shape != wanted[key].shape
        ],
        "is not floating-point": [
            f"{key} {weights[key].dtype}"
            for key in both
            if wanted[key].is_floating_point() and not weights[key].is_floating_point()
        ],
        "has no values": [key for key in both if weights[key].is_meta and not wanted[key].is_meta],
    }
    return [f"{first_of(keys)} {what}" for what, keys in lists.items() if keys]


def fill(module: Model, weights: dict[str, torch.Tensor]) -> Model:
    """Loads weights that fit into a module, and returns it. After an error it is unchanged."""
    own = module.state_dict()
    before = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in own.items()
    }
    given = {name: weights[key] for key, name in _own_names(own).items() if key in weights}
    try:
        module.load_state_dict(before | given)
    except Exception:
        with contextlib.suppress(Exception):  # one tensor cannot be written to
            module.load_state_dict(before)
        raise
    return module


def unknown(keys: Iterable[str]) -> ValueError:
    """The error for weights of no known network."""
    first = ", ".join(list(keys)[:MOST_LISTED])
    return ValueError(
        f"the weights fit no known network: {first or 'there are none'} …; `checkpoint.load_into`"
        " loads those of a network of your own"
    )
