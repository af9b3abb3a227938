"""A network as CUDA graphs: at small batches the host cannot launch kernels as fast as the GPU runs
them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .layout import SemanticLayout
from .nn.choice import current_mode, window_mode
from .nn.modules import named_given
from .nn.spade import SpatiallyAdaptive
from .nn.tables import keep_in
from .windows import Sums, Windows


class Graphed:
    """network(condition, *inputs) as a CUDA graph for all conditions of one size, and in train mode
    its backward as a second one. The graphs read and write the same memory each time.

    A call first numbers the windows of a new layout, which waits for the GPU, and copies them over
    the previous layout's. Everything else is one launch. With a tensor as the condition, such as
    features, γ and β are computed at every pixel. The network is captured again if a layout has
    more windows than there is room for, or if another tensor has become a parameter or buffer, or
    the weight or bias of a convolution, norm or linear layer that has it as a plain attribute, or a
    module's mode or what requires gradients has changed.

    In eval mode nothing is differentiated. The tables of γ and β do not depend on x, so a second
    stream computes them: their small kernels would hold up the network.

    In train mode the result can be differentiated with respect to the parameters and the inputs:
    once, before the next call, and before a parameter is written to, because the graphs keep what
    the last call has computed. The running statistics and the vectors of spectral norm change in
    each call, as they do in the network, but not by a capture. Several processes cannot share the
    statistics of a batch, and running statistics need a momentum.

    Autocast applies as where the Graphed is constructed, not as where it is called.

    Args:
        network: a module on a GPU that returns a tensor; its weights may change in place.
        condition: a SemanticLayout, or a tensor, of the size that all will have.
        inputs: tensors, such as z, whose shapes and dtypes all calls share.
        room: the memory for windows, as a multiple of what this layout needs.

    Raises:
        ValueError, TypeError: an argument is not as described above; the message names it.
    """

    def __init__(
        self,
        network: nn.Module,
        condition: SemanticLayout | Tensor,
        *inputs: Tensor,
        room: float = 1.5,
    ) -> None:
        if room < 1:
            raise ValueError(f"room is {room}; it should be 1 or more")
        self._of_layout = isinstance(condition, SemanticLayout)
        layout, inputs = self._apart(condition, inputs)
        check_device(condition)
        self.network, self.room, self._autocast = network, room, own_autocast()
        self._modules = list(network.modules())
        owned = [(module._parameters, module._buffers) for module in self._modules]
        self._holders: list[dict] = [holder for both in owned for holder in both if holder]
        self._written: object = None  # the content of the layout that is in the graphs' memory
        self._capture(layout, inputs)

    def __call__(self, condition: SemanticLayout | Tensor, *inputs: Tensor) -> Tensor:
        """The result of network(condition, *inputs), as a new tensor. Its backward raises a
        RuntimeError if it comes too late.
        """
        layout, inputs = self._apart(condition, inputs)
        captured = self._captured
        if [(given.shape, given.dtype) for given in inputs] != [
            (own.shape, own.dtype) for own in captured.inputs
        ]:
            raise ValueError(
                f"inputs are {[(list(given.shape), given.dtype) for given in inputs]}; they should"
                " have the shapes and dtypes that the graph was captured with, "
                f"{[(list(own.shape), own.dtype) for own in captured.inputs]}"
            )
        captured.uses += 1  # the memory of the last call is written over from here on
        is_same = self._state == self._state_now(inputs, self._given)
        if not (is_same and self._holds(layout)):
            self._capture(layout, inputs)
            captured = self._captured
        if captured.backward is None:
            with torch.no_grad():
                return captured.run(inputs)
        return Replay.apply(captured, *inputs, *self._parameters)

    def _holds(self, layout):
        """Brings a layout into the memory that the graphs read. Returns whether there is room."""
        memory = self._captured.layout
        if layout is None or memory is None or self._written is layout.content:
            return True
        self._written = None  # until all of it is
        has_room = write_over(memory, layout)
        self._written = layout.content if has_room else None
        return has_room

    @torch.inference_mode(False)
    def _capture(self, layout: SemanticLayout | None, inputs: Sequence[Tensor]) -> None:
        """Captures the network; if that fails, all is as before, and the next call tries again."""
        check_norms(self._modules)
        given = [attrgetter(name) for name, _ in named_given(self.network)]
        state, is_trained = self._state_now(inputs, given), self.network.training
        parameters = list(self.network.parameters()) if is_trained else []
        parameters += [get(self.network) for get in given] if is_trained else []
        own = [
            one.detach().clone().requires_grad_(is_trained and one.requires_grad) for one in inputs
        ]
        device = own[0].device if layout is None else layout.device
        mode = "never" if layout is None else current_mode()  # features are not examined
        with torch.cuda.device(device), window_mode(mode), restored(self._modules):
            if is_trained:
                captured = self._captured_in_training(layout, own, parameters)
            else:
                captured = self._captured_in_eval(layout, own)
        self._captured: Captured = captured
        self._state, self._parameters, self._given = state, parameters, given
        self._written = None if layout is None else layout.content

    @torch.no_grad()
    def _captured_in_eval(self, layout, inputs):
        ahead = TablesAhead()
        spades = [module for module in self._modules if isinstance(module, SpatiallyAdaptive)]
        with keep_in(ahead, spades):
            with on_another_stream():
                self._run(layout, inputs)
                memory = None if layout is None else with_room(layout, self.room)
                self._run(memory, inputs)
            forward = torch.cuda.CUDAGraph()
            with captured_in(forward), ahead.made(memory):
                output = self._run(memory, inputs)
        return Captured(memory, inputs, forward, output)

    @torch.enable_grad()
    def _captured_in_training(self, layout, inputs, parameters):
        differentiable = (*inputs, *parameters)
        wanted = [tensor for tensor in differentiable if tensor.requires_grad]

        def gradients(output, of_output):
            return torch.autograd.grad(output, wanted, of_output, allow_unused=True)

        def run_both(condition):
            output = self._run(condition, inputs)
            if wanted:
                gradients(output, torch.zeros_like(output))

        with on_another_stream():
            run_both(layout)
            memory = None if layout is None else with_room(layout, self.room, backward=True)
            run_both(memory)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with captured_in(forward):
            output = self._run(memory, inputs)
        captured = Captured(memory, inputs, forward, output.detach())
        if wanted:
            captured.backward, captured.of_output = backward, torch.zeros_like(output)
            with captured_in(backward, forward.pool()):
                found = iter(gradients(output, captured.of_output))
            captured.gradients = [
                next(found) if tensor.requires_grad else None for tensor in differentiable
            ]
        return captured

    def _run(self, layout, inputs):
        with self._autocast:
            return self.network(*([] if layout is None else [layout]), *inputs)

    def _state_now(self, inputs, given):
        """What decides whether the captured graphs still compute what the network would. given:
        functions that get weights that are no parameters.
        """
        held = chain.from_iterable(map(dict.values, self._holders))
        tensors = [tensor for tensor in held if tensor is not None]
        tensors += [get(self.network) for get in given]
        modes = list(map(attrgetter("training"), self._modules))
        places = list(map(torch.Tensor.data_ptr, tensors))
        if not self.network.training:
            return modes, places
        wanted = list(map(attrgetter("requires_grad"), (*inputs, *tensors)))
        return modes, places, list(map(id, tensors)), wanted

    def _apart(self, condition, inputs):
        """The layout, or None, and the tensors among the arguments of a call."""
        wanted = SemanticLayout if self._of_layout else torch.Tensor
        if not isinstance(condition, wanted):
            raise TypeError(
                f"condition is a {type(condition).__name__}; it should be a {wanted.__name__}"
            )
        return (condition, inputs) if self._of_layout else (None, (condition, *inputs))


@dataclass(eq=False, repr=False)
class Captured:
    """The graphs of one capture, and the memory that they read and write."""

    layout: SemanticLayout | None
    inputs: list[Tensor]
    forward: torch.cuda.CUDAGraph
    output: Tensor
    backward: torch.cuda.CUDAGraph | None = None
    of_output: Tensor | None = None  # the gradient that backward begins with
    gradients: Sequence[Tensor | None] = ()  # of the inputs and the parameters
    uses: int = 0  # calls and backwards: a backward needs what the call just before it has left

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output for these inputs and the layout in memory, as a new tensor."""
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        self.forward.replay()
        return self.output.clone()

    def run_backward(self, of_output: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs and the parameters in that run, as new tensors."""
        assert self.backward is not None and self.of_output is not None
        self.of_output.copy_(of_output)
        self.backward.replay()
        found = [gradient for gradient in self.gradients if gradient is not None]
        new = iter(torch._foreach_mul(found, 1))  # few launches for all of them
        return [None if gradient is None else next(new) for gradient in self.gradients]


class Replay(torch.autograd.Function):
    """The output of a `Captured` for its inputs, which come first among the tensors, and its
    parameters.
    """

    @staticmethod
    def forward(ctx: Any, captured: Captured, *tensors: Tensor) -> Tensor:
        given = len(captured.inputs)
        ctx.captured, ctx.use = captured, captured.uses
        ctx.save_for_backward(*tensors[given:])
        return captured.run(tensors[:given])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        captured, _ = ctx.captured, ctx.saved_tensors  # raises if one has been written to
        if captured.uses != ctx.use:
            raise RuntimeError(
                "backward through a Graphed comes after another call of it, or for the second time;"
                " it should come once, before the next call: the graphs keep what the last call has"
                " computed"
            )
        captured.uses += 1
        return None, *captured.run_backward(of_output)


def check_device(condition: SemanticLayout | Tensor) -> None:
    """Raises ValueError unless the condition is on a GPU."""
    if condition.device.type != "cuda":
        raise ValueError(f"condition is on {condition.device}; it should be on a CUDA GPU")


def check_norms(modules: Sequence[nn.Module]) -> None:
    """Raises ValueError if a batch norm in train mode cannot be captured: one that reads on the CPU
    how many batches there were, or shares its statistics with other processes.
    """
    shares = dist.is_available() and dist.is_initialized()
    for module in modules:
        if not isinstance(module, _BatchNorm) or not module.training:
            continue
        if module.momentum is None and module.track_running_stats:
            raise ValueError(
                f"network has a {type(module).__name__} in train mode with momentum=None; it should"
                " be a number: a graph cannot read how many batches there were"
            )
        if isinstance(module, nn.SyncBatchNorm) and shares:
            processes = dist.get_world_size(module.process_group)
            if processes > 1:
                raise ValueError(
                    f"network has a SyncBatchNorm in train mode, shared by {processes} processes;"
                    " it should have batch norms of one process"
                )


def own_autocast() -> torch.autocast:
    """Autocast as it is, without its cache of weights: the graph would go on reading weights from
    memory that the cache frees.
    """
    is_on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, is_on, cache_enabled=False)


@contextmanager
def on_another_stream() -> Iterator[None]:
    """For what runs before a capture, on a stream of its own: libraries allocate workspaces, and
    layouts number their windows.
    """
    aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        yield
    here.wait_stream(aside)


def captured_in(graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
    """Inside, operations are captured into the graph, while other threads, such as those of data
    loaders, may go on using the GPU.
    """
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """At the end, the modules' buffers have the values that they had before."""
    buffers = [own for module in modules for own in module._buffers.values() if own is not None]
    before = [own.clone() for own in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for own, value in zip(buffers, before):
                own.copy_(value)


class TablesAhead:
    """Computes the tables of SPADEs ahead while their network is captured: in the order in which
    the previous run requested them, and on a separate stream. Each use of a table waits for it.
    """

    def __init__(self) -> None:
        self._asked: dict[tuple, Callable[[], list[torch.Tensor]]] = {}
        self._made: dict[tuple, tuple[list[torch.Tensor], torch.cuda.Event]] = {}

    def get(
        self,
        layout: SemanticLayout,
        key: tuple,
        weights: list[torch.Tensor],
        marks: list,
        compute: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        if (layout, key) in self._made:
            table, event = self._made[layout, key]
            event.wait()
            return table
        *_, images = key
        if images is None:  # otherwise γ and β are normalised over the images of this run
            self._asked[layout, key] = compute
        return compute()

    def derive(
        self,
        module: nn.Module,
        name: str,
        weights: list[torch.Tensor | None],
        settings: tuple,
        compute: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Recomputed in each replay, because weights may change in place."""
        return compute()

    @contextmanager
    def made(self, layout: SemanticLayout | None) -> Iterator[None]:
        """Inside the block, the tables requested for this layout are computed or under way. For
        None there are no tables.
        """
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            self._made = {
                of: (compute(), beside.record_event())
                for of, compute in self._asked.items()
                if of[0] is layout
            }
        yield
        here.wait_stream(beside)


def with_room(layout: SemanticLayout, room: float, backward: bool = False) -> SemanticLayout:
    """A copy of the layout, with the windows computed so far, in memory for `room` times as many
    codes and windows, and one more.

    backward: whether the copy has the lists that only backward reads.
    """

    def more(count):
        return int(count * room) + 1

    codes, palette = layout.codes, layout.palette
    copy = SemanticLayout(codes.clone(), palette.new_zeros(more(len(palette)), layout.label_nc))
    for key, windows in layout._windows.items():
        size, kernel_size = key
        taps, rows, parts = kernel_size ** len(size), len(copy.palette), []
        for sums in windows[:2]:
            count = more(len(sums.offsets) - 1)
            lengths = [count + 1, count * taps, rows * taps + 1, count * taps]
            lists = [codes.new_zeros(length) for length in lengths[: 4 if backward else 2]]
            parts.append(Sums(*lists, *[None] * (4 - len(lists))))
            rows = count
        hidden, table = parts
        copy._windows[key] = Windows(hidden, table, *map(torch.empty_like, windows[2:]))
    write_over(copy, layout)
    return copy


def write_over(room: SemanticLayout, layout: SemanticLayout) -> bool:
    """Copies a layout into the memory of one that `with_room` made. Returns whether there is enough
    memory; if not, nothing is written.

    Errors: ValueError if the two differ in size, channels, dtype or device.
    """
    kinds = [
        (list(one.codes.shape), one.label_nc, one.palette.dtype, one.device)
        for one in (layout, room)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"layout has size, channels, dtype and device {kinds[0]}; it should have {kinds[1]}"
        )
    for kernel_size in {kernel_size for _, kernel_size in room._windows}:  # with one wait for each
        sizes = [size for size, own in room._windows if own == kernel_size]
        layout.prepare(sizes, kernel_size)
    pairs = [(windows, layout.windows(*key)) for key, windows in room._windows.items()]
    both = [(own, new) for windows in pairs for own, new in zip(*(part[:2] for part in windows))]
    codes = len(layout.palette)
    if codes >= len(room.palette) or any(len(new.offsets) >= len(own.offsets) for own, new in both):
        return False
    copied = [(room.codes, layout.codes)]
    for own, new in both:
        for mine, theirs in zip(own, new):
            if mine is not None and theirs is not None:
                copied.append((mine[: len(theirs)], theirs))
        _fill_up(own, new)
    for own, new in pairs:
        copied += zip(own[2:], new[2:])
    owns, others = zip(*copied)
    torch._foreach_copy_(list(owns), list(others))  # few launches for all of them
    room.palette[:codes].copy_(layout.palette)
    room.palette[codes:].zero_()
    room._take_as_seen()  # its windows were overwritten, too
    return True


def _fill_up(own, new):
    """Fills the end of lists that have more room than the new ones need. The windows there share
    the rest of `rows` evenly, and no pixel has them, so that their gradients are zero; the rows
    there share the rest of `back_rows`, all of whose entries are the last of these windows.
    """
    seen = len(new.rows)
    for offsets, used in ((own.offsets, new.offsets), (own.back_offsets, new.back_offsets)):
        if offsets is not None:
            rest = offsets[len(used) - 1 :]
            torch.linspace(seen, len(own.rows), len(rest), out=rest)
    if own.back_rows is not None:
        own.back_rows[seen:].fill_(len(own.offsets) - 2)
