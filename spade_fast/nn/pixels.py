"""γ and β at every pixel: convolutions of the condition, resized to x by nearest neighbour."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels.contract import is_channels_last
from ..layout import SemanticLayout
from ..recording import always, is_recorded, may_overwrite
from .modules import (
    CONVOLUTIONS,
    POINTWISE,
    Convolution,
    dtype_of_weights,
    is_plain,
    keeps_size,
    leaves,
    taps_of,
)
from .parts import Parts
from .upsampled import convolve_repeated, may_sum_weights, repeats

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# With fewer pixels than this, without and with gradients, x keeps its memory layout. On a GPU,
# convolutions convert a contiguous x and its weights to channels-last themselves, in each call. On
# a CPU, PyTorch enlarges a contiguous x by way of channels-last: 1,024 in place of 4,096 takes 2%
# off the published generator's forward and 5% off a small one's. With gradients it gains nothing,
# because backward of wide convolutions of small maps is faster in contiguous memory. On a processor
# with AVX2 but without AVX-512, that holds for maps of any size: there, backward of the published
# generator's 3×3 convolutions takes 1.15 to 2.7 times as long in channels-last as in contiguous
# memory, and that of layers with 16 to 64 channels 1.2 to 2.3 times. With AVX-512, 0.9 to 1.15
# times from 4096 pixels on (torch 2.13, two threads).
FEW_PIXELS = {"cpu": (1024, 4096), "avx2": (1024, sys.maxsize), "cuda": (0, 0)}
CPU = "avx2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "cpu"


def at_pixels(
    parts: Parts, segmap: torch.Tensor | SemanticLayout, x: torch.Tensor
) -> Sequence[torch.Tensor]:
    """γ and β at every pixel of x."""
    size = x.shape[2:]
    if isinstance(segmap, SemanticLayout) and not parts.apart:
        segmap = segmap.resize(size)
    hidden: torch.Tensor = dense(segmap, parts.first)
    if parts.apart or parts.shared is None:
        hidden = resize(hidden, size, parts.apart)
    if parts.shared is not None:
        hidden = _hidden(parts.shared, hidden, x)
    hidden = like_pixels_of(x, hidden)
    if parts.pad is not None:
        hidden = parts.pad(hidden)
    if parts.halves is not None:
        both = parts.gamma(hidden).chunk(2, dim=1)
        return [both[half] for half in parts.halves]
    # On a CPU, one convolution for both gains nothing, and copying the weights costs time.
    convolve = convolve_jointly if hidden.is_cuda else convolve_apart
    return convolve((parts.gamma, parts.beta), hidden)


def dense(condition: Any, module: nn.Module) -> Any:
    """A condition as plain modules take it: a layout becomes a tensor in the dtype of the weights
    of the module that it is for, or in its own if there are none.
    """
    if not isinstance(condition, SemanticLayout):
        return condition
    return condition.to_segmap(dtype_of_weights(module) or condition.palette.dtype)


def _hidden(shared, segmap, x):
    """The hidden map, from which γ and β are convolved, at x's size."""
    conv, *activations = leaves(shared)
    size = x.shape[2:]
    # Where the convolution leaves fewer channels, those are brought to x's memory layout: copying
    # 184 at 128² takes longer (9 ms) than their convolution to 16 (7 ms).
    if not (isinstance(conv, Convolution) and conv.out_channels < conv.in_channels):
        segmap = like_pixels_of(x, segmap)
    simple = all(is_plain(module, POINTWISE) for module in activations)
    if not simple or not keeps_size(conv, taps_of(conv)) or 0 in segmap.shape:
        return shared(resize(segmap, size))
    factor = repeats(segmap, size)
    if factor > 1 and may_sum_weights(segmap) and is_plain(conv, CONVOLUTIONS.values()):
        hidden = convolve_repeated(conv, segmap, factor)
    else:
        hidden = conv(resize(segmap, size))
    if activations and type(activations[0]) is nn.ReLU and may_overwrite():
        # In place, in the convolution's result, which backward does not need.
        hidden, activations = F.relu_(hidden), activations[1:]
    for activation in activations:
        hidden = activation(hidden)
    return hidden


