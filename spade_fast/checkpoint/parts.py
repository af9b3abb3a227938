"""Which weights a file has: dictionaries in dictionaries, prefixes, and names that
mean the same; and whether they fit.
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

# A path, or a dictionary with state_dicts in it.
Source = str | os.PathLike | Mapping[str, Any]
Dictionaries = list[tuple[str, dict[str, torch.Tensor]]]
RENAMED = (
    (rf"(^|\.)(?:{'|'.join(WRAPPED)})\.", r"\1"),
    (r"(^|\.)shared\.0\.", r"\1mlp_shared.0."),
    (r"(^|\.)conv_(gamma|beta)\.", r"\1mlp_\2."),
    (r"(^|\.)parametrizations\.weight\.original$", r"\1weight_orig"),
    (r"(^|\.)parametrizations\.weight\.0\._([uv])$", r"\1weight_\2"),
)
OF_EACH_NETWORK = re.compile(  # what stands before it is the network's prefix
    r"(|.*\.)(?:conv_img\.weight|fc_mu\.weight|discriminator_0\.model0\.0\.weight)"
)
COUNTERS = ("num_batches_tracked", "n_averaged")  # of batches and of averages: old files lack them


class Part(NamedTuple):
    """Weights that belong together, named as here."""

    name: str  # of the dictionaries and the prefix that they are in, with dots between
    tensors: dict[str, torch.Tensor]
    written: dict[str, Any] | None  # the network and its arguments
    is_whole: bool  # whether nothing else lies beside them in their dictionary


def dictionaries(source: Source) -> Dictionaries:
    """All (name, dictionary of tensors) in what something is or is the path of. Errors: ValueError
    where there are none, an UnreadableFile of a path.
    """
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    source = source if path is None else contents(path)
    found = list(_dictionaries_in(source)) if isinstance(source, Mapping) else []
    if not found and source != {}:
        shown = (
            f"a dictionary of {first_of(list(map(str, source)))}"
            if isinstance(source, Mapping)
            else type(source).__name__
        )
        if path is not None:
            raise unreadable(path, f"it has {shown} in it")
        raise ValueError(
            f"source is {shown}, it should be a state_dict, names and tensors, or the path of one"
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
    """A Part for each network that is known. Errors: ValueError if there are none."""
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
    """The prefixes of known networks in a dictionary that has the names as here."""
    matches = [
        OF_EACH_NETWORK.fullmatch(key) for key, tensor in weights.items() if tensor.dim() > 1
    ]
    return sorted({match[1] for match in matches if match})


def networks_of(part: Part) -> list[Part]:
    return [part] if part.written else known_networks([("", part.tensors)])


def parts_like(wanted: dict[str, torch.Tensor], dictionaries: Dictionaries) -> list[Part]:
    """A Part for each dictionary and each prefix that some of the names in it have before those
    that are wanted; the ones with most of these first.
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
    """The weights with a prefix in a dictionary, which `renamed` has named as here."""
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
    """Those that `key` names, all of them where it is None. Errors: ValueError if it names none."""
    if key is None:
        return parts
    found = [part for part in parts if part.name == key] or [
        part for part in parts if f".{key}." in f".{part.name}."
    ]
    if not found:
        names = ", ".join(repr(part.name) for part in parts)
        raise ValueError(f"key is {key!r}, it should be one of {names}")
    return found


def choose(parts: list[Part], key: str | None) -> Part:
    """The one Part that there is, or that has this name. Errors: ValueError if nothing says which
    it is.
    """
    parts = with_name(parts, key)
    names = ", ".join(repr(part.name) for part in parts)
    if len(parts) > 1:
        raise ValueError(f"several are there, key should say which of them: {names}")
    if key is None and not parts[0].is_whole:
        raise ValueError(f"other weights are there beside these, which key={names} takes alone")
    return parts[0]


def named_as_here(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state_dict with the names of this project's modules, and all that spectral norm needs."""
    renamed = {_renamed(key): tensor for key, tensor in weights.items()}
    if len(renamed) < len(weights):
        twice = Counter(map(_renamed, weights)).most_common(1)[0][0]
        raise ValueError(
            "two of these weights are the same here, one of them should be left out:"
            f" {' and '.join(key for key in weights if _renamed(key) == twice)}"
        )
    for key in [key for key in renamed if key.rpartition(".")[2] == "weight_orig"]:
        prefix = key.removesuffix("_orig")
        divided = renamed.pop(prefix, None)  # by σ: old versions keep it
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
    """Spectral norm's v for a weight and its u, so that σ = u · W v is what the weight was divided
    by, or else what it would be.
    """
    v = torch.mv(weight.flatten(1).t(), u)
    if divided is None:
        return F.normalize(v, dim=0)
    largest = weight.abs().argmax()
    factor = weight.flatten()[largest] / divided.flatten()[largest] / v.square().sum()
    return torch.where(factor.isfinite(), v * factor, F.normalize(v, dim=0))  # W, or W u, may be 0


def _own_names(own):
    """Names as here, without DataParallel's prefix, to the own names in a module's state_dict."""
    names = {_renamed(key): key for key, tensor in own.items() if isinstance(tensor, torch.Tensor)}
    while any(key not in COUNTERS for key in names) and all(
        key.startswith("module.") or key in COUNTERS for key in names
    ):
        names = {key.removeprefix("module."): own_name for key, own_name in names.items()}
    return names


def wanted_of(own: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A module's state_dict, with names as here."""
    return {key: own[name] for key, name in _own_names(own).items()}


def differences(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """What does not fit, in words."""
    both = [key for key in wanted if key in weights]
    lists = {
        "is missing": [key for key in wanted if key not in weights and not key.endswith(COUNTERS)],
        "is not known": [key for key in weights if key not in wanted and key not in COUNTERS],
        "has another shape": [
            f"{key} {list(weights[key].shape)} for {list(wanted[key].shape)}"
            for key in both
            if weights[key].shape != wanted[key].shape
        ],
        "is not of floating-point numbers": [
            f"{key} {weights[key].dtype}"
            for key in both
            if wanted[key].is_floating_point() and not weights[key].is_floating_point()
        ],
        "has no values": [key for key in both if weights[key].is_meta and not wanted[key].is_meta],
    }
    return [f"{first_of(keys)} {what}" for what, keys in lists.items() if keys]


def fill(module: Model, weights: dict[str, torch.Tensor]) -> Model:
    """The module, with weights that fit it; after an error it is as it was."""
    own = module.state_dict()
    before = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in own.items()
    }
    given = {name: weights[key] for key, name in _own_names(own).items() if key in weights}
    try:
        module.load_state_dict(before | given)
    except Exception:
        with contextlib.suppress(Exception):  # of the tensor that nothing can be copied into
            module.load_state_dict(before)
        raise
    return module


def unknown(keys: Iterable[str]) -> ValueError:
    return ValueError(
        "they are of no network that is known here:"
        f" {', '.join(list(keys)[:MOST_LISTED]) or 'there are none'} …"
    )
