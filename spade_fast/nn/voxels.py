"""γ and β that convolutions of one tap compute from a condition. Such a convolution commutes with
resizing by nearest neighbour, so γ and β are a table with a row for each voxel of the condition,
and an index says which voxel each pixel of x has.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels.numbering import resize_codes, sort_pixels
from ..recording import is_recorded
from ..streams import Made, is_capturing, made_here, read_here
from .modules import Convolution, weight_of
from .parts import Pointwise
from .pixels import has_first_apart, like_pixels_of, resize

# Lookups: a decoder has one for each size of its maps. The newest is kept whatever its size.
MOST_KEPT, MOST_BYTES = 16, 256 << 20


@dataclass
class Lookup:
    """The arguments `index` and `order` of `spade_modulate`, and where they were computed."""

    index: torch.Tensor
    order: torch.Tensor | None
    made: Made | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.index] if self.order is None else [self.index, self.order]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


_kept: OrderedDict[tuple, Lookup] = OrderedDict()  # the most recently used one at the end
_lock = threading.Lock()


def at_voxels(
    convolutions: Pointwise, segmap: torch.Tensor, x: torch.Tensor, apart: bool
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """γ and β, and the arguments of `spade_modulate` that say how x finds them: tables of a row for
    each voxel of segmap [N, channels, *spatial] if it has fewer voxels than x, otherwise γ and β at
    every pixel. apart: see `pixels.resize`.
    """
    given, wanted = segmap.shape[2:], x.shape[2:]
    if is_recorded(x, segmap) or math.prod(given) >= math.prod(wanted):
        at_pixels = like_pixels_of(x, resize(segmap, wanted, apart))
        gamma, beta = (
            convolution._conv_forward(at_pixels, weight_of(convolution), convolution.bias)
            for convolution in convolutions
        )
        return gamma, beta, {}
    rows = segmap.movedim(1, -1).flatten(0, -2)
    gamma, beta = (_row_by_row(convolution, rows) for convolution in convolutions)
    # One condition for all images has one image's rows.
    images = (len(segmap), len(x))
    sizes = (tuple(given), tuple(wanted))
    found = _lookup(images, sizes, apart, segmap.dtype, x, torch.is_grad_enabled())
    return gamma, beta, {"index": found.index, "order": found.order}


def _row_by_row(convolution: Convolution, rows: torch.Tensor) -> torch.Tensor:
    """The convolution of one tap at each row [K, channels]."""
    return F.linear(rows, weight_of(convolution).flatten(1), convolution.bias)


def _lookup(images, sizes, apart, dtype, x, sorts):
    """The lookup of x in the rows of a condition in this dtype: kept, or made."""
    double = dtype == torch.float64  # `F.interpolate` takes other pixels in float64
    arguments = (images, sizes, apart, double, x.device, sorts)
    if torch.compiler.is_compiling() or is_capturing(x):
        return _make(*arguments)
    with _lock:
        found = _kept.get(arguments)
        if found is not None:
            _kept.move_to_end(arguments)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = _make(*arguments)
        found.made = made_here(found.tensors)
        with _lock:
            _kept[arguments] = found
            _make_room()
    read_here(found.made, found.tensors)
    return found


def _make_room():
    """Drops the lookups that were used least recently, under the lock."""
    taken = sum(lookup.bytes for lookup in _kept.values())
    while len(_kept) > MOST_KEPT or (taken > MOST_BYTES and len(_kept) > 1):
        _, dropped = _kept.popitem(last=False)
        taken -= dropped.bytes


def _make(
    images: tuple[int, int],
    sizes: tuple[Sequence[int], Sequence[int]],
    apart: bool,
    double: bool,
    device: torch.device,
    sorts: bool,
) -> Lookup:
    (of_condition, of_x), (given, wanted) = images, sizes
    voxels = math.prod(given)
    dtype = torch.float64 if double else torch.float32
    rows = torch.arange(voxels, dtype=torch.int32, device=device).view(1, *given)
    if apart and has_first_apart(wanted):
        first = resize_codes(rows[:, :1], (1, *wanted[1:]), dtype)
        others = resize_codes(rows[:, 1:], (wanted[0] - 1, *wanted[1:]), dtype)
        index = torch.cat([first, others], dim=1)
    else:
        index = resize_codes(rows, wanted, dtype)
    order = sort_pixels(index) if sorts else None
    if of_x > 1:
        step = voxels if of_condition > 1 else 0
        starts = torch.arange(of_x, dtype=torch.int32, device=device) * step
        index = index + starts.view(-1, *[1] * len(wanted))
        order = None if order is None else order.repeat(of_x, 1)
    return Lookup(index.contiguous(), order)
