"""Weights in files: which network they are of, found by names and shapes alone, and how they get in
and out.

Known are the published `latest_net_{G,D,E}.pth`, with spectral norm's vectors as PyTorch has had
them (`weight_orig`, `weight_u` with `weight_v` or without; `parametrizations.weight.…`), what
DataParallel makes of them, and the names of the paper's sketch (`shared.0`, `conv_gamma`,
`conv_beta`). Files are `.safetensors`, or else what torch.save writes, read with weights_only=True.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .nn import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator
from .nn.generator import DOUBLINGS, PUBLISHED, Published

RENAMED = (
    (r"^module\.", ""),  # DataParallel
    (r"(^|\.)shared\.0\.", r"\1mlp_shared.0."),
    (r"(^|\.)conv_(gamma|beta)\.", r"\1mlp_\2."),
    (r"\.parametrizations\.weight\.original$", ".weight_orig"),
    (r"\.parametrizations\.weight\.0\._([uv])$", r".weight_\1"),
)
MOST_LISTED = 5  # of the keys that do not fit, in a message


class Description(NamedTuple):
    """A network, and the arguments that make it."""

    network: Callable  # what is called with them
    name: str
    arguments: dict

    def __str__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({arguments})"


def load(source, **arguments):
    """The network whose weights these are, with them, in eval mode.

    Args:
        source: a path, or a state_dict.
        arguments: of the network's constructor, instead of what is found: of a published generator
            `num_upsampling_layers`, `crop_size` and `aspect_ratio` are not in its weights, and are
            those of the dataset with as many channels.

    Raises:
        ValueError: they are of no network that is known, or do not fit; the message says what does
            not.
    """
    weights = named_as_here(_state_dict(source))
    network, name, found = describe(weights)
    return load_into(network(**found | arguments), weights).eval()


def load_into(module, source):
    """Gives a module these weights, a path's or a state_dict's, whatever names they have. Returns
    the module.

    Errors: ValueError if they do not fit: the message names keys and shapes, and says what they
        look like. The module is then as it was.
    """
    weights = named_as_here(_state_dict(source))
    wanted = module.state_dict()
    lists = {
        "is missing": [key for key in wanted if key not in weights],
        "is not known": [key for key in weights if key not in wanted],
        "has another shape": [
            f"{key} {list(weights[key].shape)} for {list(wanted[key].shape)}"
            for key in wanted
            if key in weights and weights[key].shape != wanted[key].shape
        ],
    }
    problems = [f"{_first_of(keys)} {what}" for what, keys in lists.items() if keys]
    if problems:
        try:
            looks_like = f"they look like those of {describe(weights)}"
        except ValueError as error:
            looks_like = str(error)
        raise ValueError(
            f"these weights do not fit this {type(module).__name__}: {'; '.join(problems)}."
            f" {looks_like}"
        )
    module.load_state_dict(weights)
    return module


def _first_of(keys):
    more = len(keys) - MOST_LISTED
    return ", ".join(keys[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def read(path):
    """The state_dict in a file, on the CPU, as it is. Errors: FileNotFoundError; ValueError where
    there is none in it.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _safetensors("to read").load_file(path)
    return _state_dict(torch.load(path, map_location="cpu", weights_only=True))


def write(source, path):
    """Writes a module's state_dict, or a state_dict, to a file: as `.safetensors`, or as torch.save
    does. What was there stays until all is written.
    """
    path = Path(path)
    weights = source.state_dict() if isinstance(source, nn.Module) else source
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder:
        written = Path(folder, path.name)
        if path.suffix == ".safetensors":
            _safetensors("to write").save_file(
                {key: tensor.detach().contiguous().clone() for key, tensor in weights.items()},
                written,
            )
        else:
            torch.save(weights, written)
        os.replace(written, path)


