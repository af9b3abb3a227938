"""How the Triton kernels divide their work: the sizes of tiles, the splits of planes, and when one
pass is enough.
"""

import functools

import torch
import triton

Plan = tuple[tuple[int, ...], dict[str, int]]  # the grid of a kernel, and its settings
TILE = 1024  # elements: eight to a thread, 16 bytes of half precision
# Pixels and channels. A table's rows are contiguous along channels, and read in whole cache lines.
TABLE_TILE = (16, 64)
PIECE_TILE = (8, 128)  # pixels and channels, if channels are last
PLANES_PIECE_TILE = (32, 32)  # and if not: neighbours mostly have the same row
PIECE_UNDER_WAY = 4  # of these tiles are in flight at once
ROW_TILE = (32, 32)  # pieces and channels
# Windows, outputs and warps, largest first.
PRODUCT_TILES = ((128, 128, 8), (64, 64, 4), (32, 32, 4), (16, 32, 4))
MOST_SEEN = 1024  # row numbers that a warp can hold in addition to its products
# Elements that a program can hold without spilling; half of it if each element has its own address.
ONE_PASS = 16384


def tile_of(channels: int, pixels: int, last: bool, table: bool) -> tuple[int, int]:
    """Pixels and channels of one tile, both powers of two. Along the contiguous axis there are
    eight or more, because signs are stored eight to a byte.
    """
    if table:
        most_pixels, most_channels = TABLE_TILE
    elif last:
        most_channels = min(128, next_power(channels))
        most_pixels = TILE // most_channels
    else:
        most_pixels = min(TILE, next_power(pixels))
        most_channels = TILE // most_pixels
    return min(most_pixels, next_power(pixels)), min(most_channels, next_power(channels))


def tiles(images: int, channels: int, pixels: int, last: bool, table: bool) -> Plan:
    """Grid and settings of a kernel in which each program has one tile."""
    tile_pixels, tile_channels = tile_of(channels, pixels, last, table)
    programs = images * triton.cdiv(channels, tile_channels) * triton.cdiv(pixels, tile_pixels)
    warps = warps_of(tile_pixels * tile_channels, channels, pixels, last)
    return (programs,), {"PIXELS": tile_pixels, "CHANNELS": tile_channels, "num_warps": warps}


def aligned(channels: int, pixels: int, last: bool) -> bool:
    """Whether one memory access can cover eight elements."""
    return (channels if last else pixels) % 8 == 0


def warps_of(elements: int, channels: int, pixels: int, last: bool) -> int:
    """The number of warps for a tile: eight elements per thread if one access covers them, four if
    each element needs its own access and address.
    """
    return max(1, min(8, elements // (256 if aligned(channels, pixels, last) else 128)))


def blocks(pixels: int) -> Plan:
    """Grid and settings of a kernel in which each program has TILE pixels."""
    return (triton.cdiv(pixels, TILE),), {"BLOCK": TILE, "num_warps": 4}


def sweeps(
    images: int,
    channels: int,
    pixels: int,
    last: bool,
    device: torch.device,
    at_once: int,
    under_way: int,
) -> Plan:
    """Grid and settings of a kernel in which each program goes through a part of some planes. The
    programs take turns, with `under_way` tiles each time, so that together they go through memory
    in order. A multiprocessor runs `at_once` of them at once.
    """
    tile_pixels, tile_channels = tile_of(channels, pixels, last, False)
    programs = images * triton.cdiv(channels, tile_channels)
    parts = triton.cdiv(pixels, under_way * tile_pixels)
    return (programs, splits(programs, parts, device, at_once)), {
        "UNDER_WAY": under_way,
        "PIXELS": tile_pixels,
        "CHANNELS": tile_channels,
        "num_warps": warps_of(tile_pixels * tile_channels, channels, pixels, last),
    }


def splits(programs: int, parts: int, device: torch.device, at_once: int) -> int:
    """The number of splits of each of several programs with `parts` parts, to keep all
    multiprocessors busy. It is at most the number that run at once: otherwise the last ones would
    run alone.
    """
    return max(1, min(parts, at_once * processors(device) // max(1, programs)))


def products(windows: int, taps: int, outputs: int, device: torch.device) -> Plan:
    """Grid and settings of a convolution at distinct windows. Large tiles read the least memory, so
    the largest that keep all multiprocessors busy are used.
    """
    seen = triton.next_power_of_2(taps)
    for tile_windows, tile_outputs, warps in PRODUCT_TILES:
        programs = triton.cdiv(windows, tile_windows) * triton.cdiv(outputs, tile_outputs)
        if programs >= processors(device) and tile_windows * seen <= MOST_SEEN * warps:
            break
    tile = {"WINDOWS": tile_windows, "OUTPUTS": tile_outputs, "CHANNELS": 64, "SEEN": seen}
    return (programs,), tile | {"num_warps": warps, "num_stages": 3}


def piece_tile(channels: int, last: bool) -> dict[str, int]:
    """Settings of a kernel that sums over pixels with the same row of a table."""
    most_pixels, most_channels = PIECE_TILE if last else PLANES_PIECE_TILE
    return {
        "UNDER_WAY": PIECE_UNDER_WAY,
        "PIXELS": most_pixels,
        "CHANNELS": min(most_channels, next_power(channels)),
        "num_warps": 4,
    }


def row_tile(channels: int) -> dict[str, int]:
    """Settings of a kernel that adds up the sums of pieces."""
    most_pieces, most_channels = ROW_TILE
    return {
        "PIECES": most_pieces,
        "CHANNELS": min(most_channels, next_power(channels)),
        "num_warps": 4,
    }


def one_pass(
    images: int, channels: int, pixels: int, last: bool, table: bool, tensors: int
) -> Plan | None:
    """Grid and settings of a kernel in which each program holds whole planes of `tensors` tensors.
    None if they do not fit, or if each element needs its own access both to x and to its row, which
    would spill registers.
    """
    if table and not last and not aligned(channels, pixels, last):
        return None
    tile_pixels = next_power(pixels)
    tile_channels = min(8 if last or table else max(1, TILE // tile_pixels), next_power(channels))
    elements = tile_pixels * tile_channels
    if elements * tensors > (ONE_PASS // 2 if last or table else ONE_PASS):
        return None
    programs = images * triton.cdiv(channels, tile_channels)
    return (programs,), {
        "PIXELS": tile_pixels,
        "CHANNELS": tile_channels,
        "num_warps": max(1, min(16, elements // 512)),
    }


def next_power(number: int) -> int:
    """The next power of two, at least eight."""
    return max(8, triton.next_power_of_2(number))


@functools.lru_cache
def processors(device: torch.device) -> int:
    """The number of a GPU's multiprocessors; on a CPU, under the interpreter, 2."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 2
    )
