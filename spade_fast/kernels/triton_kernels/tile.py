"""Shared code of the Triton kernels: the layout of tensors in memory, the tile of a program, and
the operations on one element.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor [N, C, pixels] whose rows are contiguous, or a table [K, C]. A row is a plane, or
    all channels of a pixel if the channels are last.
    """

    data: torch.Tensor
    image: int  # stride between images, in elements
    row: int  # stride between rows


def rows_of(x: Tensor, last: bool) -> Rows:
    """x [N, C, *spatial] as Rows of planes, or of pixels if the channels are last (`last`). It is
    copied if its rows are not contiguous.
    """
    flat = x.flatten(2)
    inner = 1 if last else 2
    if flat.shape[inner] > 1 and flat.stride(inner) != 1:
        flat = flat.transpose(1, 2).contiguous().transpose(1, 2) if last else flat.contiguous()
    return Rows(flat, flat.stride(0), flat.stride(3 - inner))


def modulation_rows(gamma: Tensor, last: bool, index: Tensor | None) -> Rows:
    """γ or β as Rows: dense if `index` is None, else a table."""
    if index is None:
        return rows_of(gamma, last)
    gamma = gamma if gamma.stride(1) == 1 else gamma.contiguous()
    return Rows(gamma, 0, gamma.stride(0))


def signs_of(signs: Tensor) -> Tensor | None:
    """The bytes of signs without gaps; None if there are none."""
    return signs.contiguous() if signs.numel() else None


def empty_rows(x: Tensor, last: bool, dtype: torch.dtype) -> Rows:
    """Uninitialised Rows of x's shape."""
    images, channels, pixels = x.flatten(2).shape
    shape = (images, pixels, channels) if last else (images, channels, pixels)
    flat = x.new_empty(shape, dtype=dtype)
    return Rows(flat.transpose(1, 2) if last else flat, channels * pixels, shape[2])


def like(rows: Rows, x: Tensor) -> Tensor:
    """The tensor behind Rows, in x's shape and with the strides of empty_like(x), which are those
    of the fakes.
    """
    y = rows.data.view(x.shape)
    if y.stride() == x.stride() or x.is_contiguous():
        return y
    strides = torch.empty_like(x, device="meta").stride()
    if all(size == 1 or one == other for size, one, other in zip(x.shape, y.stride(), strides)):
        return y
    return torch.empty_like(x, dtype=y.dtype).copy_(y)


