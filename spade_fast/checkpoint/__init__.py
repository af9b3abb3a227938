"""Loads weights from files, writes them, and finds out which network they belong to.

Every state_dict of a network of this package, and every file written here, contains the arguments
that made the network. Other weights are identified by names and shapes: the published
`latest_net_{G,D,E}.pth`, with spectral norm in any form that PyTorch has used (`weight_orig`,
`weight_u` with or without `weight_v`; `parametrizations.weight.…`), and the names of the paper's
sketch (`shared.0`, `conv_gamma`, `conv_beta`). Prefixes of DataParallel, torch.compile or an
enclosing module are accepted, and so are nested dictionaries (`{"state_dict": …}`, `{"ema": …}`).
Files are `.safetensors`, or files of torch.save, which are read with weights_only=True.
"""

from typing import Any

import torch
import torch.nn as nn

from ..nn.modules import Model, check_module
from .files import UnreadableFile, write
from .networks import Description, described, fitting
from .parts import (
    Part,
    Source,
    choose,
    dictionaries,
    differences,
    fill,
    known_networks,
    named_as_here,
    networks_of,
    parts_like,
    prefixes,
    wanted_of,
    with_name,
)

__all__ = [
    "Description",
    "UnreadableFile",
    "describe",
    "load",
    "load_into",
    "named_as_here",
    "read",
    "write",
]


def load(source: Source, *, key: str | None = None, **arguments: Any) -> nn.Module:
    """Makes the network that these weights belong to, with the weights loaded, in eval mode.

    Its arguments are those that you give, and otherwise those written beside the weights. If none
    are written there, names and shapes determine most arguments, but not:

    - the size and the number of doublings of a published generator (`crop_size`, `aspect_ratio`,
      `num_upsampling_layers`): with 184, 151 or 36 channels they are assumed to be those of the
      published COCO, ADE20K and Cityscapes generators. If you give `dataset` or some of the three,
      the others are those of that data set, or of `SPADEGenerator.official` for that number of
      channels.
    - `start`, `last_scale` and the scales of the stages of any other generator: one with the names
      of the paper's sketch, and a first map of as many pixels, is assumed to be that sketch. If you
      give `stages`, the rest are the defaults of SPADEGenerator.
    - the norm: weights with running moments are assumed to be "syncbatch", as published ("batch"
      gives the same numbers in eval mode), those without "instance". Give `norm_G` for "group".

    If that leaves several networks possible, the error names the arguments that decide.

    Args:
        source: a path, a state_dict, or a dictionary that contains state_dicts.
        key: selects one of several networks: "ema", "netG", or a dotted path of names.
        arguments: of the network's constructor, or of `SPADEGenerator.official`.

    Raises:
        ValueError: if the weights fit no known network, or several: the message says what does not
            fit, or which arguments decide.
        TypeError: if an argument is not one of that network's.
        OSError, UnreadableFile: if the file cannot be read, see `read`.
    """
    part = choose(known_networks(dictionaries(source)), key)
    network, found = described(part, arguments)
    return fill(network(**found), part.tensors).eval()


def load_into(module: Model, source: Source, *, key: str | None = None) -> Model:
    """Loads weights from a path or a state_dict into a module, and returns the module. All forms of
    names that `load` knows are accepted. Arguments written beside the weights are ignored: only
    names and shapes have to fit.

    key: selects one of several networks, as for `load`. It may be omitted if only one fits.

    Errors: ValueError if the weights do not fit: the message names keys and shapes, and the network
        that the weights look like; TypeError if the module is not one. After any error the module
        is unchanged.
    """
    check_module("module", module)
    wanted = wanted_of(module.state_dict())
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError(
            f"this {type(module).__name__} is on the meta device; it should be in memory: call"
            " to_empty(device=…) first"
        )
    parts = with_name(parts_like(wanted, dictionaries(source)), key)
    found = [part for part in parts if not differences(part.tensors, wanted)]
    if found:
        return fill(module, choose(found, key).tensors)
    part = parts[0]
    try:
        first, *others = fitting(choose(networks_of(part), None), {})
        looks_like = f"they look like those of {first}"
        looks_like += " or of another network with the same names and shapes" if others else ""
    except (TypeError, ValueError) as error:
        looks_like = str(error)
    raise ValueError(
        f"these weights do not fit this {type(module).__name__}:"
        f" {'; '.join(differences(part.tensors, wanted))}. {looks_like}"
    )


def read(path: Source, *, key: str | None = None) -> dict[str, torch.Tensor]:
    """The state_dict in a file, on the CPU, with its names unchanged.

    key: selects one of several state_dicts, as for `load`.

    Errors: FileNotFoundError or IsADirectoryError; UnreadableFile, a ValueError, if the file
        contains no weights, is incomplete, or would run code.
    """
    found = dictionaries(path)
    parts = [Part(name, weights, None, True) for name, weights in found]
    if key is None and len(parts) > 1:
        parts = [part for part in parts if prefixes(named_as_here(part.tensors))] or parts
    return choose(parts, key).tensors


def describe(weights: Source, **arguments: Any) -> Description:
    """The Description of the network that these weights, a state_dict or a path, belong to. The
    arguments are those of `load`. Errors: ValueError if they fit no known network, or several.
    """
    return described(choose(known_networks(dictionaries(weights)), None), arguments)
