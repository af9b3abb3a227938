"""How the Triton kernels divide their work: sizes of tiles, splits of planes, and where one pass is
enough.
"""

import functools

import torch
import triton

Plan = tuple[tuple[int, ...], dict[str, int]]  # the grid of a kernel, and its settings
TILE = 1024  # elements: eight to a thread, 16 bytes of half precision
TABLE_TILE = (
    16,
    64,
)  # pixels and channels: the rows of a table lie by channels, and are read whole lines at a time
PIECE_TILE = (8, 128)  # pixels and channels where channels are last
PLANES_PIECE_TILE = (32, 32)  # and where not: neighbours mostly have the same row
PIECE_UNDER_WAY = 4  # of these tiles
ROW_TILE = (32, 32)  # pieces and channels
PRODUCT_TILES = (
    (128, 128, 8),
    (64, 64, 4),
    (32, 32, 4),
    (16, 32, 4),
)  # windows, outputs and warps, largest first
MOST_SEEN = 1024  # numbers of rows that a warp can hold beside its products
# elements that a program can hold without spilling, half as many where each has an address of its
# own
ONE_PASS = 16384


def tile_of(channels: int, pixels: int, last: bool, table: bool) -> tuple[int, int]:
    """Pixels and channels of one tile, both powers of two; eight or more along what lies together,
    for the bits of signs.
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
    """Whether one access can take eight elements."""
    return (channels if last else pixels) % 8 == 0


def warps_of(elements: int, channels: int, pixels: int, last: bool) -> int:
    """Warps of a tile: eight elements to a thread where one access takes them; four where each has
    an access and an address of its own.
    """
    return max(1, min(8, elements // (256 if aligned(channels, pixels, last) else 128)))


def blocks(pixels: int) -> Plan:
    """Grid and settings of a kernel in which each program has a tile's number of pixels."""
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
    programs take turns at tiles, `under_way` each time, so that together they go through memory in
    order; `at_once` of them run at once on a processor.
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
    """The number of splits into which programs that each go through `parts` parts are cut, to keep
    all processors busy; no more than run at once, or the last ones would run alone.
    """
    return max(1, min(parts, at_once * processors(device) // max(1, programs)))


def products(windows: int, taps: int, outputs: int, device: torch.device) -> Plan:
    """Grid and settings of a convolution at distinct windows: in large tiles, which read least, if
    those keep all processors busy.
    """
    seen = triton.next_power_of_2(taps)
    for tile_windows, tile_outputs, warps in PRODUCT_TILES:
        programs = triton.cdiv(windows, tile_windows) * triton.cdiv(outputs, tile_outputs)
        if programs >= processors(device) and tile_windows * seen <= MOST_SEEN * warps:
            break
    tile = {"WINDOWS": tile_windows, "OUTPUTS": tile_outputs, "CHANNELS": 64, "SEEN": seen}
    return (programs,), tile | {"num_warps": warps, "num_stages": 3}


def piece_tile(channels: int, last: bool) -> dict[str, int]:
    """Settings of a kernel that goes through pixels that have one row of a table."""
    most_pixels, most_channels = PIECE_TILE if last else PLANES_PIECE_TILE
    return {
        "UNDER_WAY": PIECE_UNDER_WAY,
        "PIXELS": most_pixels,
        "CHANNELS": min(most_channels, next_power(channels)),
        "num_warps": 4,
    }


def row_tile(channels: int) -> dict[str, int]:
    """Settings of a kernel that goes through the sums of pieces."""
    most_pieces, most_channels = ROW_TILE
    return {
        "PIECES": most_pieces,
        "CHANNELS": min(most_channels, next_power(channels)),
        "num_warps": 4,
    }


def one_pass(
    images: int, channels: int, pixels: int, last: bool, table: bool, tensors: int
) -> Plan | None:
    """Grid and settings of a kernel in which each program holds whole planes of `tensors` tensors;
    None where they do not fit, or where each element has an access of its own to x and to its row:
    that spills.
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
    return max(8, triton.next_power_of_2(number))


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under the interpreter, on a CPU, a few."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 2
    )
