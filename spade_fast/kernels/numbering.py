"""Finds and numbers the codes and the distinct windows of a condition in plain PyTorch, on the
condition's device.

Equal items are found by sorting hashes of 64 bits. Each item is then compared with the first that
has its hash. If any two differ, all are hashed again with another multiplier, so that hashes decide
nothing. Numbers follow first appearance, as those of the CPU kernels do. The host waits for the
device once, to learn the sizes of the results (and, for a condition, once before that, to recognise
dense features early).
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Lists

SAMPLE = 1024  # the approximate number of pixels that are sampled to recognise dense features
CHANNELS = 16  # of a condition, compared at a time
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def find_codes(segmap: Tensor) -> tuple[Tensor, Tensor] | None:
    """Numbers the distinct vectors of a condition's pixels, compared bit for bit. Returns codes,
    int32 [N, *spatial], and the first of all N · pixels places that has each code; None if there
    are too many for a layout: more than 64 plus a quarter of the pixels.
    """
    return find_codes_by(segmap, hash_vectors, vectors_differ)


def find_codes_by(
    segmap: Tensor,
    hash_vectors: Callable[[Tensor, int], Tensor],
    vectors_differ: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor] | None:
    """find_codes with the given implementations of its two passes over the condition."""
    bits = segmap.view(BITS[segmap.element_size()]).flatten(2)
    if _are_dense(bits, hash_vectors):
        return None
    for attempt in itertools.count():
        firsts = _first_equal(hash_vectors(bits, multiplier(attempt)).flatten())
        ranks = _count_firsts(firsts)
        count, collided = _read(_last(ranks), vectors_differ(bits, firsts))
        if _are_many(count, firsts.numel()):
            return None
        if not collided:
            codes = _numbers(firsts, ranks).view(segmap.shape[0], *segmap.shape[2:])
            return codes, _first_places(ranks, count)
    raise AssertionError("attempts do not end")


def hash_vectors(bits: Tensor, multiplier: int) -> Tensor:
    """A hash for each pixel of bits, whole numbers [N, channels, pixels]: int64 [N, pixels]."""
    hashes = bits.new_zeros(bits.shape[0], bits.shape[2], dtype=torch.int64)
    for channel in bits.unbind(1):
        # Vectors that differ in the highest bit of two channels, a double's sign, would have one
        # hash: 2**63 · (the sum of two odd powers) is 0 modulo 2**64. So it counts lower down, too.
        channel = channel ^ channel >> 32 if channel.dtype == torch.int64 else channel
        hashes = torch.add(channel, hashes, alpha=multiplier)
    return hashes


def vectors_differ(bits: Tensor, firsts: Tensor) -> Tensor:
    """Whether any pixel's vector differs from the one at the place that `firsts`, [N · pixels], has
    for it.
    """
    differ = firsts.new_zeros((), dtype=torch.bool)
    for part in bits.split(CHANNELS, dim=1):
        vectors = part.movedim(1, 2).flatten(0, 1)
        differ = differ | (vectors[firsts] != vectors).any()
    return differ


def number_windows(codes: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Numbers the distinct windows of kernel_size taps per axis of codes [N, *spatial], int32 and
    not negative.

    Returns each pixel's window, int32 [N, *spatial], and the codes that each window sees, int32
    [windows, taps], −1 beyond the border. Along each axis a pixel is tap kernel_size // 2 of its
    own window.
    """
    (((numbers, contents, _),),) = _number([codes], kernel_size, 1)
    return numbers, contents


def find_windows(
    codes: Tensor,
    sizes: Sequence[Sequence[int]],
    kernel_size: int,
    num_codes: int,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Lists, Lists, Tensor, Tensor]]:
    """Numbers the distinct windows of codes [N, *spatial], brought to each of these sizes by
    `resize_codes`, and the windows of these windows. Returns for each size two results of
    `list_windows`, `index` and `order`, as `windows.Windows` has them.
    """
    maps, found = [resize_codes(codes, size, dtype) for size in sizes], []
    for (_, hidden, seen_codes), (index, table, seen_windows) in _number(maps, kernel_size, 2):
        check_windows(hidden, num_codes)
        found.append(
            (
                list_windows(hidden, num_codes, seen_codes),
                list_windows(table, len(hidden), seen_windows),
                index,
                sort_pixels(index),
            )
        )
    return found


def find_patches(
    codes: Tensor, kernel_size: int, stride: int, padding: int, num_codes: int
) -> tuple[Tensor, Lists, Tensor, Tensor]:
    """Numbers the windows that a convolution of codes [N, *spatial] sees. Returns `contents`, their
    `list_windows`, `index` and `order`, as `windows.Patches` has them.

    No window may be larger than the codes with their padding.
    """
    return find_patches_by(
        codes, kernel_size, stride, padding, num_codes, number_windows, window_sums, sort_pixels
    )


