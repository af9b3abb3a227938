"""dγ = g·x̂, dβ = g, and for each plane Σq and Σq·(x − shift), where q = g·(addend + γ). Each
program goes through a part of some planes once.

If γ and β are a table, `table_sums.py` computes the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Activation, is_channels_last
from . import plan
from .per_plane import combine_sums
from .table_sums import table_gradients
from .tile import (
    channels_from,
    empty_rows,
    fold_pixels,
    like,
    look_up,
    per_plane,
    pixels_from,
    place,
    rows_of,
    signs_of,
    store_part,
    sum_pixels,
    through_activation,
    zeros,
)


@triton.jit
def backward_sums_kernel(
    dy,
    x,
    planes,
    gamma,
    beta,
    signs,
    dgamma,
    dbeta,
    parts,
    images,
    channels,
    pixels,
    negative_slope,
    addend,
    ACTIVATION: tl.constexpr,
    UNDER_WAY: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = channels_from(tl.program_id(0) % channel_blocks * CHANNELS, LAST, CHANNELS)
    TOGETHER: tl.constexpr = UNDER_WAY * PIXELS
    begin, step = tl.program_id(1) * TOGETHER, tl.num_programs(1) * TOGETHER
    shift = per_plane(planes, 0, images, image, channels, channel)
    scale = per_plane(planes, 1, images, image, channels, channel)
    offset = per_plane(planes, 2, images, image, channels, channel)
    sum_q, sum_q_deviation = zeros(LAST, PIXELS, CHANNELS), zeros(LAST, PIXELS, CHANNELS)
    for first in range(begin, pixels, step):
        pixel = pixels_from(first, LAST, TOGETHER)
        inside = (pixel < pixels) & (channel < channels)
        deviation = (
            tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(tl.float32) - shift
        )
        normalised = deviation * scale + offset
        factor = addend + look_up(gamma, None, image, channel, pixel, inside, LAST)
        g = tl.load(place(dy, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
        y = (
            normalised * factor + look_up(beta, None, image, channel, pixel, inside, LAST)
            if ACTIVATION == "silu"
            else None
        )
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
        tl.store(place(dgamma, image, channel, pixel, LAST), g * normalised, inside)
        if ACTIVATION is not None:
            tl.store(place(dbeta, image, channel, pixel, LAST), g, inside)
        q = tl.where(inside, g * factor, 0.0)
        q_deviation = tl.where(inside, q * deviation, 0.0)
        sum_q += fold_pixels(q, LAST, UNDER_WAY, PIXELS, CHANNELS)
        sum_q_deviation += fold_pixels(q_deviation, LAST, UNDER_WAY, PIXELS, CHANNELS)
    sum_q, sum_q_deviation = sum_pixels(sum_q, LAST), sum_pixels(sum_q_deviation, LAST)
    store_part(parts, 0, 2, sum_q, images, image, channels, channel)
    store_part(parts, 1, 2, sum_q_deviation, images, image, channels, channel)


def gradients(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    index: Tensor | None,
    order: Tensor | None,
    signs: Tensor,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool,
    instance_planes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dγ, dβ (of size 0 if it equals dy), and the sums, or for instance norm the terms of dx."""
    if index is not None:
        assert order is not None
        dgamma, dbeta, parts = table_gradients(
            dy, x, planes, gamma, beta, index, order, signs, activation, negative_slope, plus_one
        )
    else:
        last = is_channels_last(x)
        images, channels, pixels = x.flatten(2).shape
        # Registers limit these numbers: SiLU needs β too, and without wide accesses each element
        # needs its own address.
        grid, settings = plan.sweeps(
            images,
            channels,
            pixels,
            last,
            x.device,
            at_once=3 if activation == "silu" else 4,
            under_way=2 if plan.aligned(channels, pixels, last) else 1,
        )
        dgamma_rows = empty_rows(x, last, gamma.dtype)
        dbeta_rows = None if activation is None else empty_rows(x, last, gamma.dtype)
        parts = x.new_empty(grid[1], 2, images, channels, dtype=torch.float32)
        backward_sums_kernel[grid](
            rows_of(dy, last),
            rows_of(x, last),
            planes.contiguous(),
            rows_of(gamma, last),
            None if beta is None else rows_of(beta, last),
            signs_of(signs),
            dgamma_rows,
            dbeta_rows,
            parts,
            images,
            channels,
            pixels,
            negative_slope,
            float(plus_one),
            ACTIVATION=activation,
            LAST=last,
            **settings,
        )
        dgamma = like(dgamma_rows, x)
        dbeta = gamma.new_empty(0) if dbeta_rows is None else like(dbeta_rows, x)
    if len(parts) == 1 and instance_planes is None:
        return dgamma, dbeta, parts[0]
    return dgamma, dbeta, combine_sums(parts, x, instance_planes)


def backward_sums(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    index: Tensor | None,
    order: Tensor | None,
    signs: Tensor,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(
        dy, x, planes, gamma, beta, index, order, signs, activation, negative_slope, plus_one
    )
