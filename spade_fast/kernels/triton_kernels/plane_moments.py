"""The moments of each plane: mean and sum of squared deviations. Each program goes through a part
of some planes once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import is_channels_last
from . import plan
from .per_plane import combine_moments, moments_together
from .tile import channels_from, pixels_from, place, rows_of, store_part, sum_pixels, zeros


@triton.jit
def plane_moments_kernel(
    x,
    parts,
    images,
    channels,
    pixels,
    UNDER_WAY: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = channels_from(tl.program_id(0) % channel_blocks * CHANNELS, LAST, CHANNELS)
    begin, step = tl.program_id(1) * PIXELS, tl.num_programs(1) * PIXELS
    # Each element of a tile independently sums the differences of its values from the first of them
    # (the pivot), and their squares, without waiting for other elements. Because the pivot is one
    # of the values, cancellation costs at most as many digits as the count of values has.
    pixel = pixels_from(begin, LAST, PIXELS)
    inside = (pixel < pixels) & (channel < channels)
    pivot = tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
    count = tl.maximum(tl.cdiv(pixels - pixel, step), 0).to(tl.float32)
    beyond, squares = zeros(LAST, PIXELS, CHANNELS), zeros(LAST, PIXELS, CHANNELS)
    for first in range(begin + step, pixels, UNDER_WAY * step):
        for i in tl.static_range(UNDER_WAY):
            pixel = pixels_from(first + i * step, LAST, PIXELS)
            inside = (pixel < pixels) & (channel < channels)
            value = tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
            deviation = tl.where(inside, value - pivot, 0.0)
            beyond += deviation
            squares += deviation * deviation
    mean = beyond / tl.maximum(count, 1.0)
    squares = tl.maximum(squares - beyond * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # The common pivot is the mean of the pivots: a single value may be far from all others.
    total = sum_pixels(count, LAST)
    middle = sum_pixels(count * pivot, LAST) / tl.maximum(total, 1.0)
    distance = tl.where(count > 0, (pivot - middle) + mean, 0.0)
    distance, squares = moments_together(distance, squares, count, 0 if LAST else 1)
    store_part(parts, 0, 4, middle, images, image, channels, channel)
    store_part(parts, 1, 4, distance, images, image, channels, channel)
    store_part(parts, 2, 4, squares, images, image, channels, channel)
    store_part(parts, 3, 4, total, images, image, channels, channel)


def partial_moments(x: Tensor) -> Tensor:
    """For each split of each plane: a pivot, the distance of the split's mean from the pivot, its
    sum of squared deviations, and its number of pixels, [splits, 4, N, C].
    """
    last = is_channels_last(x)
    images, channels, pixels = x.flatten(2).shape
    grid, settings = plan.sweeps(images, channels, pixels, last, x.device, at_once=8, under_way=4)
    parts = x.new_empty(grid[1], 4, images, channels, dtype=torch.float32)
    plane_moments_kernel[grid](
        rows_of(x, last), parts, images, channels, pixels, LAST=last, **settings
    )
    return parts


def plane_moments(x: Tensor) -> Tensor:
    return combine_moments(partial_moments(x), x)
