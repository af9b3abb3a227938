"""γ and β at every pixel: convolutions of the condition, resized to x by nearest neighbour."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels.contract import is_channels_last
from ..layout import SemanticLayout
from ..recording import is_recorded, may_overwrite
from .modules import (
    CONVOLUTIONS,
    POINTWISE,
    Convolution,
    first_weight,
    is_plain,
    keeps_size,
    leaves,
    taps_of,
)
from .parts import Parts
from .upsampled import convolve_repeated, may_sum_weights, repeats

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Below these numbers of pixels x keeps its memory layout. On a GPU the convolutions bring a
# contiguous x and its weights to channels-last themselves, in each call.
FEW_PIXELS = {"cpu": 4096, "cuda": 0}


def at_pixels(
    parts: Parts, segmap: torch.Tensor | SemanticLayout, x: torch.Tensor
) -> Sequence[torch.Tensor]:
    """γ and β of every pixel, of x's size."""
    if isinstance(segmap, SemanticLayout):
        segmap = segmap.resize(x.shape[2:]).to_segmap(first_weight(parts.shared).dtype)
    hidden = _hidden(parts.shared, like_pixels_of(x, segmap), x.shape[2:])
    if parts.pad is not None:
        hidden = parts.pad(hidden)
    # On a CPU nothing is gained by convolving both at once, and copying the weights costs.
    convolve = convolve_jointly if hidden.is_cuda else convolve_apart
    return convolve((parts.gamma, parts.beta), hidden)


def _hidden(shared, segmap, size):
    """What γ and β are convolved from, at every pixel of this size."""
    conv, *activations = leaves(shared)
    simple = all(is_plain(module, POINTWISE) for module in activations)
    if not simple or not keeps_size(conv, taps_of(conv)) or 0 in segmap.shape:
        return shared(resize(segmap, size))
    factor = repeats(segmap, size)
    if factor > 1 and may_sum_weights(segmap) and is_plain(conv, CONVOLUTIONS.values()):
        hidden = convolve_repeated(conv, segmap, factor)
    else:
        hidden = conv(resize(segmap, size))
    if activations and type(activations[0]) is nn.ReLU and may_overwrite():
        # In the convolution's own result, which no backward needs.
        hidden, activations = F.relu_(hidden), activations[1:]
    for activation in activations:
        hidden = activation(hidden)
    return hidden


def with_channels_together(x: torch.Tensor, scale: int = 1) -> torch.Tensor:
    """x with each pixel's channels together: the layout in which they meet a row of a table, and in
    which convolutions are fastest.

    Not where there are few pixels (of x made `scale` times larger, as it is next): the convolutions
    that follow copy their weights to x's layout, which then costs more.
    """
    if is_recorded(x) or x.dim() not in FORMATS:
        return x  # a recorded graph may not depend on the batch
    pays = x[:, 0].numel() * scale ** (x.dim() - 2) >= FEW_PIXELS.get(x.device.type, 4096)
    return x.contiguous(memory_format=FORMATS[x.dim()]) if pays else x


def like_pixels_of(x: torch.Tensor, segmap: torch.Tensor) -> torch.Tensor:
    """segmap with each pixel's channels together where x has them so: convolutions keep that, and γ
    and β then lie as x does.
    """
    if x.dim() in FORMATS and is_channels_last(x):
        return segmap.contiguous(memory_format=FORMATS[x.dim()])
    return segmap


def resize(segmap: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """segmap at x's size, by nearest neighbour: `F.interpolate`'s pixels, as a view where each size
    is a multiple of x's.
    """
    given = segmap.shape[2:]
    if given == tuple(size) and torch._C._get_tracing_state() is None:  # a trace would fix it
        return segmap
    if not is_recorded(segmap) and all(
        length and wanted and length % wanted == 0 for length, wanted in zip(given, size)
    ):
        steps = [slice(None, None, length // wanted) for length, wanted in zip(given, size)]
        everything = [slice(None)] * 2
        return segmap[tuple(everything + steps)]
    return F.interpolate(segmap, size=tuple(size), mode="nearest")


def convolve_jointly(convolutions: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The outputs of equal convolutions of one x, from one convolution; their weights stay
    parameters of their own.
    """
    plain = [
        module
        for module in convolutions
        if isinstance(module, Convolution) and is_plain(module, CONVOLUTIONS.values())
    ]
    if len(plain) < len(convolutions) or (joint := joined(plain)) is None:
        return convolve_apart(convolutions, x)
    channels = [len(module.weight) for module in plain]
    return plain[0]._conv_forward(x, *joint).split(channels, dim=1)


def joined(convolutions: Sequence[Convolution]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight and bias of several convolutions of one x as those of one convolution, or None where
    they differ in kind.
    """
    settings = ("kernel_size", "padding", "stride", "dilation", "groups", "padding_mode")
    differ = any(len({getattr(module, name) for module in convolutions}) > 1 for name in settings)
    shapes = {module.weight.shape[1:] for module in convolutions}
    biases = [module.bias for module in convolutions if module.bias is not None]
    if differ or len(shapes) > 1 or len(biases) < len(convolutions):
        return None
    return torch.cat([module.weight for module in convolutions]), torch.cat(biases)


def convolve_apart(convolutions: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The outputs of convolutions of one x."""
    return [module(x) for module in convolutions]
