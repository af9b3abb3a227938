"""FlopCounterMode's count for a SPADE at windows."""

import torch
from fresh import python
from torch.utils.flop_counter import FlopCounterMode

import spade_fast
from spade_fast import SPADE, SemanticLayout


def test_the_windows_operations_are_counted(backend):
    torch.manual_seed(0)
    spade = SPADE(8, 3, 16)
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    layout = SemanticLayout.from_labels(torch.arange(36).view(1, 6, 6) // 18, 3)
    with FlopCounterMode(display=False) as mode, spade_fast.window_mode("always"):
        y = spade(x, layout)
        forward = mode.get_total_flops()
        y.sum().backward()
    # Both convolutions have 9 taps. The first takes the 2 distinct codes, the second its own
    # windows: 6 kinds of rows, at the borders and at the edge, times 3 kinds of columns.
    first, second = 2 * 2 * 9 * 3 * 16, 2 * 18 * 9 * 16 * 16
    assert forward == first + second
    # The gradients of both weights, and of the input of the second; that of the codes is not
    # needed.
    assert mode.get_total_flops() - forward == first + 2 * second


def test_the_order_of_imports_does_not_matter():
    count = """
import torch{}
import spade_fast
from torch.utils.flop_counter import flop_registry
print(torch.ops.spade_fast.convolve_windows in flop_registry)
"""
    for before in ("", ", torch.utils.flop_counter"):
        assert python(count.format(before))[0].strip() == "True"
