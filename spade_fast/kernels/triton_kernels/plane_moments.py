"""Mean and sum of squared deviations of each plane: each program goes through a part of some planes
once.
"""

import torch
import triton
import triton.language as tl

from ..contract import is_channels_last
from . import plan
from .per_plane import combine_moments
from .tile import channels_from, pixels_from, place, rows_of, store_part, sum_pixels, zeros


@triton.jit
def plane_moments_kernel(
    x,
    parts,
    images,
    channels,
    pixels,
    split_pixels,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = channels_from(tl.program_id(0) % channel_blocks * CHANNELS, LAST, CHANNELS)
    begin = tl.program_id(1) * split_pixels
    end = tl.minimum(begin + split_pixels, pixels)
    # The mean is held as a pivot, the first tile's, and its distance from it: where it is large,
    # each sum with it would be rounded.
    pivot, distance, squares, count = (
        zeros(LAST, 1, CHANNELS),
        zeros(LAST, 1, CHANNELS),
        zeros(LAST, 1, CHANNELS),
        0.0,
    )
    for first in range(begin, end, PIXELS):
        pixel = pixels_from(first, LAST, PIXELS)
        inside = (pixel < end) & (channel < channels)
        value = tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
        added = tl.minimum(PIXELS, end - first).to(tl.float32)
        tile_mean = sum_pixels(value, LAST) / added
        deviation = tl.where(inside, value - tile_mean, 0.0)
        correction = sum_pixels(deviation, LAST) / added  # the tile's mean was rounded as well
        tile_squares = sum_pixels(deviation * deviation, LAST) - added * correction * correction
        pivot = tl.where(count == 0, tile_mean, pivot)
        difference, total = (tile_mean - pivot) + correction - distance, count + added
        distance += difference * (added / total)
        squares += tile_squares + difference * difference * (count * added / total)
        count = total
    store_part(parts, 0, 3, pivot, images, image, channels, channel)
    store_part(parts, 1, 3, distance, images, image, channels, channel)
    store_part(parts, 2, 3, squares, images, image, channels, channel)


def partial_moments(x):
    """The pivot of each split of each plane, its mean's distance from it and its squared
    deviations, [splits, 3, N, C]; and how many pixels a split has.
    """
    last = is_channels_last(x)
    images, channels, pixels = x.flatten(2).shape
    grid, settings = plan.sweeps(images, channels, pixels, last, x.device)
    split_pixels = (
        triton.cdiv(triton.cdiv(pixels, settings["PIXELS"]), grid[1]) * settings["PIXELS"]
    )
    parts = x.new_empty(grid[1], 3, images, channels, dtype=torch.float32)
    plane_moments_kernel[grid](
        rows_of(x, last), parts, images, channels, pixels, split_pixels, LAST=last, **settings
    )
    return parts, split_pixels


def plane_moments(x):
    return combine_moments(*partial_moments(x), x)
