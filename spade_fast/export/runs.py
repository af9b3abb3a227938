"""A convolution of a map that nearest neighbour has enlarged, computed on the map before that.

Along an axis, pixels that the enlargement has repeated f times are f equal pixels in a row. Of the
f pixels that a convolution computes there, those that see the same pixels of the small map, each
equally often, are equal too: with 3 taps, all but the first and the last. So one is computed for
each such run, by a small convolution with sums of taps, and repeated. Everything is exact, borders
with zeros included.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def runs_of(factor: int, taps: int) -> tuple[list[int], list[list[int]]]:
    """For each of the `factor` pixels that stand for one small pixel, the number of its run; and
    for each run, which small pixels its taps see, relative to that one.
    """
    half = taps // 2
    seen = [
        tuple((pixel + tap) // factor for tap in range(-half, half + 1)) for pixel in range(factor)
    ]
    distinct = list(dict.fromkeys(seen))
    return [distinct.index(one) for one in seen], [list(one) for one in distinct]


def convolve_runs(
    x: torch.Tensor, factor: int, weight: torch.Tensor, bias: torch.Tensor
) -> list[torch.Tensor]:
    """What a convolution that keeps a map's size makes of x [N, C, *spatial] after its enlargement
    by `factor`: [N, out, *spatial] for each combination of runs along the axes.

    weight: [out, C, *kernel], with an odd number of taps, the same along each axis.
    """
    dims = weight.dim() - 2
    _, runs = runs_of(factor, weight.shape[-1])
    parts = []
    for seen in itertools.product(runs, repeat=dims):
        own, frame = weight, list[int]()
        for dim, places in enumerate(seen, start=2):
            sums = [
                own.index_select(dim, torch.tensor(taps, device=own.device)).sum(dim)
                for place in range(places[0], places[-1] + 1)
                if (taps := [tap for tap, one in enumerate(places) if one == place])
            ]
            own = torch.stack(sums, dim)
            frame = [-places[0], places[-1], *frame]
        parts.append(CONVOLVE[dims](F.pad(x, frame), own, bias))
    return parts


def assembled(parts: Sequence[torch.Tensor], factor: int, taps: int) -> torch.Tensor:
    """The whole map [N, out, *large] of these parts, in the order of `convolve_runs`."""
    dims = parts[0].dim() - 2
    numbers, runs = runs_of(factor, taps)
    # With channels together, pixels are copied as a whole.
    maps = [part.movedim(1, -1) for part in parts]
    for dim in range(dims, 0, -1):
        groups = [maps[first : first + len(runs)] for first in range(0, len(maps), len(runs))]
        maps = [
            torch.stack([group[number] for number in numbers], dim + 1).flatten(dim, dim + 1)
            for group in groups
        ]
    return maps[0].movedim(-1, 1)
