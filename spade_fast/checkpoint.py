"""Weights in files: how they get in and out, and which network they are of.

What is written here, and every state_dict of a network of this package, says with which arguments
the network was made. Of other weights names and shapes say what can be known. Known are the
published `latest_net_{G,D,E}.pth`, with spectral norm's vectors as PyTorch has had them
(`weight_orig`, `weight_u` with `weight_v` or without; `parametrizations.weight.…`), and the names
of the paper's sketch (`shared.0`, `conv_gamma`, `conv_beta`); with the prefixes of DataParallel,
torch.compile or a module around them; within dictionaries (`{"state_dict": …}`, `{"ema": …}`).
Files are `.safetensors`, or else what torch.save writes, read with weights_only=True.
"""

import contextlib
import inspect
import json
import math
import os
import pickle
import re
import tempfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .nn import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator
from .nn.arguments import ENTRY
from .nn.generator import (
    DOUBLINGS,
    FROM_NOISE,
    PUBLISHED,
    official_arguments,
    published_settings,
    published_stages,
)

RENAMED = (
    (r"(^|\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.", r"\1"),
    (r"(^|\.)shared\.0\.", r"\1mlp_shared.0."),
    (r"(^|\.)conv_(gamma|beta)\.", r"\1mlp_\2."),
    (r"(^|\.)parametrizations\.weight\.original$", r"\1weight_orig"),
    (r"(^|\.)parametrizations\.weight\.0\._([uv])$", r"\1weight_\2"),
)
NETWORKS = {
    network.__name__: network for network in (SPADEGenerator, MultiscaleDiscriminator, ConvEncoder)
}
OF_EACH_NETWORK = re.compile(  # what stands before it is the network's prefix
    r"(|.*\.)(?:conv_img\.weight|fc_mu\.weight|discriminator_0\.model0\.0\.weight)"
)
COUNTERS = ("num_batches_tracked", "n_averaged")  # of batches and of averages: old files lack them
FIRST_CONVOLUTION = ".norm_0.mlp_shared.0.weight"  # of a block
SETTINGS = ("num_upsampling_layers", "crop_size", "aspect_ratio")  # of a published generator
OFFICIAL = ("dataset", *SETTINGS, "use_vae")  # `official` has them, SPADEGenerator does not
WIRING = ("label_nc", "stages", "last_scale", "start")  # what `official` makes of its own ones
EXAMPLES = ((256, 256), (512, 512), (256, 512))  # of height and width, which may be any
MOST_LISTED = 5  # of the keys that do not fit, or of the networks that do, in a message


class Description(NamedTuple):
    """A network, and the arguments that make it."""

    network: type
    arguments: dict

    def as_made(self):
        """Name and arguments of what is called to make it."""
        official = _as_official(self.arguments) if self.network is SPADEGenerator else None
        if official is None:
            return self.network.__name__, self.arguments
        return f"{self.network.__name__}.official", official

    def __str__(self):
        name, arguments = self.as_made()
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


class Part(NamedTuple):
    """Weights that belong together, named as here."""

    name: str  # of the dictionaries and the prefix that they are in, with dots between
    tensors: dict
    written: dict | None  # the network and its arguments
    is_whole: bool  # whether nothing else lies beside them in their dictionary


def load(source, *, key: str | None = None, **arguments) -> nn.Module:
    """The network whose weights these are, with them, in eval mode.

    The arguments that made it are those that you give and, of the others, those that are written
    beside the weights. Where none are, names and shapes say most. They do not say:

    - the size and the doublings of a published generator (`crop_size`, `aspect_ratio`,
      `num_upsampling_layers`): with 184, 151 or 36 channels they are assumed to be those of the
      published COCO, ADE20K and Cityscapes. Where you give some of the three or `dataset`, the
      others are those of that dataset, or of `SPADEGenerator.official` for a number of channels.
    - `start`, `last_scale` and the stages' scales of another generator: one with the names and
      the first map's number of places of the paper's sketch is taken for that. Where you give
      `stages`, the rest is as SPADEGenerator has it by default.
    - the norm: running moments are taken for "syncbatch", as published ("batch" gives the same
      numbers in eval mode), none for "instance": `norm_G` says "group".

    Whatever is left open by that is asked for.

    Args:
        source: a path, or a state_dict, or a dictionary with state_dicts in it.
        key: which of several it is, as "ema" or "netG", or a path of names with dots.
        arguments: of the network's constructor, or of `SPADEGenerator.official`.

    Raises:
        ValueError: the weights are of no network that is known, do not fit, or fit several: the
            message says what does not, or which arguments decide. Or there is no such file of
            weights: see `read`.
    """
    part = _choose(_networks(_dictionaries(source)), key)
    network, found = _described(part, arguments)
    return _fill(network(**found), part.tensors).eval()


