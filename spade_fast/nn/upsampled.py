"""A convolution of a map that nearest neighbour made larger: it repeats pixels, and repeated pixels
need fewer products.

A convolution with k taps per axis of a map whose pixels are repeated f times is a transposed
convolution of the map itself, with stride f and k + f − 1 taps: each of those is the sum of the
taps that would have met the same pixel. For f = 2 and k = 3 that is 4 products in place of 9 for
each output in two dimensions, for f = 4 it is 2.25. Exact: the same function, sums in another
order.
"""

import functools

import torch
import torch.nn.functional as F

from ..recording import is_recorded

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def repeats(segmap: torch.Tensor, size: tuple) -> int:
    """How often nearest neighbour repeats each pixel of segmap [N, C, *spatial] along every axis to
    make this size; 1 where it does not, or where sizes are symbols, which nothing may depend on.
    """
    if is_recorded(segmap):
        return 1
    lengths = list(zip(segmap.shape[2:], size))
    factor = lengths[0][1] // lengths[0][0] if lengths[0][0] else 1
    if factor < 2 or any(wanted != factor * given for given, wanted in lengths):
        return 1
    double = segmap.dtype == torch.float64 and segmap.is_cpu
    return factor if all(_is_exact(given, factor, double) for given, _ in lengths) else 1


@functools.cache
def _is_exact(given, factor, double):
    """Whether F.interpolate repeats each pixel just so often: it multiplies by a quotient that is
    rounded, and 47 times 8 pixels are not what they should be.
    """
    if torch.compiler.is_compiling() or factor & (factor - 1) == 0:
        return True
    pixels = torch.arange(given, dtype=torch.float64 if double else torch.float32, device="cpu")
    found = F.interpolate(pixels[None, None], size=given * factor, mode="nearest")[0, 0]
    return torch.equal(found, pixels.repeat_interleave(factor))


def repeat_pixels(x, factor):
    """x with each pixel `factor` times along every axis."""
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="nearest")


def may_sum_weights(x):
    """Whether sums of weights, in the dtype of a convolution of x, are as good as sums of products:
    in half precision they are rounded.
    """
    return x.element_size() >= 4 and not torch.is_autocast_enabled(x.device.type)


def convolve_repeated(conv, x, factor):
    """conv(repeat_pixels(x, factor)) of a convolution that keeps a map's size by zero padding."""
    weight = conv.weight.transpose(0, 1)
    taps = weight.shape[-1]
    # Tap j of the transposed one is the sum of those taps, `factor` in a row at most, that meet the
    # same pixel. (A product with zeros and ones would make NaN of an infinite weight.)
    meeting = [slice(max(0, end - factor), min(taps, end)) for end in range(1, taps + factor)][::-1]
    for dim in range(2, weight.dim()):
        slices = weight.unbind(dim)
        weight = torch.stack([functools.reduce(torch.add, slices[of]) for of in meeting], dim)
    return TRANSPOSED[weight.dim() - 2](x, weight, conv.bias, stride=factor, padding=conv.padding)
