"""y = activation((addend + γ)·x̂ + β), one tile per program. x̂ = (x − shift)·scale + offset is
computed from the three numbers of each plane, and addend is 1 or 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Activation, empty_signs, is_channels_last
from . import plan
from .tile import (
    Rows,
    activate,
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
    store_signs,
    tile,
)


@triton.jit(do_not_specialize=["rows"])
def apply_kernel(
    x,
    planes,
    gamma,
    beta,
    index,
    y,
    signs,
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
    normalised = tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
    normalised -= per_plane(planes, 0, images, image, channels, channel)
    normalised *= per_plane(planes, 1, images, image, channels, channel)
    normalised += per_plane(planes, 2, images, image, channels, channel)
    modulated = normalised * (addend + look_up(gamma, row, image, channel, pixel, inside, LAST))
    modulated += look_up(beta, row, image, channel, pixel, inside, LAST)
    tl.store(
        place(y, image, channel, pixel, LAST),
        activate(modulated, negative_slope, ACTIVATION),
        inside,
    )
    if signs is not None:
        store_signs(
            signs,
            modulated,
            inside,
            image,
            first_channel,
            first_pixel,
            channels,
            pixels,
            ACTIVATION,
            LAST,
            PIXELS,
            CHANNELS,
        )


def apply(
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    keep_signs: bool,
    plus_one: bool = True,
) -> tuple[Tensor, Tensor]:
    y = empty_rows(x, is_channels_last(x), torch.promote_types(x.dtype, gamma.dtype))
    signs = empty_signs(x, activation, keep_signs)
    launch(x, planes, gamma, beta, index, activation, negative_slope, plus_one, y, signs)
    return like(y, x), signs


def apply_out(
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    out: Tensor,
    plus_one: bool = True,
) -> None:
    launch(
        x,
        planes,
        gamma,
        beta,
        index,
        activation,
        negative_slope,
        plus_one,
        rows_of(out, is_channels_last(x)),
        empty_signs(x, activation, False),
    )


def launch(
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool,
    y: Rows,
    signs: Tensor,
) -> None:
    last = is_channels_last(x)
    images, channels, pixels = x.flatten(2).shape
    grid, settings = plan.tiles(images, channels, pixels, last, index is not None)
    apply_kernel[grid](
        rows_of(x, last),
        planes.contiguous(),
        modulation_rows(gamma, last, index),
        modulation_rows(beta, last, index),
        None if index is None else index.contiguous(),
        y,
        signs_of(signs),
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
