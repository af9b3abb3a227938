"""The distinct windows of codes: numbered once, and listed as sums of rows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import kernels

LARGEST_KERNEL = 7  # taps per axis of a window


class Sums(NamedTuple):
    """What windows see, as sums of rows: sum i is over rows[offsets[i]:offsets[i + 1]], where each
    entry is row · taps + tap.

    Backward needs the opposite direction: the entry j = row · taps + tap is in the sums
    back_rows[back_offsets[j]:back_offsets[j + 1]]. All are int32, on the layout's device. A tap
    beyond the border sees nothing, and is left out.
    """

    offsets: torch.Tensor
    rows: torch.Tensor
    back_offsets: torch.Tensor | None  # None in a copy that is not for backward
    back_rows: torch.Tensor | None


class Windows(NamedTuple):
    """The distinct windows of a layout at one size, for convolutions of one kernel size.

    hidden: the K1 windows of codes that the first convolution sees, as sums of the palette's rows.
    table: the K2 windows of hidden windows that γ and β see, as sums of hidden rows.
    index: [N, *size], which of the K2 each pixel has; order: [N, pixels], each image's pixels
        sorted by their index. Both are int32.
    """

    hidden: Sums
    table: Sums
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    order: torch.Tensor

    @property
    def hidden_count(self) -> int:
        """K1, the rows of the hidden map."""
        return self.hidden.offsets.shape[0] - 1

    @property
    def count(self) -> int:  # type: ignore[override]  # hides tuple.count, which nobody calls
        """K2, the rows of γ and β."""
        return self.table.offsets.shape[0] - 1

    @property
    def index_of_images(self) -> torch.Tensor:
        """The index for tables in which each image has rows of its own: those of image n begin at
        n · K2.
        """
        images = torch.arange(len(self.index), dtype=torch.int32, device=self.index.device)
        return self.index + images.view(-1, *[1] * (self.index.dim() - 1)) * self.count

    @property
    def shares(self) -> torch.Tensor:
        """The share of each image's pixels that have each window: [N, K2], float64."""
        pixels = self.index.flatten(1).long()
        shares = torch.zeros(len(pixels), self.count, dtype=torch.float64, device=pixels.device)
        return shares.scatter_add_(
            1, pixels, torch.ones((), dtype=torch.float64, device=pixels.device).expand_as(pixels)
        ).div_(max(1, pixels.shape[1]))


class Patches(NamedTuple):
    """The distinct windows that one convolution of a layout sees, for any kernel size, stride and
    padding.

    contents: [K, taps], the codes that each window sees, −1 beyond the border; sums: the same as
        sums of the palette's rows.
    index: [N, *size of the result], which of the K each place has; order: [N, places], each image's
        places sorted by their index. All are int32.
    """

    contents: torch.Tensor
    sums: Sums
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    order: torch.Tensor


@torch.inference_mode(False)  # so that training may use windows from inference mode
def number(
    codes: torch.Tensor,
    sizes: Sequence[Sequence[int]],
    kernel_size: int,
    num_codes: int,
    dtype: torch.dtype,
) -> list[Windows]:
    """The Windows of codes [N, *spatial] at each of these sizes, resized as a condition in this
    dtype would be.
    """
    found = kernels.select(codes).find_windows(codes, sizes, kernel_size, num_codes, dtype)
    return [Windows(Sums(*hidden), Sums(*table), *places) for hidden, table, *places in found]


@torch.inference_mode(False)
def number_patches(
    codes: torch.Tensor, kernel_size: int, stride: int, padding: int, num_codes: int
) -> Patches:
    """The Patches of codes [N, *spatial]. Errors: ValueError if the padded map is smaller than a
    window.
    """
    size = [(length + 2 * padding - kernel_size) // stride + 1 for length in codes.shape[1:]]
    if min(size) < 1:
        raise ValueError(
            f"the layout has size {list(codes.shape[1:])}; with a padding of {padding} it should be"
            f" at least kernel_size, {kernel_size}"
        )
    contents, sums, *places = kernels.select(codes).find_patches(
        codes, kernel_size, stride, padding, num_codes
    )
    return Patches(contents, Sums(*sums), *places)


def stacked(parts: Sequence[Windows]) -> Windows:
    """The Windows of a batch of several layouts, which share none."""
    index = side_by_side([(part.index, part.count) for part in parts])
    hidden, table = (_stacked_sums([part[which] for part in parts]) for which in range(2))
    return Windows(hidden, table, index, torch.cat([part.order for part in parts]))


def _stacked_sums(parts):
    """Joins the Sums of several layouts, which share neither windows nor rows."""

    def offsets(lists):
        return side_by_side(
            [(starts[min(number, 1) :], int(starts[-1])) for number, starts in enumerate(lists)]
        )

    return Sums(
        offsets([part.offsets for part in parts]),
        side_by_side([(part.rows, len(part.back_offsets) - 1) for part in parts]),
        offsets([part.back_offsets for part in parts]),
        side_by_side([(part.back_rows, len(part.offsets) - 1) for part in parts]),
    )


def side_by_side(parts: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Concatenates tensors of numbers, given as (numbers, bound) pairs. The numbers of each part
    are raised by the sum of the bounds before it.
    """
    bounds = [bound for _, bound in parts]
    return torch.cat([numbers + sum(bounds[:number]) for number, (numbers, _) in enumerate(parts)])


@torch.inference_mode(False)
def repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """A tensor [N, …], times times over: [times · N, …]."""
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))


def tensors_in(found: Iterable) -> Iterator[torch.Tensor]:
    """The tensors of Windows or Patches, one after another."""
    for part in found:
        if isinstance(part, tuple):
            yield from tensors_in(part)
        elif part is not None:
            yield part


def on_its_own(found: Any) -> Any:
    """Windows or Patches whose tensors have memory of their own: those computed on a GPU share one
    buffer, all of which would be pickled with each tensor.
    """
    if isinstance(found, tuple):
        return type(found)(*map(on_its_own, found))
    return found.clone() if found.untyped_storage().nbytes() > found.nbytes else found
