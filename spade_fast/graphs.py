"""A network as a CUDA graph, for inference: at small batches the host cannot launch kernels as fast
as the GPU runs them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layout import SemanticLayout
from .nn.choice import current_mode, window_mode
from .nn.spade import SpatiallyAdaptive
from .nn.tables import keep_in
from .windows import Sums, Windows


class Graphed:
    """network(condition, *inputs) as one CUDA graph for all conditions of one size: the graph reads
    from the same memory each time.

    A call first numbers the windows of a new layout, which waits for the GPU, and copies them over
    the previous layout's. Everything else is one launch. The tables of γ and β do not depend on x,
    so a second stream computes them: their small kernels would hold up the network. If a layout has
    more windows than there is room for, the graph is captured again with more room. With a tensor
    as the condition, such as features, γ and β are computed at every pixel.

    Autocast applies as where the Graphed is constructed, not as where it is called.

    Args:
        network: a module in eval mode, on a GPU, that returns a tensor; its weights may change in
            place.
        condition: a SemanticLayout, or a tensor, of the size that all will have.
        inputs: tensors, such as z, whose shapes and dtypes all calls share.
        room: the memory for windows, as a multiple of what this layout needs.

    Raises:
        ValueError, TypeError: an argument is not as described above; the message names it.
    """

    def __init__(
        self,
        network: nn.Module,
        condition: SemanticLayout | torch.Tensor,
        *inputs: torch.Tensor,
        room: float = 1.5,
    ) -> None:
        if network.training:
            raise ValueError(
                "network is in train mode; it should be in eval mode: a graph is for inference"
            )
        if room < 1:
            raise ValueError(f"room is {room}; it should be 1 or more")
        self._of_layout = isinstance(condition, SemanticLayout)
        layout, inputs = self._apart(condition, inputs)
        check_device(condition)
        self.network, self.room, self._autocast = network, room, own_autocast()
        self._inputs = [given.detach().clone() for given in inputs]
        self._capture(layout)
        self._written = None if layout is None else layout.content

    @torch.no_grad()
    def __call__(
        self, condition: SemanticLayout | torch.Tensor, *inputs: torch.Tensor
    ) -> torch.Tensor:
        """The result of network(condition, *inputs), as a new tensor."""
        layout, inputs = self._apart(condition, inputs)
        if [(given.shape, given.dtype) for given in inputs] != [
            (own.shape, own.dtype) for own in self._inputs
        ]:
            raise ValueError(
                f"inputs are {[(list(given.shape), given.dtype) for given in inputs]}; they should"
                " have the shapes and dtypes that the graph was captured with, "
                f"{[(list(own.shape), own.dtype) for own in self._inputs]}"
            )
        for own, given in zip(self._inputs, inputs):
            own.copy_(given)
        memory = self._layout
        if layout is not None and memory is not None and self._written is not layout.content:
            if not write_over(memory, layout):
                self._capture(layout)
            self._written = layout.content
        self._graph.replay()
        return self._output.clone()

    @torch.no_grad()
    def _capture(self, layout):
        ahead = TablesAhead()
        spades = [
            module for module in self.network.modules() if isinstance(module, SpatiallyAdaptive)
        ]
        device = self._inputs[0].device if layout is None else layout.device
        mode = "never" if layout is None else current_mode()  # features are not examined
        with torch.cuda.device(device), keep_in(ahead, spades), window_mode(mode), self._autocast:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            # Before the capture, libraries allocate workspaces and the layout numbers its windows.
            with torch.cuda.stream(aside):
                self._run(layout)
                self._layout = None if layout is None else with_room(layout, self.room)
                self._run(self._layout)
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph), ahead.made(self._layout):
                self._output = self._run(self._layout)

    def _run(self, layout):
        return self.network(*([] if layout is None else [layout]), *self._inputs)

    def _apart(self, condition, inputs):
        """The layout, or None, and the tensors among the arguments of a call."""
        wanted = SemanticLayout if self._of_layout else torch.Tensor
        if not isinstance(condition, wanted):
            raise TypeError(
                f"condition is a {type(condition).__name__}; it should be a {wanted.__name__}"
            )
        return (condition, inputs) if self._of_layout else (None, (condition, *inputs))


def check_device(condition: SemanticLayout | torch.Tensor) -> None:
    """Raises ValueError unless the condition is on a GPU."""
    if condition.device.type != "cuda":
        raise ValueError(f"condition is on {condition.device}; it should be on a CUDA GPU")


def own_autocast() -> torch.autocast:
    """Autocast as it is, without its cache of weights: the graph would go on reading weights from
    memory that the cache frees.
    """
    is_on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, is_on, cache_enabled=False)


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


def with_room(layout: SemanticLayout, room: float) -> SemanticLayout:
    """A copy of the layout, with the windows computed so far, in memory for `room` times as many.
    The lists that only backward reads are left out.
    """
    copy = SemanticLayout(
        layout.codes.clone(), _more_codes(layout.palette, int(len(layout.palette) * room))
    )
    for key, windows in layout._windows.items():
        hidden, table = (
            _more_windows(part, key, int((len(part.offsets) - 1) * room) + 1)
            for part in windows[:2]
        )
        copy._windows[key] = Windows(hidden, table, windows.index.clone(), windows.order.clone())
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
    if len(layout.palette) > len(room.palette):
        return False
    pairs = [
        (room.codes, layout.codes),
        (room.palette, _more_codes(layout.palette, len(room.palette))),
    ]
    for key, windows in room._windows.items():
        given = layout.windows(*key)
        for sums, others in zip(windows[:2], given[:2]):
            if len(others.offsets) >= len(sums.offsets):
                return False
            pairs += zip(sums[:2], _more_windows(others, key, len(sums.offsets) - 1)[:2])
        pairs += zip(windows[2:], given[2:])
    for own, other in pairs:
        own.copy_(other)
    room._take_as_seen()  # its windows were overwritten, too
    return True


def _more_codes(palette, count):
    return F.pad(palette, (0, 0, 0, count - len(palette)))


def _more_windows(sums, key, count):
    """Sums padded to `count` windows, at least one more than there are. The added windows sum the
    first row, and share the rest of the list evenly.
    """
    size, kernel_size = key
    length, listed, more = (
        count * kernel_size ** len(size),
        len(sums.rows),
        count + 1 - len(sums.offsets),
    )
    offsets = (
        torch.arange(1, more + 1, device=sums.offsets.device) * (length - listed) // more + listed
    )
    return Sums(
        torch.cat([sums.offsets, offsets.to(torch.int32)]),
        F.pad(sums.rows, (0, length - listed)),
        None,
        None,
    )
