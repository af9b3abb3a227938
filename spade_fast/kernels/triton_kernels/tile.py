"""What the Triton kernels share: how tensors lie in memory, which tile a program has, and what is
done to one element.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor [N, C, pixels] whose rows, its planes or its pixels with all their channels, have no
    gaps inside; or a table [K, C].
    """

    data: torch.Tensor
    image: int  # elements from image to image
    row: int  # and from row to row


def rows_of(x: Tensor, last: bool) -> Rows:
    """x [N, C, *spatial] as Rows of planes, or of pixels where the channels are last; a copy where
    that has gaps.
    """
    flat = x.flatten(2)
    inner = 1 if last else 2
    if flat.shape[inner] > 1 and flat.stride(inner) != 1:
        flat = flat.transpose(1, 2).contiguous().transpose(1, 2) if last else flat.contiguous()
    return Rows(flat, flat.stride(0), flat.stride(3 - inner))


def modulation_rows(gamma: Tensor, last: bool, index: Tensor | None) -> Rows:
    """γ or β as Rows, dense or a table."""
    if index is None:
        return rows_of(gamma, last)
    gamma = gamma if gamma.stride(1) == 1 else gamma.contiguous()
    return Rows(gamma, 0, gamma.stride(0))


def empty_rows(x: Tensor, last: bool, dtype: torch.dtype) -> Rows:
    """Rows of x's shape to be written to."""
    images, channels, pixels = x.flatten(2).shape
    shape = (images, pixels, channels) if last else (images, channels, pixels)
    flat = x.new_empty(shape, dtype=dtype)
    return Rows(flat.transpose(1, 2) if last else flat, channels * pixels, shape[2])


def like(rows: Rows, x: Tensor) -> Tensor:
    """What was written, in x's shape, with the strides of empty_like(x), as the fakes say."""
    y = rows.data.view(x.shape)
    if y.stride() == x.stride() or x.is_contiguous():
        return y
    strides = torch.empty_like(x, device="meta").stride()
    if all(size == 1 or one == other for size, one, other in zip(x.shape, y.stride(), strides)):
        return y
    return torch.empty_like(x, dtype=y.dtype).copy_(y)


@triton.jit
def tile(channels, pixels, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's image, first channel and first pixel: tiles follow each other as they lie in
    memory.
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
    """The channels of a tile. What lies together in memory is along a tile's last axis: [1,
    CHANNELS], or [CHANNELS, 1].
    """
    if LAST:
        return first + tl.arange(0, CHANNELS)[None, :]
    else:
        return first + tl.arange(0, CHANNELS)[:, None]


@triton.jit
def pixels_from(first, LAST: tl.constexpr, PIXELS: tl.constexpr):
    """The pixels of a tile, [PIXELS, 1] or [1, PIXELS]."""
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
    """The sum of TILES tiles, whose pixels follow each other: each thread adds up its own."""
    if LAST:
        return tl.sum(tl.reshape(values, [TILES, PIXELS, CHANNELS]), axis=0)
    else:
        return tl.sum(tl.reshape(values, [CHANNELS, TILES, PIXELS]), axis=1)


@triton.jit
def place(rows, image, channel, pixel, LAST: tl.constexpr):
    """Where elements are."""
    if LAST:
        return rows.data + (image * rows.image + pixel.to(tl.int64) * rows.row + channel)
    else:
        return rows.data + (image * rows.image + channel.to(tl.int64) * rows.row + pixel)


@triton.jit
def look_up(rows, row, image, channel, pixel, inside, LAST: tl.constexpr):
    """γ or β of these elements: from where x has its own, or from the row of the table that each
    pixel has.
    """
    if row is None:
        return tl.load(place(rows, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
    else:
        return tl.load(rows.data + (row.to(tl.int64) * rows.row + channel), inside, 0.0).to(
            tl.float32
        )


@triton.jit
def within(number, count):
    """These numbers, or the last one below a count where one is not: nobody waits to ask whether
    all are. (A negative one is large without its sign, as csrc/cuda has it, too.)
    """
    return tl.minimum(number.to(tl.uint32), tl.cast(count - 1, tl.uint32)).to(tl.int32)


@triton.jit
def row_of(index, rows, image, pixel, pixels):
    """The rows of a table of `rows` rows that pixels have."""
    return within(tl.load(index + (image * pixels + pixel), pixel < pixels, 0), rows)


@triton.jit
def per_plane(numbers, which, images, image, channels, channel):
    """One of several numbers of each plane, [k, N, C]: of these channels."""
    return tl.load(
        numbers + ((which * images + image) * channels + channel), channel < channels, 0.0
    )


@triton.jit
def store_part(parts, which, kinds, numbers, images, image, channels, channel):
    """One of several numbers of each of these planes, from this program's split of them: to parts
    [splits, kinds, N, C].
    """
    places = ((tl.program_id(1).to(tl.int64) * kinds + which) * images + image) * channels + channel
    tl.store(parts + places, numbers, channel < channels)


@triton.jit
def activate(y, negative_slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, y)  # NaN stays
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
    """g: dy times the activation's derivative, which for SiLU takes y before it."""
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
    """A bit for each element of y, before the activation, eight of a row to a byte."""
    positive = (
        y > 0 if ACTIVATION == "leaky_relu" else tl.where(y <= 0, 0, 1) != 0
    )  # at NaN ReLU passes the gradient on
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
    """Which of these elements of y are positive."""
    if LAST:
        places, bit = (image * pixels + pixel) * tl.cdiv(channels, 8) + channel // 8, channel % 8
    else:
        places, bit = (image * channels + channel) * tl.cdiv(pixels, 8) + pixel // 8, pixel % 8
    return (tl.load(signs + places, inside, 0) >> bit) & 1 != 0
