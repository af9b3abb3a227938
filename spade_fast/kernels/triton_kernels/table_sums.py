"""dγ and dβ of a table: for each row, sums over the pixels that have it, always in the same order.

Pixels are sorted by their row and cut into pieces, each of one row and at most PIECE pixels. A
program sums each piece, then the sums of each row's pieces are added. With d = x − shift, a piece
yields Σg and Σg·d. From these follow dβ = Σg and dγ = scale·Σg·d + offset·Σg, and for the planes,
with the row's factor f = addend + γ, Σq = f·Σg and Σq·d = f·Σg·d, without another pass over x. The
numbers of rows and pieces depend on the layout, so the kernels are not specialised for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Activation, is_channels_last
from . import plan
from .tile import (
    channels_from,
    look_up,
    modulation_rows,
    per_plane,
    pixels_from,
    place,
    rows_of,
    signs_of,
    store_part,
    sum_pixels,
    through_activation,
    within,
    zeros,
)

PIECE = 256  # pixels


@triton.jit
def pixel_at(order, pixels, place, inside):
    """The pixels at positions of the sorted order."""
    return within(tl.load(order + place, inside, 0), pixels)


@triton.jit
def row_at(index, rows, order, image, pixels, place, inside):
    """The rows, in a table of `rows` rows, of the pixels at positions of the sorted order."""
    pixel = pixel_at(order, pixels, place, inside)
    return within(tl.load(index + (image * pixels + pixel), inside, 0), rows)


@triton.jit(do_not_specialize=["rows"])
def find_pieces_kernel(
    index, order, begins, images, pixels, rows, PIECE: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores 1 wherever a piece begins in the sorted pixels of all images, else 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < images * pixels
    image, position = at // pixels, at % pixels
    row = row_at(index, rows, order, image, pixels, at, inside)
    before = inside & (position > 0)
    row_before = row_at(index, rows, order, image, pixels, at - 1, before)
    is_first = (position == 0) | (row != row_before)
    tl.store(begins + at, (is_first | (position % PIECE == 0)).to(tl.int32), inside)


@triton.jit(do_not_specialize=["rows", "capacity"])
def list_pieces_kernel(
    index,
    order,
    pieces,
    firsts,
    ranges,
    images,
    pixels,
    rows,
    capacity,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores in firsts each piece's first position, followed by the end of the last piece; and in
    ranges, for each row in each image, its first piece and the one after its last.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < images * pixels
    image, position = at // pixels, at % pixels
    row = row_at(index, rows, order, image, pixels, at, inside)
    before, after = inside & (position > 0), inside & (position < pixels - 1)
    row_before = row_at(index, rows, order, image, pixels, at - 1, before)
    row_after = row_at(index, rows, order, image, pixels, at + 1, after)
    begins = inside & ((position == 0) | (row != row_before))
    ends = inside & ((position == pixels - 1) | (row != row_after))
    # There are more pieces than `capacity` only if `order` does not sort the pixels.
    piece = within(tl.load(pieces + at, inside, 1) - 1, capacity)
    tl.store(firsts + piece, at.to(tl.int32), begins | (inside & (position % PIECE == 0)))
    tl.store(firsts + piece + 1, at.to(tl.int32) + 1, ends & (at == images * pixels - 1))
    tl.store(ranges + 2 * (image * rows + row), piece, begins)
    tl.store(ranges + 2 * (image * rows + row) + 1, piece + 1, ends)


@triton.jit(do_not_specialize=["rows"])
def sum_pieces_kernel(
    dy,
    x,
    planes,
    gamma,
    beta,
    index,
    order,
    signs,
    pieces,
    firsts,
    found,
    images,
    channels,
    pixels,
    rows,
    negative_slope,
    addend,
    UNDER_WAY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Σg and Σg·d of a piece, for some channels, stored in found [capacity, 2, C]."""
    channel_blocks = tl.cdiv(channels, CHANNELS)
    piece = tl.program_id(0) // channel_blocks
    if piece < tl.load(pieces + images * pixels - 1):
        channel = channels_from(tl.program_id(0) % channel_blocks * CHANNELS, LAST, CHANNELS)
        begin, end = tl.load(firsts + piece), tl.load(firsts + piece + 1)
        image = (begin // pixels).to(tl.int64)
        row = row_at(index, rows, order, image, pixels, begin, True)
        shift = per_plane(planes, 0, images, image, channels, channel)
        sum_g, sum_g_deviation = zeros(LAST, PIXELS, CHANNELS), zeros(LAST, PIXELS, CHANNELS)
        for first in range(begin, end, UNDER_WAY * PIXELS):
            for i in tl.static_range(UNDER_WAY):
                position = pixels_from(first + i * PIXELS, LAST, PIXELS)
                inside = (position < end) & (channel < channels)
                pixel = pixel_at(order, pixels, position, position < end)
                deviation = (
                    tl.load(place(x, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
                    - shift
                )
                g = tl.load(place(dy, image, channel, pixel, LAST), inside, 0.0).to(tl.float32)
                y = None
                if ACTIVATION == "silu":
                    y = deviation * per_plane(planes, 1, images, image, channels, channel)
                    y += per_plane(planes, 2, images, image, channels, channel)
                    y = y * (
                        addend
                        + look_up(gamma, row, image, channel, pixel, channel < channels, LAST)
                    )
                    y += look_up(beta, row, image, channel, pixel, channel < channels, LAST)
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
                sum_g += tl.where(inside, g, 0.0)
                sum_g_deviation += tl.where(inside, g * deviation, 0.0)
        places = found + (2 * piece.to(tl.int64) * channels + channel)
        tl.store(places, sum_pixels(sum_g, LAST), channel < channels)
        tl.store(places + channels, sum_pixels(sum_g_deviation, LAST), channel < channels)


@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(
    found,
    ranges,
    planes,
    dgamma,
    dbeta,
    images,
    channels,
    rows,
    PIECES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dγ and dβ of a row of the table, for some channels, from its pieces."""
    channel_blocks = tl.cdiv(channels, CHANNELS)
    row = tl.program_id(0) // channel_blocks
    channel = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    sum_g, sum_g_normalised = (
        tl.zeros([PIECES, CHANNELS], tl.float32),
        tl.zeros([PIECES, CHANNELS], tl.float32),
    )
    for image in range(images):
        scale = per_plane(planes, 1, images, image, channels, channel)
        offset = per_plane(planes, 2, images, image, channels, channel)
        range_of_row = ranges + 2 * (image * rows + row)
        end = tl.load(range_of_row + 1)
        for first in range(tl.load(range_of_row), end, PIECES):
            piece = first + tl.arange(0, PIECES)[:, None]
            inside = (piece < end) & (channel < channels)
            places = found + (2 * piece.to(tl.int64) * channels + channel)
            g, g_deviation = (
                tl.load(places, inside, 0.0),
                tl.load(places + channels, inside, 0.0),
            )
            sum_g += g
            sum_g_normalised += tl.where(inside, scale * g_deviation + offset * g, 0.0)
    places = row.to(tl.int64) * channels + channel
    sum_g = tl.sum(sum_g, axis=0, keep_dims=True)
    sum_g_normalised = tl.sum(sum_g_normalised, axis=0, keep_dims=True)
    tl.store(dgamma + places, sum_g_normalised, channel < channels)
    tl.store(dbeta + places, sum_g, channel < channels)


@triton.jit(do_not_specialize=["rows", "capacity"])
def sum_planes_kernel(
    found,
    gamma,
    index,
    order,
    pieces,
    firsts,
    parts,
    images,
    channels,
    pixels,
    rows,
    capacity,
    addend,
    PIECES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Σq and Σq·d of some planes, summed over this program's split of their image's pieces."""
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    first_piece = tl.load(pieces + image * pixels) - 1
    count = tl.load(pieces + ((image + 1) * pixels - 1)) - first_piece
    split_pieces = tl.cdiv(tl.cdiv(count, PIECES), tl.num_programs(1)) * PIECES
    begin = first_piece + tl.program_id(1) * split_pieces
    end = tl.minimum(tl.minimum(begin + split_pieces, first_piece + count), capacity)
    sum_q, sum_q_deviation = (
        tl.zeros([PIECES, CHANNELS], tl.float32),
        tl.zeros([PIECES, CHANNELS], tl.float32),
    )
    for first in range(begin, end, PIECES):
        piece = first + tl.arange(0, PIECES)[:, None]
        inside = (piece < end) & (channel < channels)
        first_place = tl.load(firsts + piece, piece < end, 0)
        row = row_at(index, rows, order, image, pixels, first_place, piece < end)
        factor = addend + look_up(gamma, row, image, channel, None, inside, False)
        places = found + (2 * piece.to(tl.int64) * channels + channel)
        sum_q += tl.where(inside, factor * tl.load(places, inside, 0.0), 0.0)
        sum_q_deviation += tl.where(inside, factor * tl.load(places + channels, inside, 0.0), 0.0)
    sum_q, sum_q_deviation = (
        tl.sum(sum_q, axis=0, keep_dims=True),
        tl.sum(sum_q_deviation, axis=0, keep_dims=True),
    )
    store_part(parts, 0, 2, sum_q, images, image, channels, channel)
    store_part(parts, 1, 2, sum_q_deviation, images, image, channels, channel)


def table_gradients(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    index: Tensor,
    order: Tensor,
    signs: Tensor,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dγ and dβ [K, C], and parts [splits, 2, N, C] of the planes' sums."""
    last = is_channels_last(x)
    images, channels, pixels = x.flatten(2).shape
    rows, places = gamma.shape[0], images * pixels
    if places >= 2**31:  # places in the sorted order are int32
        raise ValueError(
            f"index has shape {list(index.shape)}; it should have fewer than 2**31 pixels"
        )
    index, order, planes = index.contiguous(), order.contiguous(), planes.contiguous()
    gamma_rows, beta_rows = (
        None if rows is None else modulation_rows(rows, last, index) for rows in (gamma, beta)
    )
    dgamma, dbeta = gamma.new_empty(rows, channels), gamma.new_empty(rows, channels)
    if places == 0:
        return (
            dgamma.zero_(),
            dbeta.zero_(),
            x.new_zeros(1, 2, images, channels, dtype=torch.float32),
        )
    # A cumulative sum of their beginnings numbers the pieces. Their total stays on the device.
    capacity = min(places, images * rows + triton.cdiv(places, PIECE) + images)
    pieces = torch.empty(places, dtype=torch.int32, device=x.device)
    grid, settings = plan.blocks(places)
    find_pieces_kernel[grid](index, order, pieces, images, pixels, rows, PIECE=PIECE, **settings)
    pieces = pieces.cumsum(0, dtype=torch.int32)
    firsts = torch.empty(capacity + 1, dtype=torch.int32, device=x.device)
    ranges = torch.zeros(images, rows, 2, dtype=torch.int32, device=x.device)
    list_pieces_kernel[grid](
        index,
        order,
        pieces,
        firsts,
        ranges,
        images,
        pixels,
        rows,
        capacity,
        PIECE=PIECE,
        **settings,
    )
    found = torch.empty(capacity, 2, channels, dtype=torch.float32, device=x.device)
    settings = plan.piece_tile(channels, last)
    sum_pieces_kernel[(capacity * triton.cdiv(channels, settings["CHANNELS"]),)](
        rows_of(dy, last),
        rows_of(x, last),
        planes,
        gamma_rows,
        beta_rows,
        index,
        order,
        signs_of(signs),
        pieces,
        firsts,
        found,
        images,
        channels,
        pixels,
        rows,
        negative_slope,
        float(plus_one),
        ACTIVATION=activation,
        LAST=last,
        **settings,
    )
    settings = plan.row_tile(channels)
    blocks = triton.cdiv(channels, settings["CHANNELS"])
    sum_rows_kernel[(rows * blocks,)](
        found, ranges, planes, dgamma, dbeta, images, channels, rows, **settings
    )
    tiles = triton.cdiv(capacity // images, settings["PIECES"])
    splits = plan.splits(images * blocks, tiles, x.device, at_once=8)
    parts = x.new_empty(splits, 2, images, channels, dtype=torch.float32)
    sum_planes_kernel[(images * blocks, splits)](
        found,
        gamma_rows,
        index,
        order,
        pieces,
        firsts,
        parts,
        images,
        channels,
        pixels,
        rows,
        capacity,
        float(plus_one),
        **settings,
    )
    return dgamma, dbeta, parts