@triton.jit
def tile(channels, pixels, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's image, first channel and first pixel. Consecutive programs have tiles that are
    neighbours in memory.
    """
    channel_blocks, pixel_blocks = tl.cdiv(channels, CHANNELS), tl.cdiv(pixels, PIXELS)
    program = tl.program_id(0)
    if LAST:
        channel_block, pixel_block = (
            program % channel_blocks,
            program // channel_blocks % pixel_blocks,
        )
    else:
        pixel_block, channel_block = (
            program % pixel_blocks,
            program // pixel_blocks % channel_blocks,
        )
    return (
        (program // (channel_blocks * pixel_blocks)).to(tl.int64),
        channel_block * CHANNELS,
        pixel_block * PIXELS,
    )


@triton.jit
def channels_from(first, LAST: tl.constexpr, CHANNELS: tl.constexpr):
    """The channels of a tile: [1, CHANNELS] if the channels are last, else [CHANNELS, 1]. Memory is
    contiguous along a tile's last axis.
    """
    if LAST:
        return first + tl.arange(0, CHANNELS)[None, :]
    else:
        return first + tl.arange(0, CHANNELS)[:, None]


@triton.jit
def pixels_from(first, LAST: tl.constexpr, PIXELS: tl.constexpr):
    """The pixels of a tile: [PIXELS, 1] if the channels are last, else [1, PIXELS]."""
    if LAST:
        return first + tl.arange(0, PIXELS)[:, None]
    else:
        return first + tl.arange(0, PIXELS)[None, :]


@triton.jit
def zeros(LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    if LAST:
        return tl.zeros([PIXELS, CHANNELS], tl.float32)
    else:
        return tl.zeros([CHANNELS, PIXELS], tl.float32)


@triton.jit
def sum_pixels(values, LAST: tl.constexpr):
    """The sums of a tile's values over its pixels, in the shape of `channels_from`."""
    return tl.sum(values, axis=0 if LAST else 1, keep_dims=True)


@triton.jit
def fold_pixels(
    values,
    LAST: tl.constexpr,
    TILES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The sum of TILES tiles with consecutive pixels. Each thread adds its own elements."""
    if LAST:
        return tl.sum(tl.reshape(values, [TILES, PIXELS, CHANNELS]), axis=0)
    else:
        return tl.sum(tl.reshape(values, [CHANNELS, TILES, PIXELS]), axis=1)


@triton.jit
def place(rows, image, channel, pixel, LAST: tl.constexpr):
    """The addresses of elements."""
    if LAST:
        return rows.data + (image * rows.image + pixel.to(tl.int64) * rows.row + channel)
    else:
        return rows.data + (image * rows.image + channel.to(tl.int64) * rows.row + pixel)


@triton.jit
def look_up(rows, row, image, channel, pixel, inside, LAST: tl.constexpr):
    """γ or β of these elements. If `row` is None, they are dense, with the same shape as x;
    otherwise they come from each pixel's row of the table.
    """
    if row is None:
        return tl.load(place(rows, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
    else:
        return tl.load(rows.data + (row.to(tl.int64) * rows.row + channel), inside, 0.0).to(
            tl.float32
        )


@triton.jit
def within(number, count):
    """These numbers, clamped to at most count − 1, so that nobody has to wait for a check of the
    index. Negative numbers count as large ones, as in csrc/cuda.
    """
    return tl.minimum(number.to(tl.uint32), tl.cast(count - 1, tl.uint32)).to(tl.int32)


@triton.jit
def row_of(index, rows, image, pixel, pixels):
    """The row of each pixel, in a table of `rows` rows."""
    return within(tl.load(index + (image * pixels + pixel), pixel < pixels, 0), rows)


@triton.jit
def per_plane(numbers, which, images, image, channels, channel):
    """One of the k numbers of each plane, from [k, N, C], for these channels."""
    return tl.load(
        numbers + ((which * images + image) * channels + channel), channel < channels, 0.0
    )


@triton.jit
def store_part(parts, which, kinds, numbers, images, image, channels, channel):
    """Stores one of the `kinds` numbers of each of these planes, for this program's split, in parts
    [splits, kinds, N, C].
    """
    places = ((tl.program_id(1).to(tl.int64) * kinds + which) * images + image) * channels + channel
    tl.store(parts + places, numbers, channel < channels)


@triton.jit
def activate(y, negative_slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, y)  # NaN stays NaN
    elif ACTIVATION == "leaky_relu":
        return tl.where(y > 0, y, y * negative_slope)
    elif ACTIVATION == "silu":
        return y / (1 + tl.exp(-y))
    else:
        return y


@triton.jit
def through_activation(
    dy,
    signs,
    y,
    image,
    channel,
    pixel,
    channels,
    pixels,
    inside,
    negative_slope,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
):
    """g: dy times the activation's derivative. SiLU needs y, the activation's argument."""
    if ACTIVATION == "relu":
        return tl.where(
            positive(signs, image, channel, pixel, channels, pixels, inside, LAST), dy, 0.0
        )
    elif ACTIVATION == "leaky_relu":
        return tl.where(
            positive(signs, image, channel, pixel, channels, pixels, inside, LAST),
            dy,
            dy * negative_slope,
        )
    elif ACTIVATION == "silu":
        sigmoid = 1 / (1 + tl.exp(-y))
        return dy * (sigmoid * (1 + y * (1 - sigmoid)))
    else:
        return dy


@triton.jit
def store_signs(
    signs,
    y,
    inside,
    image,
    first_channel,
    first_pixel,
    channels,
    pixels,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Stores the signs: a bit for each element of y, the activation's argument, with eight elements
    of a row in each byte.
    """
    # At NaN, ReLU passes the gradient on.
    positive = y > 0 if ACTIVATION == "leaky_relu" else tl.where(y <= 0, 0, 1) != 0
    bits = (positive & inside).to(tl.int32)
    ROWS: tl.constexpr = PIXELS if LAST else CHANNELS
    BYTES: tl.constexpr = (CHANNELS if LAST else PIXELS) // 8
    bytes = tl.sum(tl.reshape(bits, [ROWS, BYTES, 8]) << tl.arange(0, 8)[None, None, :], axis=2)
    row = (first_pixel if LAST else first_channel) + tl.arange(0, ROWS)[:, None]
    byte = (first_channel if LAST else first_pixel) // 8 + tl.arange(0, BYTES)[None, :]
    rows, row_bytes = pixels if LAST else channels, tl.cdiv(channels if LAST else pixels, 8)
    tl.store(
        signs + ((image * rows + row) * row_bytes + byte),
        bytes.to(tl.uint8),
        (row < rows) & (byte < row_bytes),
    )


@triton.jit
def positive(signs, image, channel, pixel, channels, pixels, inside, LAST: tl.constexpr):
    """Whether each of these elements of y is positive."""
    if LAST:
        places, bit = (image * pixels + pixel) * tl.cdiv(channels, 8) + channel // 8, channel % 8
    else:
        places, bit = (image * channels + channel) * tl.cdiv(pixels, 8) + pixel // 8, pixel % 8
    return (tl.load(signs + places, inside, 0) >> bit) & 1 != 0
