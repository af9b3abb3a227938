"""The choice whether a SPADE computes γ and β at every pixel or at every distinct window of a
layout: what its condition, its parts, hooks and tracers allow, and what costs less.
"""

import math
from typing import Literal, get_args

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .. import kernels
from ..identity import state_of
from ..layout import SemanticLayout
from ..recording import is_recorded
from ..scopes import Scope
from ..streams import is_capturing, made_here, read_here
from ..windows import Windows
from .parts import Convolutions, Known
from .tables import dtype_of_convolution

Mode = Literal["auto", "always", "never"]
MODES: tuple[Mode, ...] = get_args(Mode)
# The cost of a multiply-add on gathered rows relative to one in PyTorch's convolution at pixels, on
# a GPU in half precision: forward, and forward with backward. On an H200 in bfloat16, for the ten
# shapes of the published generator, it is 1.8 to 2.7 and 3 to 5. Forward, pixels need seven more
# launches than windows, of about 6 µs each; COST_OF_LAUNCHES is how many products per tap and
# hidden channel a convolution computes in that time. With backward, pixels need fewer launches.
COST_OF_GATHERED, COST_OF_GATHERED_TRAINING, COST_OF_LAUNCHES = 1.8, 4, 5_000_000

_found = WeakTensorKeyDictionary()  # what `find_layout` found for each condition


class window_mode(Scope):
    """How the SPADEs of this thread or task use a layout: "never" computes γ and β at every pixel,
    "always" at every distinct window, and "auto", the default, at windows if that takes less time.
    The results are the same up to rounding.

    `with window_mode("never"):` applies inside, `window_mode("never")` alone from then on.
    """

    def __init__(self, mode: Mode) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it should be one of {', '.join(MODES)}")
        super().__init__(mode)


def current_mode() -> Mode:
    return window_mode.setting_here("auto")


def find_layout(segmap: torch.Tensor | SemanticLayout) -> SemanticLayout | None:
    """The SemanticLayout of a condition, or None if the condition is not a layout or nothing may
    depend on its values.

    A tensor is examined once, and again when its version shows that it was changed in place.
    (Changes that PyTorch does not count go unnoticed: see `identity.state_of`.) Inference tensors
    have no version: they are examined in each call, but their windows are kept.
    """
    if isinstance(segmap, SemanticLayout):
        return segmap
    if torch.compiler.is_compiling() or is_recorded(segmap) or current_mode() == "never":
        return None
    if segmap.requires_grad or segmap.layout != torch.strided:
        return None
    if is_capturing(segmap):
        return None
    state, before = state_of(segmap), _found.get(segmap)
    if before is not None and before[0] == state:
        _, layout, made = before
        read_here(made, () if layout is None else (layout.codes, layout.palette))
        return layout
    layout = SemanticLayout.from_segmap(segmap.as_subclass(torch.Tensor))
    if layout is not None and before is not None and layout.equal(before[1]):
        layout = before[1]  # which has its windows
    made = None if layout is None else made_here((layout.codes, layout.palette))
    _found[segmap] = (state, layout, made)
    return layout


def windows_of(
    known: Known, layout: SemanticLayout | None, x: torch.Tensor, kept: object
) -> tuple[Convolutions, Windows] | None:
    """The convolutions that compute γ and β at the distinct windows of the layout, and those
    windows; None if γ and β are to be computed at pixels. kept: what keeps the layer's tables, or
    None.
    """
    convolutions = known.convolutions
    if layout is None or convolutions is None or is_recorded(x, layout.palette):
        return None
    # A compiled graph may not depend on the number of windows, so it always has them.
    mode = "always" if torch.compiler.is_compiling() else current_mode()
    if mode == "never" or 0 in x.shape[2:]:
        return None
    windows = layout.windows(x.shape[2:], convolutions.gamma.kernel_size[0])
    # Kept tables are computed once for many forward passes.
    pays = mode == "always" or kept is not None or _pay(windows, layout, x, convolutions)
    return (convolutions, windows) if pays else None


def _pay(windows, layout, x, convolutions):
    """Whether computing γ and β at the windows takes less time than at the pixels."""
    shared, gamma = convolutions.shared, convolutions.gamma
    taps, hidden = math.prod(gamma.kernel_size), gamma.in_channels
    outputs = 2 * convolutions.channels
    if x.is_cuda and dtype_of_convolution(x, convolutions.dtype).itemsize == 2:
        gathered = windows.hidden_count * shared.in_channels + windows.count * outputs
        at_pixels = windows.index.numel() * (shared.in_channels + outputs)
        if torch.is_grad_enabled():
            return COST_OF_GATHERED_TRAINING * gathered < at_pixels
        return COST_OF_GATHERED * gathered < at_pixels + COST_OF_LAUNCHES
    at_pixels = windows.index.numel() * (shared.in_channels + outputs)
    products = layout.palette.shape[0] * shared.in_channels + windows.hidden_count * outputs
    additions = taps * (windows.hidden_count * hidden + windows.count * outputs)
    costs = kernels.select(layout.palette).costs_at_windows
    at_windows = costs.product * taps * hidden * products + costs.addition * additions
    return at_windows < taps * hidden * at_pixels
