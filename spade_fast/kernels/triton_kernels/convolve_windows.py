"""A convolution at the distinct windows of a map in half precision, on tensor cores. The matrix
product goes through the taps and gathers the rows that each window sees, and only the results are
written.

The plain PyTorch version first multiplies each row by each tap, and then sums the products. That is
fewer multiplications, but each product is rounded, written, and read again by every window that
needs it. Here products are summed in float32, as in a convolution of the whole map.
"""

from collections.abc import Sequence

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..interpreted import INTERPRETED
from ..torch_backend import joined
from . import plan


@triton.jit(do_not_specialize=["windows", "count", "length"])
def convolve_windows_kernel(
    rows,
    weight,
    bias,
    offsets,
    listed,
    results,
    windows,
    count,
    length,
    channels,
    outputs,
    TAPS: tl.constexpr,
    SEEN: tl.constexpr,
    WINDOWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some outputs of some windows.

    rows [count, channels], weight [outputs, TAPS, channels], offsets [windows + 1], listed
    [length]: each entry of listed is row · TAPS + tap, and a window's entries lie between its two
    offsets. SEEN is a power of two, at least TAPS. Entries out of range are skipped.
    """
    output_blocks = tl.cdiv(outputs, OUTPUTS)
    window = tl.program_id(0) // output_blocks * WINDOWS + tl.arange(0, WINDOWS)
    output = tl.program_id(0) % output_blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    begin = tl.load(offsets + window, window < windows, 0)
    end = tl.load(offsets + window + 1, window < windows, 0)
    number = begin[:, None] + tl.arange(0, SEEN)[None, :]
    is_listed = (number >= 0) & (number < tl.minimum(end, length)[:, None])
    seen = tl.load(listed + number, is_listed, -1)
    channel_blocks = tl.cdiv(channels, CHANNELS)
    total = tl.zeros([WINDOWS, OUTPUTS], tl.float32)
    for step in range(TAPS * channel_blocks):
        tap, channel = (
            step // channel_blocks,
            step % channel_blocks * CHANNELS + tl.arange(0, CHANNELS),
        )
        # −1 if the tap lies beyond the border.
        row = tl.max(tl.where((seen >= 0) & (seen % TAPS == tap), seen // TAPS, -1), axis=1)
        values = tl.load(
            rows + (row.to(tl.int64) * channels)[:, None] + channel[None, :],
            ((row >= 0) & (row < count))[:, None] & (channel < channels)[None, :],
            0.0,
        )
        weights = tl.load(
            weight + ((output * TAPS + tap) * channels)[None, :] + channel[:, None],
            (output < outputs)[None, :] & (channel < channels)[:, None],
            0.0,
        )
        total = tl.dot(values, weights, total)
    if bias is not None:
        total += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[None, :]
    tl.store(
        results + (window.to(tl.int64) * outputs)[:, None] + output[None, :],
        total,
        (window < windows)[:, None] & (output < outputs)[None, :],
    )


def convolve_windows(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Tensor,
    listed: Tensor,
    relu: bool = False,
) -> Tensor:
    """As one convolution: joining the weights costs less than a second launch."""
    weight, bias = joined(weights, biases)
    by_tap = weight.flatten(2).transpose(1, 2)  # contiguous if the weight's channels are last
    rows, by_tap = (_aligned(matrix).contiguous() for matrix in (rows, by_tap))
    bias = None if bias is None else bias.contiguous()
    windows, (outputs, taps, channels) = len(offsets) - 1, by_tap.shape
    results = rows.new_empty(windows, outputs)
    if INTERPRETED:  # which multiplies the bits of bfloat16, not its values
        rows, by_tap = rows.float(), by_tap.float()
    if results.numel():
        grid, settings = plan.products(windows, taps, outputs, rows.device)
        convolve_windows_kernel[grid](
            rows,
            by_tap,
            bias,
            offsets.contiguous(),
            listed.contiguous(),
            results,
            windows,
            len(rows),
            len(listed),
            channels,
            outputs,
            TAPS=taps,
            **settings,
        )
    return results.relu_() if relu else results


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix with its rows padded by zeros to a multiple of 16 elements, so that one access can
    cover eight elements from the beginning of each row.
    """
    return F.pad(matrix, (0, -matrix.shape[-1] % 16)) if matrix.shape[-1] % 16 else matrix
