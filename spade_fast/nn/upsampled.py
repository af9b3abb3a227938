"""A convolution of a map that nearest neighbour has enlarged: it repeats pixels, and repeated
pixels need fewer products.

A convolution with k taps per axis of a map whose pixels are repeated f times is a transposed
convolution of the map itself, with stride f and k + f − 1 taps. Each of these taps is the sum of
the taps that would have met the same pixel. In two dimensions with k = 3, each output takes 4
products for f = 2 and 2.25 for f = 4, instead of 9. This is the same function, with sums in another
order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.contract import is_channels_last
from ..recording import is_recorded
from .modules import Convolution

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def repeats(segmap: torch.Tensor, size: Sequence[int]) -> int:
    """How many times nearest neighbour repeats each pixel of segmap [N, C, *spatial] along every
    axis to reach this size. It is 1 if the pixels are not repeated alike, or if operations are
    recorded, when nothing may depend on sizes.
    """
    if is_recorded(segmap):
        return 1
    lengths = list(zip(segmap.shape[2:], size))
    factor = lengths[0][1] // lengths[0][0] if lengths[0][0] else 1
    if factor < 2 or any(wanted != factor * given for given, wanted in lengths):
        return 1
    return factor if repeats_exactly(segmap, factor) else 1


def repeats_exactly(x: torch.Tensor, factor: int) -> bool:
    """Whether nearest neighbour repeats each pixel of x [N, C, *spatial] exactly `factor` times.
    F.interpolate multiplies by a rounded quotient, so that 8 pixels enlarged 47 times, for example,
    are not. A compiled graph cannot try it out, so there only powers of two count.
    """
    if factor & (factor - 1) == 0:
        return True
    double = x.dtype == torch.float64 and x.is_cpu
    return not torch.compiler.is_compiling() and all(
        _is_exact(length, factor, double) for length in x.shape[2:]
    )


@functools.cache
def _is_exact(given, factor, double):
    pixels = torch.arange(given, dtype=torch.float64 if double else torch.float32, device="cpu")
    found = F.interpolate(pixels[None, None], size=given * factor, mode="nearest")[0, 0]
    return torch.equal(found, pixels.repeat_interleave(factor))


def repeat_pixels(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x [N, C, *spatial] with each pixel repeated `factor` times along every axis."""
    if factor == 1:
        return x
    copies = x.is_cuda and is_channels_last(x) and factor & (factor - 1) == 0
    if copies and not is_recorded(x) and not torch.compiler.is_compiling():
        return RepeatPixels.apply(x, factor)
    return F.interpolate(x, scale_factor=factor, mode="nearest")


class RepeatPixels(torch.autograd.Function):
    """F.interpolate of a channels-last x on a GPU, as one copy of rows of channels, with one sum in
    backward. PyTorch 2.11's kernels for that memory layout take five to ten times as long (1.6 of
    8.3 ms of the published generator's forward pass at batch 16 in bfloat16 on an H200).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        rows = _widest(x.movedim(1, -1).contiguous())  # [N, *spatial, C]
        repeated = rows.new_empty(
            len(rows), *(factor * size for size in rows.shape[1:-1]), rows.shape[-1]
        )
        _by_pixel(repeated, factor).copy_(_with_axes(rows))
        return repeated.view(x.dtype).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = dy.movedim(1, -1)
        axes = range(2, 2 * rows.dim() - 3, 2)
        return _by_pixel(rows, ctx.factor).sum(tuple(axes)).movedim(-1, 1), None


def _widest(rows):
    """Rows of channels, viewed as numbers of up to 8 bytes, each of which one thread copies."""
    for dtype in (torch.int64, torch.int32):
        fits = rows.shape[-1] * rows.element_size() % dtype.itemsize == 0
        if fits and rows.element_size() < dtype.itemsize and rows.numel():
            return rows.view(dtype)
    return rows


def _by_pixel(rows, factor):
    """[N, f·H, f·W, C] as [N, H, f, W, f, C], in any number of dimensions."""
    for dim in range(1, 2 * rows.dim() - 4, 2):
        rows = rows.unflatten(dim, (rows.shape[dim] // factor, factor))
    return rows


def _with_axes(rows):
    """[N, H, W, C] as [N, H, 1, W, 1, C], in any number of dimensions."""
    for dim in range(2, 2 * rows.dim() - 3, 2):
        rows = rows.unsqueeze(dim)
    return rows


def may_sum_weights(x: torch.Tensor) -> bool:
    """Whether sums of weights, in the dtype of a convolution of x, are as accurate as sums of
    products; in half precision they would be rounded.
    """
    return x.element_size() >= 4 and not torch.is_autocast_enabled(x.device.type)


def convolve_repeated(conv: Convolution, x: torch.Tensor, factor: int) -> torch.Tensor:
    """conv(repeat_pixels(x, factor)) for a convolution that keeps a map's size by zero padding."""
    assert not isinstance(conv.padding, str)
    weight = conv.weight.transpose(0, 1)
    taps = weight.shape[-1]
    # Tap j of the transposed convolution is the sum of the taps, at most `factor` in a row, that
    # meet the same pixel. (A product with zeros and ones would turn an infinite weight into NaN.)
    meeting = [slice(max(0, end - factor), min(taps, end)) for end in range(1, taps + factor)][::-1]
    for dim in range(2, weight.dim()):
        slices = weight.unbind(dim)
        weight = torch.stack([functools.reduce(torch.add, slices[of]) for of in meeting], dim)
    return TRANSPOSED[weight.dim() - 2](x, weight, conv.bias, stride=factor, padding=conv.padding)
