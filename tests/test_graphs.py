"""Once a layout's windows are numbered, nothing waits for the device any more: steps can be captured in CUDA graphs."""

import pytest
import torch
from conftest import BACKENDS
from test_layout import patches
from test_numbering import NothingWaits

import spade_fast
from spade_fast import SPADE, SemanticLayout, SPADEResnetBlock
from spade_fast.ops import arguments

MODULES = {
    "SPADE": lambda: SPADE(8, 6, 4),
    "batch": lambda: SPADE(8, 6, 4, norm="batch"),
    "block": lambda: SPADEResnetBlock(8, 4, "spectralspadeinstance3x3", 6, nhidden=4),
}


def step(module, device):
    """A function that does a training step's forward and backward on tensors of its own, and those tensors."""
    module = module().to(device)
    layout = SemanticLayout.from_labels(patches((2, 6, 6), 5), 5, patches((2, 6, 6), 2, seed=1)).to(device).prepare([(6, 6)], 3)
    x = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)
    wanted = [x, *module.parameters()]

    def run():
        with spade_fast.window_mode("always"):
            y = module(x, layout)
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    return run, x


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cpu"])
def test_nothing_waits_for_the_device(name, module, monkeypatch):
    monkeypatch.setattr(arguments, "_check_index", lambda *given: None)  # looks at the numbers, but on a CPU alone
    with spade_fast.use_backend(name):
        run, _ = step(MODULES[module], BACKENDS[name])
        with NothingWaits():
            run()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if BACKENDS[name] == "cuda"])
def test_a_captured_step_gives_the_same_bits(name, module):
    with spade_fast.use_backend(name):
        run, x = step(lambda: MODULES[module]().eval(), "cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, run()))
