"""What FlopCounterMode counts of a SPADE at windows."""

import pytest
import torch
from fresh import python
from torch.utils.flop_counter import FlopCounterMode

import spade_fast
from spade_fast import SPADE, SemanticLayout

pytestmark = pytest.mark.usefixtures("backend")


def test_the_windows_operations_are_counted(backend):
    torch.manual_seed(0)
    spade = SPADE(8, 3, 16)
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    layout = SemanticLayout.from_labels(torch.arange(36).view(1, 6, 6) // 18, 3)
    with FlopCounterMode(display=False) as mode, spade_fast.window_mode("always"):
        y = spade(x, layout)
        forward = mode.get_total_flops()
        y.sum().backward()
    # Both have 9 taps. Into the first go the 2 codes that there are, into the second its windows:
    # 6 kinds of rows, at the borders and beside the edge, times 3 kinds of columns.
    first, second = 2 * 2 * 9 * 3 * 16, 2 * 18 * 9 * 16 * 16
    assert forward == first + second
    # The gradients of both weights, and of the first's windows; that of codes nobody asks for.
    assert mode.get_total_flops() - forward == first + 2 * second


def test_whichever_is_imported_first():
    count = """
import torch{}
import spade_fast
from torch.utils.flop_counter import flop_registry
print(torch.ops.spade_fast.convolve_windows in flop_registry)
"""
    for before in ("", ", torch.utils.flop_counter"):
        assert python(count.format(before))[0].strip() == "True"
