"""Instance norm in one pass: each program holds some whole planes, and computes their moments and y
in forward, their sums and dx in backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Activation, empty_signs, is_channels_last
from . import plan
from .apply import apply
from .backward_input import backward_input
from .backward_sums import gradients
from .per_plane import combine_moments
from .plane_moments import partial_moments
from .tile import (
    activate,
    channels_from,
    empty_rows,
    like,
    look_up,
    modulation_rows,
    pixels_from,
    place,
    row_of,
    rows_of,
    signs_of,
    store_signs,
    sum_pixels,
    through_activation,
    zeros,
)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    gamma,
    beta,
    index,
    y,
    signs,
    planes,
    images,
    channels,
    pixels,
    rows,
    eps,
    negative_slope,
    addend,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image = (tl.program_id(0) // channel_blocks).to(tl.int64)
    first_channel = tl.program_id(0) % channel_blocks * CHANNELS
    channel = channels_from(first_channel, LAST, CHANNELS)
    pixel = pixels_from(0, LAST, PIXELS)
    inside = (channel < channels) & (pixel < pixels)
    value = tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
    mean = sum_pixels(value, LAST) / pixels
    deviation = tl.where(inside, value - mean, 0.0)
    # The mean was rounded, which matters most if it is large.
    correction = sum_pixels(deviation, LAST) / pixels
    variance = sum_pixels(deviation * deviation, LAST) / pixels - correction * correction
    scale = 1 / tl.sqrt_rn(variance + eps)
    plane = planes + (image * channels + channel)
    tl.store(plane, mean + correction, channel < channels)
    tl.store(plane + images * channels, scale, channel < channels)
    tl.store(plane + 2 * images * channels, zeros(LAST, 1, CHANNELS), channel < channels)
    row = None
    if index is not None:
        row = row_of(index, rows, image, pixel, pixels)
    modulated = (
        (deviation - correction)
        * scale
        * (addend + look_up(gamma, row, image, channel, pixel, inside, LAST))
    )
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
            0,
            channels,
            pixels,
            ACTIVATION,
            LAST,
            PIXELS,
            CHANNELS,
        )


@triton.jit
def backward_kernel(
    dy,
    x,
    planes,
    gamma,
    beta,
    signs,
    dgamma,
    dbeta,
    dx,
    images,
    channels,
    pixels,
    negative_slope,
    addend,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = channels_from(tl.program_id(0) % channel_blocks * CHANNELS, LAST, CHANNELS)
    pixel = pixels_from(0, LAST, PIXELS)
    inside = (channel < channels) & (pixel < pixels)
    plane = planes + (image * channels + channel)
    scale = tl.load(plane + images * channels, channel < channels, 0.0)
    normalised = tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(
        tl.float32
    ) - tl.load(plane, channel < channels, 0.0)
    normalised *= scale
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
    mean_q = sum_pixels(q, LAST) / pixels
    mean_q_normalised = sum_pixels(tl.where(inside, q * normalised, 0.0), LAST) / pixels
    tl.store(
        place(dx, image, channel, pixel, LAST),
        scale * (q - mean_q - normalised * mean_q_normalised),
        inside,
    )


def instance_forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    eps: float,
    activation: Activation | None,
    negative_slope: float,
    keep_signs: bool,
    plus_one: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    last = is_channels_last(x)
    images, channels, pixels = x.flatten(2).shape
    held = plan.one_pass(images, channels, pixels, last, index is not None, tensors=1)
    if held is None or pixels == 0:
        planes = combine_moments(partial_moments(x), x, eps)
        rest = (activation, negative_slope, keep_signs, plus_one)
        return *apply(x, planes, gamma, beta, index, *rest), planes
    grid, settings = held
    y = empty_rows(x, last, torch.promote_types(x.dtype, gamma.dtype))
    signs = empty_signs(x, activation, keep_signs)
    planes = x.new_empty(3, images, channels, dtype=torch.float32)
    forward_kernel[grid](
        rows_of(x, last),
        modulation_rows(gamma, last, index),
        modulation_rows(beta, last, index),
        None if index is None else index.contiguous(),
        y,
        signs_of(signs),
        planes,
        images,
        channels,
        pixels,
        len(gamma),
        eps,
        negative_slope,
        float(plus_one),
        ACTIVATION=activation,
        LAST=last,
        **settings,
    )
    return like(y, x), signs, planes


def instance_backward(
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
    last, planes = is_channels_last(x), planes.contiguous()
    images, channels, pixels = x.flatten(2).shape
    held = (
        None
        if index is not None
        else plan.one_pass(images, channels, pixels, last, False, tensors=2)
    )
    if held is None or pixels == 0:
        rest = (activation, negative_slope, plus_one)
        dgamma, dbeta, terms = gradients(
            dy, x, planes, gamma, beta, index, order, signs, *rest, planes
        )
        return (
            dgamma,
            dbeta,
            backward_input(dy, x, planes, gamma, beta, index, signs, terms, *rest),
        )
    grid, settings = held
    dgamma_rows, dx_rows = empty_rows(x, last, gamma.dtype), empty_rows(x, last, x.dtype)
    dbeta_rows = None if activation is None else empty_rows(x, last, gamma.dtype)
    backward_kernel[grid](
        rows_of(dy, last),
        rows_of(x, last),
        planes,
        rows_of(gamma, last),
        None if beta is None else rows_of(beta, last),
        signs_of(signs),
        dgamma_rows,
        dbeta_rows,
        dx_rows,
        images,
        channels,
        pixels,
        negative_slope,
        float(plus_one),
        ACTIVATION=activation,
        LAST=last,
        **settings,
    )
    dbeta = gamma.new_empty(0) if dbeta_rows is None else like(dbeta_rows, x)
    return like(dgamma_rows, x), dbeta, like(dx_rows, x)