def load_into(module: nn.Module, source, *, key: str | None = None) -> nn.Module:
    """Gives a module these weights, a path's or a state_dict's, whatever names they have. Returns
    the module. What is written beside them is not looked at: it is the names and the shapes that
    have to fit.

    key: which of several it is, as for `load`; where only one fits it need not be said.

    Errors: ValueError if they do not fit: the message names keys and shapes, and says what they
        look like. The module is then as it was, after any other error too.
    """
    wanted = _wanted(module.state_dict())
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError(
            f"this {type(module).__name__} is on the meta device, it should have memory:"
            " to_empty(device=…) gives it some"
        )
    parts = _with_name(_parts_like(wanted, _dictionaries(source)), key)
    fitting = [part for part in parts if not _differences(part.tensors, wanted)]
    if fitting:
        return _fill(module, _choose(fitting, key).tensors)
    part = parts[0]
    try:
        looks_like = f"they look like those of {_described(_choose(_networks_of(part), None), {})}"
    except (TypeError, ValueError) as error:
        looks_like = str(error)
    raise ValueError(
        f"these weights do not fit this {type(module).__name__}:"
        f" {'; '.join(_differences(part.tensors, wanted))}. {looks_like}"
    )


def read(path, *, key: str | None = None) -> dict:
    """The state_dict in a file, on the CPU, as it is.

    key: which of several it is, as for `load`.

    Errors: FileNotFoundError; IsADirectoryError; ValueError where there is none in it, or it is no
        file of weights, or a part of one; pickle.UnpicklingError where it would run code.
    """
    found = _dictionaries(path)
    parts = [Part(name, weights, None, True) for name, weights in found]
    if key is None and len(parts) > 1:
        parts = [part for part in parts if _prefixes(named_as_here(part.tensors))] or parts
    return _choose(parts, key).tensors


def write(source, path) -> None:
    """Writes a module's state_dict, or a state_dict, to a file: as `.safetensors`, or as torch.save
    does. What was there stays until all is written, and so do its permissions.

    The state_dict of a network of this package has the arguments that made it in its metadata, and
    so has the file: `load` makes the same network of it. `load_state_dict` and torch.load find
    nothing in it that they do not know.

    Errors: OSError, if there is no such folder, `path` is no file or the disk is full; TypeError or
        what torch.save raises, if something cannot be written.
    """
    path = Path(os.path.realpath(path))  # what a link points to is written, the link stays
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} should be a folder to write {path.name} into")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, it should be a file")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a device or the like, it should be a file")
    weights = source.state_dict() if isinstance(source, nn.Module) else source
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".spade_fast.") as folder:
        written = Path(folder, "weights")
        written.touch()  # with the permissions that new files have
        permissions = (path if path.exists() else written).stat().st_mode & 0o777
        try:
            if _is_safetensors(path):
                _write_safetensors(weights, written)
            else:
                with open(written, "wb") as file:
                    torch.save(weights, file)
        except Exception as error:
            _raise_of_system(error, path)
            raise
        written.chmod(permissions)
        os.replace(written, path)


def describe(weights, **arguments) -> Description:
    """The Description of the network that these weights, a state_dict, are of; arguments as for
    `load`. Errors: ValueError if they are of none, or may be of several.
    """
    return _described(_choose(_networks(_dictionaries(weights)), None), arguments)


def named_as_here(weights: dict) -> dict:
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
    return v * (weight.flatten()[largest] / divided.flatten()[largest] / v.square().sum())


# What is in a file, and which of it.


