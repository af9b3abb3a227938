"""Results that are kept between calls are safe on several streams of a GPU."""

import pytest
import torch
from agree import assert_agree

import spade_fast
from spade_fast import SPADE, SemanticLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
LONG = 200_000_000  # GPU cycles, about a tenth of a second


def layer_and_inputs():
    spade = SPADE(8, 5, 16).cuda()
    labels = torch.arange(16).remainder(5).view(1, 4, 4).repeat_interleave(8, 1)
    return spade, SemanticLayout.from_labels(labels.repeat_interleave(8, 2), 5).to("cuda")


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
@torch.no_grad()
def test_results_of_another_stream_are_waited_for(is_frozen, prepared):
    spade, layout = layer_and_inputs()
    x = torch.randn(1, 8, 32, 32, device="cuda")
    expected = spade(x, SemanticLayout(layout.codes.clone(), layout.palette.clone()))
    if prepared:
        layout.prepare([(32, 32)], 3)
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with spade_fast.window_mode("always"):
        if not is_frozen:
            y = made_aside_first(aside, spade, x, layout)
        else:
            with spade_fast.frozen(spade):
                y = made_aside_first(aside, spade, x, layout)
    torch.cuda.synchronize()
    assert_agree(y, expected)


def made_aside_first(aside, spade, x, layout):
    """The layer's result here, after a call on another stream that is still busy."""
    with torch.cuda.stream(aside):
        full = [torch.full((1 << 18,), torch.nan, device="cuda") for _ in range(8)]
        del full  # its memory holds NaN until the next tensor there is written
        torch.cuda._sleep(LONG)
        spade(x, layout)
    return spade(x, layout)
