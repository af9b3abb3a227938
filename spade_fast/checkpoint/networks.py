"""Finds the network that weights belong to, from arguments, given or written, names and shapes."""

import contextlib
import inspect
import math
from typing import Any, NamedTuple

import torch

from ..nn import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator
from ..nn.generator import (
    DOUBLINGS,
    FROM_NOISE,
    PUBLISHED,
    official_arguments,
    published_settings,
    published_stages,
)
from .parts import Part, differences, first_of, unknown, wanted_of

Network = SPADEGenerator | MultiscaleDiscriminator | ConvEncoder
NETWORKS: dict[str, type[Network]] = {
    network.__name__: network for network in (SPADEGenerator, MultiscaleDiscriminator, ConvEncoder)
}
FIRST_CONVOLUTION = ".norm_0.mlp_shared.0.weight"  # of a block
SETTINGS = ("num_upsampling_layers", "crop_size", "aspect_ratio")  # of a published generator
OFFICIAL = ("dataset", *SETTINGS, "use_vae")  # arguments of `official` that SPADEGenerator lacks
WIRING = ("label_nc", "stages", "last_scale", "start")  # arguments that `official` computes
EXAMPLES = ((256, 256), (512, 512), (256, 512))  # (height, width); any other size is possible too


class Description(NamedTuple):
    """A network, and the arguments that make it."""

    network: type[Network]
    arguments: dict[str, Any]

    def as_made(self) -> tuple[str, dict[str, Any]]:
        """The name and the arguments of the constructor, or of `official` if that makes the same
        network.
        """
        official = _as_official(self.arguments) if self.network is SPADEGenerator else None
        if official is None:
            return self.network.__name__, self.arguments
        return f"{self.network.__name__}.official", official

    def __str__(self) -> str:
        name, arguments = self.as_made()
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def described(part: Part, given: dict[str, Any]) -> Description:
    """The Description of the network, with the arguments given and those found. Errors: ValueError
    if no network or more than one fits.
    """
    found = fitting(part, given)
    if len(found) > 1:
        raise ValueError(_question(found))
    return found[0]


def fitting(part: Part, given: dict[str, Any]) -> list[Description]:
    """All Descriptions whose networks have exactly these weights. Errors: ValueError if there are
    none.
    """
    problems, found = {}, []
    for description in _candidates(part, given):
        _check_names(description)
        with torch.device("meta"):
            network = description.network(**description.arguments)
        description = Description(description.network, network.arguments)
        problems[str(description)] = differences(part.tensors, wanted_of(network.state_dict()))
        if not problems[str(description)] and description not in found:
            found.append(description)
    if not problems:
        raise unknown(part.tensors)
    if not found:
        nearest = min(problems, key=lambda name: len(problems[name]))
        raise ValueError(
            f"the weights resemble those of {nearest}, but do not fit:"
            f" {'; '.join(problems[nearest])}"
        )
    return found


def _check_names(description):
    """Raises TypeError if an argument is given that the network does not have."""
    known = inspect.signature(description.network).parameters
    for name in description.arguments:
        if name not in known:
            raise TypeError(
                f"{name} is not an argument of {description.network.__name__}, whose arguments are"
                f" {', '.join(known)}"
            )


def _question(found):
    """The error message if several Descriptions fit: which arguments should be given."""
    shown = [description.as_made() for description in found]
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
        f"the weights fit several networks, such as {first_of(networks)}: {' or '.join(deciding)}"
        f" should be given; arguments left out have the defaults of {shown[0][0]}"
    )