def _dictionaries(source):
    """All (name, dictionary of tensors) in what something is or is the path of. Errors: ValueError
    where there are none.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _contents(Path(source))
    found = list(_dictionaries_in(source)) if isinstance(source, dict) else []
    if not found and source != {}:
        shown = (
            f"a dictionary of {_first_of(list(map(str, source)))}"
            if isinstance(source, dict)
            else type(source).__name__
        )
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
            tensors._metadata = source._metadata
        yield name, tensors
    for key, value in named.items():
        if isinstance(value, dict):
            yield from _dictionaries_in(value, f"{name}.{key}".lstrip("."))


def _networks(dictionaries):
    """A Part for each network that is known. Errors: ValueError if there are none."""
    parts = [
        _part(name, weights, renamed, prefix)
        for name, weights in dictionaries
        for renamed in [named_as_here(weights)]
        for prefix in _prefixes(renamed)
    ]
    if not parts:
        raise _unknown(key for _, weights in dictionaries for key in weights)
    return parts


def _prefixes(weights):
    """Of the networks that are known, in a dictionary that has the names as here."""
    matches = [
        OF_EACH_NETWORK.fullmatch(key) for key, tensor in weights.items() if tensor.dim() > 1
    ]
    return sorted({match[1] for match in matches if match})


def _networks_of(part):
    return [part] if part.written else _networks([("", part.tensors)])


def _parts_like(wanted, dictionaries):
    """A Part for each dictionary and each prefix that some of the names in it have before those
    that are wanted; the ones with most of these first.
    """
    parts = []
    for name, weights in dictionaries:
        renamed, found = named_as_here(weights), Counter()
        for key in renamed:
            steps = key.split(".")
            for depth in range(len(steps)):
                if ".".join(steps[depth:]) in wanted:
                    found["".join(f"{step}." for step in steps[:depth])] += 1
        for prefix, count in (found or {"": 0}).items():
            parts.append((count, _part(name, weights, renamed, prefix)))
    return [part for _, part in sorted(parts, key=lambda pair: -pair[0])]


def _part(name, weights, renamed, prefix):
    """Of the weights in a dictionary, which `renamed` has named as here, those with a prefix."""
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


def _with_name(parts, key):
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


def _choose(parts, key):
    """The one Part that there is, or that has this name. Errors: ValueError if nothing says which
    it is.
    """
    parts = _with_name(parts, key)
    names = ", ".join(repr(part.name) for part in parts)
    if len(parts) > 1:
        raise ValueError(f"several are there, key should say which of them: {names}")
    if key is None and not parts[0].is_whole:
        raise ValueError(f"other weights are there beside these, which key={names} takes alone")
    return parts[0]


# Whether weights fit.


def _own_names(own):
    """Of a module's state_dict: names as here, without DataParallel's prefix, to its own names."""
    names = {_renamed(key): key for key, tensor in own.items() if isinstance(tensor, torch.Tensor)}
    while any(key not in COUNTERS for key in names) and all(
        key.startswith("module.") or key in COUNTERS for key in names
    ):
        names = {key.removeprefix("module."): own_name for key, own_name in names.items()}
    return names


def _wanted(own):
    """A module's state_dict, with names as here."""
    return {key: own[name] for key, name in _own_names(own).items()}


def _differences(weights, wanted):
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
    return [f"{_first_of(keys)} {what}" for what, keys in lists.items() if keys]


