"""Gradient checkpointing of a residual block: backward recomputes what is inside the block, so the
forward need not keep it (Chen et al. 2016).
"""

import contextvars
from contextlib import ExitStack

import torch
from torch.utils.checkpoint import checkpoint

from ..identity import states_of
from ..kernels import use_backend
from ..layout import SemanticLayout
from ..recording import is_recorded, ordinary
from ..streams import is_capturing
from .block import ResidualBlock
from .choice import window_mode
from .modules import given_in
from .twin import twin

SCOPES = (use_backend, window_mode)  # the switches that the numbers of training depend on


def recomputed(
    block: ResidualBlock, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout, scale: int
) -> torch.Tensor:
    """block.forward(x, segmap, scale), with the same gradients; until backward, only x and copies
    of the block's buffers are kept. Where operations are recorded, the block runs as usual, because
    the compiler chooses what a recorded graph keeps; and where they are captured into a CUDA graph,
    because random numbers that a block may draw cannot be drawn again there.
    """
    if torch.compiler.is_compiling() or is_recorded(x) or is_capturing(x):
        return block.forward(x, segmap, scale)
    return checkpoint(Repeatable(block, segmap, scale), x, use_reentrant=False)


class Repeatable:
    """A block's forward that can be repeated. The first call runs the block itself. Each later call
    returns the same bits, whatever was done to the block since, and changes nothing in it: it runs
    a twin, which shares the block's parameters and has the buffers, modes and other attributes that
    the block had before the first call. The twin repeats spectral norm's iteration and the update
    of running statistics.

    A later call raises RuntimeError if parameters or the condition have been written to.
    """

    def __init__(
        self, block: ResidualBlock, segmap: torch.Tensor | SemanticLayout, scale: int
    ) -> None:
        self.segmap = ordinary(segmap) if isinstance(segmap, torch.Tensor) else segmap
        self.block: ResidualBlock | None = block
        self.scale, self.before = scale, twin(block)
        self.context = contextvars.copy_context()
        held = [(kind, kind.current()) for kind in SCOPES]
        self.settings = [(kind, scope.setting) for kind, scope in held if scope is not None]
        self.state = self._state()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.block is not None:
            block, self.block = self.block, None
            return block.forward(x, self.segmap, self.scale)
        if self._state() != self.state:
            raise RuntimeError(
                "a weight of a residual block or its condition was written to between forward and"
                " backward, so backward cannot recompute the block: call backward first, or set"
                " the generator's `recompute` to False"
            )
        # Autograd may call this from a thread of its own, and after the switches have changed.
        return self.context.copy().run(self._repeat, x)

    def _repeat(self, x):
        with ExitStack() as stack:
            for kind, setting in self.settings:
                stack.enter_context(kind(setting))
            return twin(self.before).forward(x, self.segmap, self.scale)

    def _state(self):
        weights = [*self.before.parameters(), *given_in(self.before)]
        if isinstance(self.segmap, SemanticLayout):
            return [*states_of(weights), self.segmap.content]
        return states_of([*weights, self.segmap])