def with_channels_together(x: torch.Tensor, scale: int = 1) -> torch.Tensor:
    """x as channels-last: a pixel's channels then lie together, as they do in a row of a table, and
    convolutions are fastest.

    With few pixels (counted after x is enlarged by `scale`, which comes next), x is left as it is:
    the convolutions that follow copy their weights to x's memory layout, which would cost more, or
    their backward would be slower.
    """
    if is_recorded(x) or x.dim() not in FORMATS:
        return x  # a recorded graph may not depend on the batch
    kind = CPU if x.is_cpu else x.device.type
    few = FEW_PIXELS.get(kind, FEW_PIXELS["cpu"])[torch.is_grad_enabled()]
    pays = x.shape[0] * x.shape[2:].numel() * scale ** (x.dim() - 2) >= few
    return x.contiguous(memory_format=FORMATS[x.dim()]) if pays else x


def like_pixels_of(x: torch.Tensor, segmap: torch.Tensor) -> torch.Tensor:
    """segmap as channels-last if x is: convolutions keep that, so γ and β get x's memory layout.
    Not where operations are recorded: torch.vmap cannot tell a memory format.
    """
    if is_recorded(x, segmap):
        return segmap
    if x.dim() in FORMATS and is_channels_last(x):
        return segmap.contiguous(memory_format=FORMATS[x.dim()])
    return segmap


def resize(segmap: torch.Tensor, size: Sequence[int], apart: bool = False) -> torch.Tensor:
    """segmap resized by nearest neighbour, to the pixels that `F.interpolate` takes; a view if each
    length is a multiple of the wanted one.

    apart: whether an odd number of frames above one begins with the first frame of segmap, and the
        others are resized apart from it.
    """
    given = segmap.shape[2:]
    if apart and has_first_apart(size):
        first, others = segmap.split([1, given[0] - 1], dim=2)
        parts = resize(first, (1, *size[1:])), resize(others, (size[0] - 1, *size[1:]))
        return torch.cat(parts, dim=2)
    if same_size(given, size):
        return segmap
    if not is_recorded(segmap) and all(
        length and wanted and length % wanted == 0 for length, wanted in zip(given, size)
    ):
        steps = [slice(None, None, length // wanted) for length, wanted in zip(given, size)]
        everything = [slice(None)] * 2
        return segmap[tuple(everything + steps)]
    return F.interpolate(segmap, size=tuple(size), mode="nearest")


def same_size(given: Sequence[int], size: Sequence[int]) -> bool:
    """Whether two sizes are the same, in a recorded graph always."""
    lengths = zip(given, size)
    return len(given) == len(size) and all(always(length == wanted) for length, wanted in lengths)


def has_first_apart(size: Sequence[int]) -> bool:
    """Whether `resize(..., apart=True)` resizes the first frame apart from the others."""
    return size[0] > 1 and size[0] % 2 == 1


def convolve_jointly(convolutions: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The outputs of several convolutions of one x, from one convolution if they can be `joined`.
    Their weights remain separate parameters.
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
    """The weight and bias of one convolution that does the work of several convolutions of one x,
    or None if their settings differ or a bias is missing.
    """
    settings = ("kernel_size", "padding", "stride", "dilation", "groups", "padding_mode")
    differ = any(len({getattr(module, name) for module in convolutions}) > 1 for name in settings)
    shapes = {module.weight.shape[1:] for module in convolutions}
    biases = [module.bias for module in convolutions if module.bias is not None]
    if differ or len(shapes) > 1 or len(biases) < len(convolutions):
        return None
    return torch.cat([module.weight for module in convolutions]), torch.cat(biases)


def convolve_apart(convolutions: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The outputs of several convolutions of one x, computed one by one."""
    return [module(x) for module in convolutions]
