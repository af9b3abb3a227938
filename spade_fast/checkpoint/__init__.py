"""Weights in files: how they get in and out, and which network they are of.

What is written here, and every state_dict of a network of this package, says with which arguments
the network was made. What can be known of other weights is said by names and shapes. Known are the
published `latest_net_{G,D,E}.pth`, with spectral norm's vectors as PyTorch has had them
(`weight_orig`, `weight_u` with `weight_v` or without; `parametrizations.weight.…`), and the names
of the paper's sketch (`shared.0`, `conv_gamma`, `conv_beta`); with the prefixes of DataParallel,
torch.compile or a module around them; within dictionaries (`{"state_dict": …}`, `{"ema": …}`).
Files are `.safetensors`, or else what torch.save writes, read with weights_only=True.
"""

from typing import Any

import torch
import torch.nn as nn

from ..nn.modules import Model
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
    part = choose(known_networks(dictionaries(source)), key)
    network, found = described(part, arguments)
    return fill(network(**found), part.tensors).eval()


def load_into(module: Model, source: Source, *, key: str | None = None) -> Model:
    """Gives a module these weights, a path's or a state_dict's, whatever names they have. Returns
    the module. The arguments beside them are not looked at: names and shapes
    have to fit.

    key: which of several it is, as for `load`; where only one fits it need not be said.

    Errors: ValueError if they do not fit: the message names keys and shapes, and says what they
        look like. The module is then as it was, after any other error too.
    """
    wanted = wanted_of(module.state_dict())
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError(
            f"this {type(module).__name__} is on the meta device, it should have memory:"
            " to_empty(device=…) gives it some"
        )
    parts = with_name(parts_like(wanted, dictionaries(source)), key)
    found = [part for part in parts if not differences(part.tensors, wanted)]
    if found:
        return fill(module, choose(found, key).tensors)
    part = parts[0]
    try:
        first, *others = fitting(choose(networks_of(part), None), {})
        looks_like = f"they look like those of {first}"
        looks_like += " or another with the same names and shapes" if others else ""
    except (TypeError, ValueError) as error:
        looks_like = str(error)
    raise ValueError(
        f"these weights do not fit this {type(module).__name__}:"
        f" {'; '.join(differences(part.tensors, wanted))}. {looks_like}"
    )


def read(path: Source, *, key: str | None = None) -> dict[str, torch.Tensor]:
    """The state_dict in a file, on the CPU, as it is.

    key: which of several it is, as for `load`.

    Errors: FileNotFoundError; IsADirectoryError; UnreadableFile, a ValueError, where there is none
        in it, it is no file of weights, or a part of one, or it would run code.
    """
    found = dictionaries(path)
    parts = [Part(name, weights, None, True) for name, weights in found]
    if key is None and len(parts) > 1:
        parts = [part for part in parts if prefixes(named_as_here(part.tensors))] or parts
    return choose(parts, key).tensors


def describe(weights: Source, **arguments: Any) -> Description:
    """The Description of the network that these weights, a state_dict, are of; arguments as for
    `load`. Errors: ValueError if they are of none, or may be of several.
    """
    return described(choose(known_networks(dictionaries(weights)), None), arguments)
