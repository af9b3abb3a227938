"""The distinct windows of a code map, numbered by standard operators, for an exported graph.

Three whole numbers below 2²¹ fit into one of 64 bits. So windows are numbered exactly by
`torch.unique`, ONNX's Unique: along one axis after another, three neighbours become one number, and
equal numbers get one new, small number. Each number can be taken apart again, which gives the
contents of every distinct window.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

BITS = 21  # of each of the three numbers


class Windows(NamedTuple):
    """The distinct windows of a map, as rows of the distinct runs along its last axis. All int64.

    index: [N, *spatial], which of the K windows each pixel has.
    windows: [K, taps of the other axes], the runs that each window consists of.
    runs: [R, taps], what each run sees.
    """

    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    windows: torch.Tensor
    runs: torch.Tensor

    @property
    def contents(self) -> torch.Tensor:
        """What each window sees, [K, taps of all axes]."""
        return self.runs.index_select(0, self.windows.flatten()).view(self.windows.shape[0], -1)


def number_windows(codes: torch.Tensor, taps: int, outside: int) -> Windows:
    """The windows of `taps` codes per axis around each pixel.

    codes: int64 [N, *spatial], not negative; outside: what windows see beyond the border, the code
    of no pixel.
    """
    return _number(codes, taps, F.pad(codes, _around(codes, taps), value=outside))


def number_again(found: Windows, taps: int) -> Windows:
    """The windows of the numbers of windows. Beyond the border they see K, the number of none."""
    # No operator pads with a number that is known only when the graph runs. So all numbers are one
    # higher in the meantime, and 0 is beyond the border.
    index, windows, runs = _number(
        found.index, taps, F.pad(found.index + 1, _around(found.index, taps))
    )
    return Windows(index, windows, torch.where(runs == 0, found.windows.shape[0], runs - 1))


def _around(codes, taps):
    return [taps // 2] * 2 * (codes.dim() - 1)


def _number(codes, taps, padded):
    last = codes.dim() - 1
    padded, runs = number_tuples(_neighbours(padded, last, taps, codes.shape[last]))
    if last == 1:
        return Windows(padded, torch.arange(runs.shape[0], device=codes.device)[:, None], runs)
    windows: torch.Tensor | None = None
    for dim in range(last - 1, 0, -1):
        padded, seen = number_tuples(_neighbours(padded, dim, taps, codes.shape[dim]))
        if windows is not None:
            seen = windows.index_select(0, seen.flatten()).view(seen.shape[0], -1)
        windows = seen
    assert windows is not None
    return Windows(padded, windows, runs)


def _neighbours(padded, dim, taps, length):
    return [padded.narrow(dim, tap, length) for tap in range(taps)]


def number_tuples(maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers the distinct tuples of numbers at one place of several maps of one shape, each below
    2²¹. Returns the number at each place, and the tuples [tuples, maps]. More than 2²¹ distinct
    tuples are an error of the index_select, ONNX's Gather, that looks for one.
    """
    several, rest = maps[:3], maps[3:]
    packed = several[0]
    for one in several[1:]:
        packed = packed * (1 << BITS) + one
    values, numbers = torch.unique(packed, return_inverse=True)
    parts = []
    for _ in several[1:]:
        high = values // (1 << BITS)  # torch.div(…) would go through floating point in ONNX
        parts.append(values - high * (1 << BITS))
        values = high
    tuples = torch.stack([values, *parts[::-1]], 1)
    # 0, or 1 if there is a number beyond 2²¹: there is no such element.
    beyond = (numbers.max().view(1) >= 1 << BITS).long()
    numbers = numbers + numbers.new_zeros(1).index_select(0, beyond)
    if not rest:
        return numbers, tuples
    numbers, of_numbers = number_tuples([numbers, *rest])
    tuples = tuples.index_select(0, of_numbers[:, 0])
    return numbers, torch.cat([tuples, of_numbers[:, 1:]], 1)
