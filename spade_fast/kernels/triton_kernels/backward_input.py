"""dx = scale·q + constant + slope·(x − shift), one tile per program, where q = g·(addend + γ)."""

import triton
import triton.language as tl
from torch import Tensor

from ..contract import Activation, is_channels_last
from . import plan
from .tile import (
    channels_from,
    empty_rows,
    like,
    look_up,
    modulation_rows,
    per_plane,
    pixels_from,
    place,
    row_of,
    rows_of,
    signs_of,
    through_activation,
    tile,
)


@triton.jit(do_not_specialize=["rows"])
def backward_input_kernel(
    dy,
    x,
    planes,
    gamma,
    beta,
    index,
    signs,
    terms,
    dx,
    images,
    channels,
    pixels,
    rows,
    negative_slope,
    addend,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image, first_channel, first_pixel = tile(channels, pixels, LAST, PIXELS, CHANNELS)
    channel = channels_from(first_channel, LAST, CHANNELS)
    pixel = pixels_from(first_pixel, LAST, PIXELS)
    inside = (channel < channels) & (pixel < pixels)
    row = None
    if index is not None:
        row = row_of(index, rows, image, pixel, pixels)
    scale = per_plane(planes, 1, images, image, channels, channel)
    factor = addend + look_up(gamma, row, image, channel, pixel, inside, LAST)
    g = tl.load(place(dy, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
    y, deviation = None, None
    if terms is not None or ACTIVATION == "silu":
        deviation = tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
        deviation -= per_plane(planes, 0, images, image, channels, channel)
    if ACTIVATION == "silu":
        y = (deviation * scale + per_plane(planes, 2, images, image, channels, channel)) * factor
        y += look_up(beta, row, image, channel, pixel, inside, LAST)
    g = through_activation(
        g,
        signs,
        y,
        image,
        channel,
        pixel,
        channels,
        pixels,
        inside,
        negative_slope,
        ACTIVATION,
        LAST,
    )
    result = scale * (g * factor)
    if terms is not None:
        result += (
            per_plane(terms, 0, images, image, channels, channel)
            + per_plane(terms, 1, images, image, channels, channel) * deviation
        )
    tl.store(place(dx, image, channel, pixel, LAST), result, inside)


def backward_input(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    index: Tensor | None,
    signs: Tensor,
    terms: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool = True,
) -> Tensor:
    last = is_channels_last(x)
    images, channels, pixels = x.flatten(2).shape
    dx = empty_rows(x, last, x.dtype)
    grid, settings = plan.tiles(images, channels, pixels, last, index is not None)
    backward_input_kernel[grid](
        rows_of(dy, last),
        rows_of(x, last),
        planes.contiguous(),
        modulation_rows(gamma, last, index),
        None if beta is None else modulation_rows(beta, last, index),
        None if index is None else index.contiguous(),
        signs_of(signs),
        None if terms is None else terms.contiguous(),
        dx,
        images,
        channels,
        pixels,
        len(gamma),
        negative_slope,
        float(plus_one),
        ACTIVATION=activation,
        LAST=last,
        **settings,
    )
    return like(dx, x)