def describe(weights):
    """The Description of the network that these weights, a state_dict named as here, are of.
    Errors: ValueError if they are of none.
    """
    if "discriminator_0.model0.0.weight" in weights:
        ndf, input_nc, *taps = weights["discriminator_0.model0.0.weight"].shape
        scales = len({key.split(".")[0] for key in weights})
        return Description(
            MultiscaleDiscriminator,
            "MultiscaleDiscriminator",
            {"input_nc": input_nc, "n_scales": scales, "ndf": ndf, "spatial_dims": len(taps)},
        )
    if "fc_mu.weight" in weights and "layer1.0.weight_orig" in weights:
        ndf, input_nc, *_ = weights["layer1.0.weight_orig"].shape
        return Description(
            ConvEncoder,
            "ConvEncoder",
            {"ndf": ndf, "z_dim": weights["fc_mu.weight"].shape[0], "input_nc": input_nc},
        )
    for head in ("head_0", "head"):
        if (
            f"{head}.norm_0.mlp_shared.0.weight" in weights
            and "fc.weight" in weights
            and "conv_img.weight" in weights
        ):
            return _describe_generator(weights, head)
    raise ValueError(
        "they are of no network that is known here:"
        f" {', '.join(list(weights)[:MOST_LISTED]) or 'there are none'} …"
    )


def _describe_generator(weights, head):
    """Of a generator whose first block has this name."""
    shared, first = weights[f"{head}.norm_0.mlp_shared.0.weight"], weights["fc.weight"]
    nhidden, label_nc, *taps = shared.shape
    ngf = len(weights[f"{head}.conv_0.bias"]) // 16
    spectral = "spectral" if f"{head}.conv_0.weight_orig" in weights else ""
    norm = "syncbatch" if f"{head}.norm_0.param_free_norm.running_mean" in weights else "instance"
    norm_G = f"{spectral}spade{norm}{taps[0]}x{taps[0]}"
    z_dim = first.shape[1] if first.dim() == 2 else None
    places = len(first) // (16 * ngf)  # of the first map, where z makes it
    if head == "head":
        start = round(places ** (1 / len(taps))) if z_dim else 4
        return Description(
            SPADEGenerator,
            "SPADEGenerator",
            {
                "label_nc": label_nc,
                "z_dim": z_dim,
                "ngf": ngf,
                "start": start,
                "norm_G": norm_G,
                "nhidden": nhidden,
                "output_nc": weights["conv_img.weight"].shape[0],
                "spatial_dims": len(taps),
            },
        )
    dataset = next(
        (name for name, published in PUBLISHED.items() if published.label_nc == label_nc), label_nc
    )
    published = PUBLISHED.get(dataset, Published(label_nc))
    layers = "most" if "up_4.conv_0.bias" in weights else published.num_upsampling_layers
    arguments = {
        "dataset": dataset,
        "num_upsampling_layers": layers,
        "norm_G": norm_G,
        "ngf": ngf,
        "nhidden": nhidden,
    }
    if z_dim is not None:
        width = round((places * published.aspect_ratio) ** 0.5)
        arguments |= {"use_vae": True, "z_dim": z_dim, "crop_size": width << DOUBLINGS[layers]}
    return Description(SPADEGenerator.official, "SPADEGenerator.official", arguments)


def named_as_here(weights):
    """A state_dict with the names of this project's modules, and all that spectral norm needs."""
    renamed = {}
    for key, tensor in weights.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    for key in [key for key in renamed if key.endswith(".weight_orig")]:
        prefix = key.removesuffix("_orig")
        divided = renamed.pop(prefix, None)  # by σ: old versions keep it
        if f"{prefix}_v" not in renamed and f"{prefix}_u" in renamed:
            renamed[f"{prefix}_v"] = _right_vector(renamed[key], renamed[f"{prefix}_u"], divided)
    return renamed


def _right_vector(weight, u, divided):
    """Spectral norm's v for a weight and its u, so that σ = u · W v is what the weight was divided
    by, or else what it would be.
    """
    v = torch.mv(weight.flatten(1).t(), u)
    if divided is None:
        return F.normalize(v, dim=0)
    largest = weight.abs().argmax()
    return v * (weight.flatten()[largest] / divided.flatten()[largest] / v.square().sum())


def _state_dict(source):
    """The state_dict that something is, has in it, or is the path of."""
    if isinstance(source, (str, os.PathLike)):
        return read(source)
    if isinstance(source, dict) and isinstance(source.get("state_dict"), dict):
        source = source["state_dict"]
    if not isinstance(source, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in source.values()
    ):
        shown = (
            f"a dictionary of {', '.join(map(str, list(source)[:MOST_LISTED]))}"
            if isinstance(source, dict)
            else type(source).__name__
        )
        raise ValueError(
            f"source is {shown}, it should be a state_dict, names and tensors, or the path of one"
        )
    return source


def _safetensors(purpose):
    try:
        import safetensors.torch
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{purpose} .safetensors this needs: pip install safetensors ({error})"
        ) from error
    return safetensors.torch
