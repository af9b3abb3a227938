"""Whether a SPADE computes γ and β at every pixel, or at every distinct window of a layout: what
its condition allows, and what pays.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .. import kernels
from ..layout import SemanticLayout
from ..scopes import Scope
from .frozen import kept_tables

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
MODES = ("auto", "always", "never")
# Beside a multiply-add, as `python -m benchmarks run layer` shows on a CPU: an addition of rows,
# which memory limits; what a convolution spends on bringing one weight into its own order; and what
# windows cost more than their count, mostly in backward.
COST_OF_ADDITION, COST_OF_WEIGHT, COST_OF_WINDOWS = 8, 100, 1.25
FEW_PIXELS = 4096  # below, x keeps its memory layout

_found = WeakTensorKeyDictionary()  # what `find_layout` found of each condition


class window_mode(Scope):
    """What the SPADEs of this thread or task do with a layout: "never" computes γ and β at every
    pixel, "always" at every distinct window, "auto", as without, where that takes less time. The
    results are the same.

    `with window_mode("never"):` holds inside, `window_mode("never")` alone from then on.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, it should be one of {', '.join(MODES)}")
        super().__init__(mode)


def current_mode() -> str:
    return window_mode.setting_here("auto")


def find_layout(segmap):
    """The SemanticLayout of a condition, or None where it is none, or where nothing may depend on
    its values.

    A tensor is looked at once, and again when its version says that it was changed in place.
    (Changes that PyTorch cannot see, through `.data` or NumPy, it cannot see.) Inference tensors
    have no version: they are looked at each time, and the windows are kept.
    """
    if isinstance(segmap, SemanticLayout):
        return segmap
    if (
        torch.compiler.is_compiling()
        or type(segmap) is not torch.Tensor
        or current_mode() == "never"
    ):
        return None
    if segmap.requires_grad or (segmap.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    state = (
        None if segmap.is_inference() else segmap._version,
        segmap.data_ptr(),
        segmap.shape,
        segmap.stride(),
    )
    before = _found.get(segmap)
    if before is not None and before[0] == state and state[0] is not None:
        return before[1]
    layout = SemanticLayout.from_segmap(segmap)
    if layout is not None and before is not None and layout.equal(before[1]):
        layout = before[1]  # with its windows
    _found[segmap] = (state, layout)
    return layout


def with_channels_together(x, scale=1):
    """x with each pixel's channels together: the layout in which they meet a row of a table, and in
    which convolutions are fastest.

    Not where there are few pixels (of x made so many times larger, as it is next): the convolutions
    that follow copy their weights to x's layout, which then costs more.
    """
    if kernels.is_exporting():
        return x  # an exported graph may not depend on the batch
    pays = x.dim() in FORMATS and x[:, 0].numel() * scale ** (x.dim() - 2) >= FEW_PIXELS
    return x.contiguous(memory_format=FORMATS[x.dim()]) if pays else x


def pays(layout, size, spade, convolutions):
    """Whether this SPADE should compute γ and β at the distinct windows of this size. A compiled
    graph does: it may not depend on them.
    """
    if torch.compiler.is_compiling():
        return True
    mode = current_mode()
    if mode != "auto":
        return mode == "always"
    if kept_tables(spade) is not None:
        return True  # once for many forward passes
    shared, gamma = convolutions.shared, convolutions.gamma
    windows = layout.windows(size, gamma.kernel_size[0])
    taps, hidden, outputs = gamma.weight[0, 0].numel(), gamma.in_channels, 2 * gamma.out_channels
    at_pixels = (
        taps
        * hidden
        * (windows.index.numel() * (shared.in_channels + outputs) + COST_OF_WEIGHT * outputs)
    )
    products = (
        taps * hidden * (len(layout.palette) * shared.in_channels + windows.hidden_count * outputs)
    )
    additions = taps * (windows.hidden_count * hidden + windows.count * outputs)
    return COST_OF_WINDOWS * (products + COST_OF_ADDITION * additions) < at_pixels