def find_patches_by(
    codes: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    num_codes: int,
    number_windows: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    window_sums: Callable[[Tensor, int], Lists],
    sort_pixels: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Lists, Tensor, Tensor]:
    """find_patches with the given implementations of its parts."""
    # Padding becomes one more code, so that every window is within the map.
    numbers, contents = number_windows(
        F.pad(codes, (padding,) * 2 * (codes.dim() - 1), value=num_codes), kernel_size
    )
    for dim in range(1, codes.dim()):
        last = (numbers.shape[dim] - kernel_size) // stride * stride
        numbers = numbers.narrow(dim, kernel_size // 2, last + 1)
        numbers = numbers[(slice(None),) * dim + (slice(None, None, stride),)]
    index, present = number_windows(numbers.contiguous(), 1)
    contents = contents[present[:, 0].long()]
    contents = torch.where(contents == num_codes, -1, contents)
    return contents, window_sums(contents, num_codes), index, sort_pixels(index)


def resize_codes(codes: Tensor, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """codes [N, *spatial] at another size, from the pixels that `F.interpolate(mode="nearest")`
    takes of a condition in this dtype.
    """
    for dim, (given, wanted) in enumerate(zip(codes.shape[1:], size), start=1):
        if given == wanted:
            continue
        if wanted > 0 and given % wanted == 0:
            codes = codes[(slice(None),) * dim + (slice(None, None, given // wanted),)]
        else:
            pixels = torch.arange(given, dtype=reckoned(codes, dtype), device=codes.device)
            pixels = F.interpolate(pixels[None, None], size=wanted, mode="nearest")[0, 0]
            codes = codes.index_select(dim, pixels.long())
    return codes.contiguous()


def reckoned(codes: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `F.interpolate` computes positions for a condition in this dtype: float64
    for float64 on a CPU, else float32.
    """
    return torch.float64 if dtype == torch.float64 and codes.is_cpu else torch.float32


def check_windows(hidden: Tensor, num_codes: int) -> None:
    """Raises a ValueError if the lists of these windows would need numbers beyond int32."""
    windows, taps = hidden.shape
    if max(num_codes, windows) * taps >= 2**31:
        raise ValueError(
            f"codes has {windows} distinct windows of {taps} taps; together they should be below"
            " 2**31"
        )


def window_sums(contents: Tensor, rows: int) -> Lists:
    """The lists of windows with these contents: [windows, taps], numbers of `rows` rows, −1 beyond
    the border.
    """
    return list_windows(contents, rows, int((contents >= 0).sum()))


def list_windows(contents: Tensor, rows: int, seen: int) -> Lists:
    """The contents of windows, [windows, taps] of `rows` rows, as the lists that `windows.Sums`
    describes.

    seen: the number of taps within the border, over all windows.
    """
    windows, taps = contents.shape
    inside = (contents >= 0).flatten()
    numbers = (
        contents * taps + torch.arange(taps, dtype=torch.int32, device=contents.device)
    ).flatten()
    # Each entry goes to its place in the list; those beyond the border go to an extra last place.
    places = torch.where(inside, inside.cumsum(0) - 1, seen)
    listed = numbers.new_empty(seen + 1).scatter_(0, places, numbers)[:seen]
    window_of = torch.arange(windows, dtype=torch.int32, device=contents.device).repeat_interleave(
        taps
    )
    window_of = numbers.new_empty(seen + 1).scatter_(0, places, window_of)[:seen]
    offsets = F.pad(inside.view(windows, taps).sum(1).cumsum(0), (1, 0)).to(torch.int32)
    by_row, order = listed.sort(stable=True)
    back_offsets = torch.searchsorted(
        by_row,
        torch.arange(rows * taps + 1, dtype=torch.int32, device=contents.device),
        out_int32=True,
    )
    return offsets, listed, back_offsets, window_of[order]


def sort_pixels(index: Tensor) -> Tensor:
    """`order` for an index: [N, *spatial] to [N, pixels]."""
    rows = index.flatten(1)
    images = torch.arange(len(rows), device=index.device)[:, None]
    places = (rows + (images << 32)).flatten().argsort(stable=True).view(rows.shape)
    return (places - images * rows.shape[1]).to(torch.int32)


class _Level(NamedTuple):
    """Numbered windows, before the host knows how many there are."""

    numbers: torch.Tensor
    taps: torch.Tensor  # [N, *spatial, *kernel]: what each place's window sees
    ranks: torch.Tensor  # [places]: the number of distinct windows up to each place
    sizes: tuple  # numbers of windows and of their taps within the border; whether hashes collide


def _number(maps, kernel_size, levels):
    """Numbers the windows of each map of codes, the windows of those windows, and so on. Returns
    for each level numbers, contents, and the number of taps within the border.
    """
    for attempt in itertools.count():
        found = [_number_levels(codes, kernel_size, levels, attempt) for codes in maps]
        sizes = iter(_read(*(size for of_map in found for level in of_map for size in level.sizes)))
        found = [
            [(level, next(sizes), next(sizes), next(sizes)) for level in of_map] for of_map in found
        ]
        if not any(collided for of_map in found for _, _, _, collided in of_map):
            return [
                [(level.numbers, _contents(level, count), seen) for level, count, seen, _ in of_map]
                for of_map in found
            ]


def _number_levels(codes, kernel_size, levels, attempt):
    found = []
    for _ in range(levels):
        found.append(_number_level(codes, kernel_size, attempt))
        codes = found[-1].numbers
    return found


def _number_level(codes, kernel_size, attempt):
    half, axes = kernel_size // 2, codes.dim() - 1
    if codes.numel() == 0:
        nothing = codes.new_zeros((), dtype=torch.int64)
        taps = codes.new_empty(*codes.shape, *[kernel_size] * axes)
        return _Level(codes, taps, codes.new_empty(0, dtype=torch.int64), (nothing,) * 3)
    padded = F.pad(codes, (half, kernel_size - 1 - half) * axes, value=-1)
    taps, hashes = padded, padded.long()
    for dim in range(1, axes + 1):
        taps = taps.unfold(dim, kernel_size, 1)
        factor = multiplier(attempt, dim)
        hashes, *runs = hashes.unfold(dim, kernel_size, 1).unbind(-1)
        for run in runs:
            hashes = torch.add(run, hashes, alpha=factor)
    firsts = _first_equal(hashes.flatten())
    ranks = _count_firsts(firsts)
    differ = (taps[_positions(firsts, codes.shape)].view(taps.shape) != taps).any()
    seen = _taps_inside(codes, kernel_size).expand(codes.shape).flatten()
    seen = torch.where(ranks.diff(prepend=ranks.new_zeros(1)) > 0, seen, 0).sum()
    return _Level(
        _numbers(firsts, ranks).view(codes.shape), taps, ranks, (_last(ranks), seen, differ)
    )


def _contents(level, count):
    places = _first_places(level.ranks, count)
    return level.taps[_positions(places, level.numbers.shape)].flatten(1)


def _taps_inside(codes, kernel_size):
    """The number of taps within the border, for the window at each place: [*spatial]."""
    taps, half = torch.ones((), dtype=torch.int64, device=codes.device), kernel_size // 2
    for length in codes.shape[1:]:
        position = torch.arange(length, device=codes.device)
        taps = taps[..., None] * (
            position.clamp(max=half) + 1 + position.flip(0).clamp(max=kernel_size - 1 - half)
        )
    return taps


def multiplier(attempt: int, axis: int = 0) -> int:
    """The multiplier of a hash: large, odd, and different for each attempt and axis."""
    return random.Random(f"{attempt} {axis}").getrandbits(62) | 1


def _first_equal(keys):
    """For each place of keys [places], the first place that has the same key."""
    if len(keys) == 0:
        return keys
    in_order, places = keys.sort(stable=True)
    is_equal = in_order[1:] == in_order[:-1]
    begins = (
        F.pad(torch.arange(1, len(keys), device=keys.device).masked_fill(is_equal, 0), (1, 0))
        .cummax(0)
        .values
    )
    return torch.empty_like(places).scatter_(0, places, places[begins])


def _count_firsts(firsts):
    """For each place, the number of places up to it that are their own first."""
    return (firsts == torch.arange(len(firsts), device=firsts.device)).cumsum(0)


def _numbers(firsts, ranks):
    """One number for all places with the same first place, in order of first appearance."""
    return (ranks[firsts] - 1).to(torch.int32)


def _first_places(ranks, count):
    """The place where each number first appears."""
    return torch.searchsorted(ranks, torch.arange(1, count + 1, device=ranks.device))


def _positions(places, shape):
    """Places of a map, counted through, as one index per dimension."""
    positions = []
    for length in reversed(shape):
        positions.append(places % length)
        places = places // length
    return tuple(reversed(positions))


def _are_dense(bits, hash_vectors):
    """Whether a sample of the first image's pixels already has too many codes for a layout."""
    sample = bits[:1, :, :: max(1, bits.shape[2] // SAMPLE)]
    return sample.numel() > 0 and _are_many(
        len(hash_vectors(sample, multiplier(0)).unique()), sample.shape[2]
    )


def _are_many(codes, pixels):
    return codes > 64 + pixels // 4


def _last(ranks):
    return ranks[-1] if len(ranks) else ranks.sum()


def _read(*numbers):
    """Copies numbers from the device to the host, which waits for them."""
    return torch.stack([number.to(torch.int64) for number in numbers]).tolist()