def _first_of(keys):
    more = len(keys) - MOST_LISTED
    return ", ".join(keys[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _fill(module, weights):
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


# Which network weights are of.


def _described(part, given):
    """The Description of the network, of the arguments given and those found. Errors: ValueError if
    there is none or more than one that fits.
    """
    problems, fitting = {}, []
    for description in _candidates(part, given):
        _check_names(description)
        with torch.device("meta"):
            network = description.network(**description.arguments)
        description = Description(description.network, network.arguments)
        problems[str(description)] = _differences(part.tensors, _wanted(network.state_dict()))
        if not problems[str(description)] and description not in fitting:
            fitting.append(description)
    if len(fitting) == 1:
        return fitting[0]
    if not problems:
        raise _unknown(part.tensors)
    if not fitting:
        nearest = min(problems, key=lambda name: len(problems[name]))
        raise ValueError(
            f"they are like those of {nearest}, but do not fit: {'; '.join(problems[nearest])}"
        )
    raise ValueError(_question(fitting))


def _check_names(description):
    """Errors: TypeError if an argument is given that the network does not have."""
    known = inspect.signature(description.network).parameters
    for name in description.arguments:
        if name not in known:
            raise TypeError(
                f"{name} is no argument of {description.network.__name__}, which has"
                f" {', '.join(known)}"
            )


def _question(fitting):
    """What to give, where several Descriptions fit."""
    shown = [description.as_made() for description in fitting]
    deciding = [
        name
        for name in shown[0][1]
        if any(arguments.get(name) != shown[0][1][name] for _, arguments in shown)
    ]
    networks = [
        f"{made}({', '.join(f'{name}={arguments.get(name)!r}' for name in deciding)}, …)"
        for made, arguments in shown
    ]
    return (
        f"they fit several networks, such as {_first_of(networks)}: {' or '.join(deciding)}"
        f" should be given, what is left out is as {shown[0][0]} has it"
    )


def _candidates(part, given):
    """Descriptions of what the weights may be of; they are still to be checked."""
    weights = part.tensors
    if _is_among(OFFICIAL, given):
        for name in WIRING:
            if name in given:
                raise TypeError(
                    f"{name} is no argument of SPADEGenerator.official, it cannot be given with"
                    f" {', '.join(name for name in OFFICIAL if name in given)}"
                )
    if part.written is not None:
        name, arguments = part.written["network"], part.written["arguments"]
        if name not in NETWORKS:
            raise ValueError(
                f"they are of {name}, which is not known here: load_into a module of that class"
            )
        return [Description(NETWORKS[name], _merged(NETWORKS[name], arguments, given))]
    if "discriminator_0.model0.0.weight" in weights:
        return [Description(MultiscaleDiscriminator, _of_discriminator(weights) | given)]
    if "fc_mu.weight" in weights and "layer1.0.weight_orig" in weights:
        ndf, input_nc, *_ = _shape(weights, "layer1.0.weight_orig")
        found = {"ndf": ndf, "z_dim": len(weights["fc_mu.weight"]), "input_nc": input_nc}
        return [Description(ConvEncoder, found | given)]
    blocks = {
        key.removesuffix(FIRST_CONVOLUTION) for key in weights if key.endswith(FIRST_CONVOLUTION)
    }
    if not blocks or "fc.weight" not in weights or "conv_img.weight" not in weights:
        raise _unknown(weights)
    if not _is_among(OFFICIAL, given) and (
        _is_among((*WIRING, "spatial_dims", "output_nc"), given)
        or not _published_layers(blocks)
        or weights["conv_img.weight"].dim() != 4
    ):
        return _generators(weights, blocks, given)
    return _official_generators(weights, blocks, given)


def _is_among(names, given):
    return any(name in given for name in names)


def _unknown(keys):
    return ValueError(
        "they are of no network that is known here:"
        f" {', '.join(list(keys)[:MOST_LISTED]) or 'there are none'} …"
    )


def _shape(weights, key):
    """Of a convolution's weights."""
    shape = weights[key].shape
    if len(shape) < 3:
        raise ValueError(f"{key} has the shape {list(shape)}, which no convolution's weights have")
    return shape


def _of_discriminator(weights):
    ndf, input_nc, *taps = _shape(weights, "discriminator_0.model0.0.weight")
    scales, layers = (
        {key.split(".")[depth] for key in weights if key.startswith(prefix)}
        for depth, prefix in ((0, "discriminator_"), (1, "discriminator_0.model"))
    )
    return {
        "input_nc": input_nc,
        "n_scales": len(scales),
        "ndf": ndf,
        "n_layers": max(1, len(layers) - 1),
        "spatial_dims": len(taps),
    }


def _of_any_generator(weights, first):
    """What names and shapes say of a generator whose first block has this name."""
    nhidden, label_nc, *taps = _shape(weights, f"{first}{FIRST_CONVOLUTION}")
    is_spectral = f"{first}.conv_0.weight_orig" in weights
    convolution = f"{first}.conv_0.weight{'_orig' if is_spectral else ''}"
    if convolution not in weights:
        raise _unknown(weights)
    norm = "syncbatch" if f"{first}.norm_0.param_free_norm.running_mean" in weights else "instance"
    linear = weights["fc.weight"].dim() == 2
    return {
        "label_nc": label_nc,
        "z_dim": weights["fc.weight"].shape[1] if linear else None,
        "ngf": max(1, _shape(weights, convolution)[1] // 16),
        "norm_G": f"{'spectral' if is_spectral else ''}spade{norm}{taps[0]}x{taps[0]}",
        "nhidden": nhidden,
        "output_nc": len(weights["conv_img.weight"]),
        "spatial_dims": len(taps),
    }


def _places(weights, found):
    """Of the first map, where z makes it, else None; `found` is what the weights say."""
    return None if found["z_dim"] is None else len(weights["fc.weight"]) // (16 * found["ngf"])


def _published_layers(blocks):
    """The doublings with which published generators have just these blocks."""
    return [
        layers
        for layers in DOUBLINGS
        if blocks == {stage.name for stage in published_stages(layers)}
    ]


def _official_generators(weights, blocks, given):
    """What is given of the settings, with the published ones or the defaults for the others, where
    that fits; or else everything that may.
    """
    found = _of_any_generator(weights, "head_0" if "head_0" in blocks else min(blocks))
    places, layers = _places(weights, found), _published_layers(blocks)
    official = {"dataset": _dataset(found["label_nc"])} | {
        name: given[name] for name in OFFICIAL if given.get(name) is not None
    }
    found |= {name: value for name, value in given.items() if name not in OFFICIAL}
    filled = dict(official)
    if len(official) > 1 and layers == ["most"]:  # the default would be another
        filled = {"num_upsampling_layers": "most"} | official
    problem, first = None, []
    try:
        first = [Description(SPADEGenerator, _resolved(filled, found))]
    except ValueError as error:
        problem = error
    decides = any(given.get(name) is not None for name in (*SETTINGS, "dataset"))
    if first and (decides or official["dataset"] in PUBLISHED):
        if _can_be(first[0].arguments, places, blocks):
            return first
    others = [
        Description(SPADEGenerator, _resolved(official | size, found))
        for size in _sizes(places, official, layers)
    ]
    if not others and problem is not None:
        raise problem
    return others or first


def _can_be(arguments, places, blocks):
    """Whether a generator of these arguments has such a first map and such blocks."""
    start, names = arguments["start"], {stage.name for stage in arguments["stages"]}
    return places in (None, math.prod(start)) and names == blocks


def _sizes(places, official, layers):
    """The settings, those that are given among them, with which the first map has so many places;
    where that is not known, examples.
    """
    for number in layers:
        doublings = DOUBLINGS[number]
        starts = (
            [(height >> doublings, width >> doublings) for height, width in EXAMPLES]
            if places is None
            else sorted(_shapes(places, 2), key=lambda start: abs(start[0] - start[1]))
        )
        for height, width in starts:
            settings = dict(zip(SETTINGS, (number, width << doublings, width / height)))
            settings |= {name: official[name] for name in settings if name in official}
            with contextlib.suppress(ValueError):  # of a size that cannot be made
                made = official_arguments(official["dataset"], **settings)
                if places is None or made["start"] == (height, width):
                    yield settings


def _generators(weights, blocks, given):
    """Generators that `official` does not make."""
    if "stages" in given:
        wirings = [(given["stages"], 2)]
    elif blocks == {stage.name for stage in FROM_NOISE}:
        wirings = [(FROM_NOISE, 2)]
    else:
        wirings = [(published_stages(layers), 1) for layers in _published_layers(blocks)]
    if not wirings:
        raise ValueError(
            "they are of a SPADEGenerator with stages of its own, which names and shapes do not"
            f" say: stages should be given, a (name, width, scale) for each of"
            f" {_first_of(sorted(blocks))}"
        )
    for stages, last_scale in wirings:
        first = next((stage[0] for stage in stages), None)
        if first not in blocks:
            raise ValueError(
                f"stages begin with {first!r}, the blocks of these weights are"
                f" {_first_of(sorted(blocks))}"
            )
        found = _of_any_generator(weights, first)
        places, dimensions = _places(weights, found), found["spatial_dims"]
        found |= {"stages": stages, "last_scale": last_scale} | given
        if "start" in given:
            starts = [given["start"]]
        elif places is None:
            starts = [4] if "stages" in given else [4, 8]
        elif places == 4**dimensions and ("stages" in given or stages is FROM_NOISE):
            starts = [4]
        else:
            starts = _shapes(places, dimensions)
        for start in starts:
            yield Description(SPADEGenerator, found | {"start": start})


def _shapes(places, dimensions):
    """All sizes with so many places."""
    if dimensions == 1:
        return [(places,)]
    return [
        (length, *rest)
        for length in range(1, places + 1)
        if places % length == 0
        for rest in _shapes(places // length, dimensions - 1)
    ]


def _merged(network, arguments, given):
    """The arguments of a network, with those that are given, of `official` too, in place of its
    own.
    """
    if network is not SPADEGenerator or not _is_among(OFFICIAL, given):
        return arguments | given
    official = _as_official(arguments)
    if official is None:
        raise ValueError(
            f"{', '.join(name for name in OFFICIAL if name in given)} cannot be given: these are"
            f" weights of {Description(network, arguments)}, which official does not make"
        )
    chosen = {name: given[name] for name in OFFICIAL if given.get(name) is not None}
    others = {name: value for name, value in given.items() if name not in OFFICIAL}
    return _resolved(official | chosen, arguments | others)


def _resolved(official, others):
    """The arguments of a SPADEGenerator, of those of `official` that it does not have and the
    others.
    """
    settings = {name: official.get(name) for name in SETTINGS}
    resolved = others | official_arguments(official["dataset"], **settings)
    if "use_vae" in official:
        z_dim = resolved.get("z_dim") or 256
        resolved["z_dim"] = z_dim if official["use_vae"] else None
    return resolved


def _as_official(arguments):
    """The arguments with which `SPADEGenerator.official` makes the same network; None if it does
    not.
    """
    stages = [tuple(stage) for stage in arguments.get("stages", ())]
    for layers, doublings in DOUBLINGS.items():
        if stages == published_stages(layers) and (
            (arguments["last_scale"], arguments["output_nc"], arguments["spatial_dims"])
            == (1, 3, 2)
        ):
            height, width = arguments["start"]
            official = {
                "dataset": _dataset(arguments["label_nc"]),
                "num_upsampling_layers": layers,
                "crop_size": width << doublings,
                "aspect_ratio": width / height,
                "use_vae": arguments["z_dim"] is not None,
            }
            return official | {
                name: arguments[name]
                for name in ("norm_G", "z_dim", "ngf", "nhidden")
                if arguments[name] is not None
            }
    return None


def _dataset(label_nc):
    """The published one with so many channels, or their number."""
    return next(
        (name for name in PUBLISHED if published_settings(name).label_nc == label_nc), label_nc
    )


# Files.


def _contents(path):
    """What is in a file of weights."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, it should be a file of weights")
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there, it should be a file of weights")
    if not path.is_file():
        raise OSError(f"{path} is a device or the like, it should be a file of weights")
    with open(path, "rb") as file:  # what is wrong with the file system is raised here, as it is
        beginning = file.read(16)
    wrong = f"{path} is no file of weights, or not a whole one"
    if not beginning:
        raise ValueError(f"{wrong}: it is empty")
    try:
        if _is_safetensors(path):
            return _read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of any type, by where it ends or what it is instead
        is_unknown = isinstance(error, pickle.UnpicklingError)
        if is_unknown and "Unsupported operand" not in str(error):
            raise  # it is what torch.save writes, with code in it
        reason = str(error).partition("\n")[0] or repr(error)
        if is_unknown or isinstance(error, KeyError):  # whose messages mean a byte
            reason = f"it begins with {beginning}"
        raise ValueError(f"{wrong}: {reason}") from error


def _raise_of_system(error, path):
    """Raises the OSError that an error comes from, such as a full disk, if it does."""
    if isinstance(error.__context__, OSError):
        raise error.__context__ from None
    number = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors says it
    if number:
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _is_safetensors(path):
    return path.suffix.lower() == ".safetensors"


def _read_safetensors(path):
    with _safetensors("to read").safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        weights = OrderedDict((key, file.get_tensor(key)) for key in file.keys())
    try:
        entries = json.loads(metadata.get(ENTRY, "{}"))
    except ValueError:
        entries = None
    if isinstance(entries, dict):
        weights._metadata = OrderedDict((place, {ENTRY: entry}) for place, entry in entries.items())
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