def _candidates(part, given):
    """Descriptions of networks that the weights may belong to, not yet checked."""
    weights = part.tensors
    if _is_among(OFFICIAL, given):
        for name in WIRING:
            if name in given:
                raise TypeError(
                    f"{name} is not an argument of SPADEGenerator.official, so it cannot be given"
                    f" with {', '.join(name for name in OFFICIAL if name in given)}"
                )
    if part.written is not None:
        name, arguments = part.written["network"], part.written["arguments"]
        if part.written.get("changed"):
            raise ValueError(
                f"the weights are those of a {name} that was changed after it was made:"
                f" {first_of(part.written['changed'])}. Use load_into with a network that was"
                " changed in the same way"
            )
        if name not in NETWORKS:
            raise ValueError(
                f"the weights are those of {name}, which is not a known network: use load_into with"
                " a module of that class"
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
        raise unknown(weights)
    if not _is_among(OFFICIAL, given) and (
        _is_among((*WIRING, "spatial_dims", "output_nc"), given)
        or not _published_layers(blocks)
        or weights["conv_img.weight"].dim() != 4
    ):
        return _generators(weights, blocks, given)
    return _official_generators(weights, blocks, given)


def _is_among(names, given):
    return any(name in given for name in names)


def _shape(weights, key):
    """The shape of a convolution's weight. Errors: ValueError if the tensor cannot be one."""
    shape = weights[key].shape
    if len(shape) < 3:
        raise ValueError(
            f"{key} has shape {list(shape)}; it should be that of a convolution's weight"
        )
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
    """The arguments of a generator that follow from names and shapes; `first` is the name of its
    first block.
    """
    nhidden, label_nc, *taps = _shape(weights, f"{first}{FIRST_CONVOLUTION}")
    is_spectral = f"{first}.conv_0.weight_orig" in weights
    convolution = f"{first}.conv_0.weight{'_orig' if is_spectral else ''}"
    if convolution not in weights:
        raise unknown(weights)
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
    """The number of pixels of the first map if it is computed from z, else None. `found` are the
    arguments that follow from the weights.
    """
    return None if found["z_dim"] is None else len(weights["fc.weight"]) // (16 * found["ngf"])


def _published_layers(blocks):
    """The values of num_upsampling_layers for which a published generator has these blocks."""
    return [
        layers
        for layers in DOUBLINGS
        if blocks == {stage.name for stage in published_stages(layers)}
    ]


def _official_generators(weights, blocks, given):
    """The generator with the given settings, and published or default values for the others, if
    that fits; otherwise all generators that may fit.
    """
    found = _of_any_generator(weights, "head_0" if "head_0" in blocks else min(blocks))
    places, layers = _places(weights, found), _published_layers(blocks)
    official = {"dataset": _dataset(found["label_nc"])} | {
        name: given[name] for name in OFFICIAL if given.get(name) is not None
    }
    found |= {name: value for name, value in given.items() if name not in OFFICIAL}
    filled = dict(official)
    if len(official) > 1 and layers == ["most"]:  # the default would not fit
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
    """Whether a generator with these arguments has `places` pixels in its first map, and these
    blocks.
    """
    start, names = arguments["start"], {stage.name for stage in arguments["stages"]}
    return places in (None, math.prod(start)) and names == blocks


def _sizes(places, official, layers):
    """The settings, including those that are given, for which the first map has `places` pixels; if
    `places` is None, examples.
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
            with contextlib.suppress(ValueError):  # this size is not possible
                made = official_arguments(official["dataset"], **settings)
                if places is None or made["start"] == (height, width):
                    yield settings


def _generators(weights, blocks, given):
    """Descriptions of generators that `official` does not make."""
    if "stages" in given:
        wirings = [(given["stages"], 2)]
    elif blocks == {stage.name for stage in FROM_NOISE}:
        wirings = [(FROM_NOISE, 2)]
    else:
        wirings = [(published_stages(layers), 1) for layers in _published_layers(blocks)]
    if not wirings:
        raise ValueError(
            "the weights are those of a SPADEGenerator with custom stages, which names and shapes"
            " do not determine: stages should be given, a (name, width, scale) for each of"
            f" {first_of(sorted(blocks))}"
        )
    for stages, last_scale in wirings:
        first = next((stage[0] for stage in stages), None)
        if first not in blocks:
            raise ValueError(
                f"stages begin with {first!r}; they should begin with a block of these weights:"
                f" {first_of(sorted(blocks))}"
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
    """All shapes of maps with `places` pixels."""
    if dimensions == 1:
        return [(places,)]
    return [
        (length, *rest)
        for length in range(1, places + 1)
        if places % length == 0
        for rest in _shapes(places // length, dimensions - 1)
    ]


def _merged(network, arguments, given):
    """The arguments of a network, overridden by those that are given, which may be arguments of
    `official` too.
    """
    if network is not SPADEGenerator or not _is_among(OFFICIAL, given):
        return arguments | given
    official = _as_official(arguments)
    if official is None:
        raise ValueError(
            f"{', '.join(name for name in OFFICIAL if name in given)} cannot be given: these are"
            f" weights of {Description(network, arguments)}, which official cannot make"
        )
    chosen = {name: given[name] for name in OFFICIAL if given.get(name) is not None}
    others = {name: value for name, value in given.items() if name not in OFFICIAL}
    return _resolved(official | chosen, arguments | others)


def _resolved(official, others):
    """The arguments of a SPADEGenerator, computed from the arguments that only `official` has and
    from the others.
    """
    settings = {name: official.get(name) for name in SETTINGS}
    resolved = others | official_arguments(official["dataset"], **settings)
    if "use_vae" in official:
        z_dim = resolved.get("z_dim") or 256
        resolved["z_dim"] = z_dim if official["use_vae"] else None
    return resolved


def _as_official(arguments):
    """The arguments with which `official` makes the same network; None if it cannot."""
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
    """The published data set whose conditions have `label_nc` channels, or else `label_nc`."""
    return next(
        (name for name in PUBLISHED if published_settings(name).label_nc == label_nc), label_nc
    )
