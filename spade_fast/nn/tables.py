"""Tables of γ and β for the distinct windows of a layout, computed in each call, or kept as long as
the weights do not change.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import kernels
from ..arguments import whole_number
from ..identity import states_of
from ..kernels.contract import Backend
from ..layout import SemanticLayout
from ..ops.convolve_windows import convolve_beside, convolve_through_relu, convolve_windows
from ..scopes import Scope
from ..streams import is_capturing
from ..windows import Windows
from .modules import check_module, named_given, weight_of
from .parts import Convolutions, HasParts, InstanceNorm, Known, part_of

ALIGNED = 16  # numbers per row: rows then begin where one access can load eight
# The state of each layout and the `padded_palette` that belongs to it.
_palettes: weakref.WeakKeyDictionary[SemanticLayout, tuple[list, torch.Tensor]] = (
    weakref.WeakKeyDictionary()
)


class Keeper(Protocol):
    """The interface of what keeps the tables of SPADEs, as `Tables` does."""

    def get(
        self,
        layout: SemanticLayout,
        key: tuple,
        weights: list[torch.Tensor],
        marks: list,
        compute: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]: ...

    def derive(
        self,
        module: nn.Module,
        name: str,
        weights: list[torch.Tensor | None],
        settings: tuple,
        compute: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]: ...


def at_windows(
    spade: HasParts,
    layout: SemanticLayout,
    windows: Windows,
    x: torch.Tensor,
    convolutions: Convolutions,
    kept: Keeper | None,
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """γ and β of every distinct window, [K, C], and the arguments of `spade_modulate` by which each
    pixel finds its row. windows: the layout's, at x's size; kept: `kept_tables(spade)`.
    """
    dtype = dtype_of_convolution(x, convolutions.dtype)
    if kept is None or convolutions.changes_itself:
        gamma, beta = compute_table(layout, windows, convolutions, dtype)
    else:
        images = x.shape[0] if convolutions.normalise else None
        gamma, beta = kept_table(spade, layout, windows, convolutions, dtype, images, kept)
    index = windows.index_of_images if convolutions.normalise else windows.index
    return gamma, beta, {"index": index, "order": windows.order}


def kept_table(
    spade: HasParts,
    layout: SemanticLayout,
    windows: Windows,
    convolutions: Convolutions,
    dtype: torch.dtype,
    images: int | None,
    kept: Keeper,
) -> list[torch.Tensor]:
    """γ and β of these windows of the layout, from `kept`, or else from `compute_table`."""
    source = layout.source
    return kept.get(
        source,
        (spade, windows.index.shape[1:], dtype, images),
        # Another thread may have edited the layout since its windows were found, so a table depends
        # on the windows as well.
        [source.codes, source.palette, windows.table.offsets, *convolutions.weights],
        convolutions.marks,
        lambda: compute_table(layout, windows, convolutions, dtype, kept),
    )


def dtype_of_convolution(x: torch.Tensor, own: torch.dtype) -> torch.dtype:
    """The dtype of the output of a convolution of x whose weights have the dtype `own`: autocast
    does not apply to float64.
    """
    device = x.device.type
    if own != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return own


def compute_table(
    layout: SemanticLayout,
    windows: Windows,
    convolutions: Convolutions,
    dtype: torch.dtype,
    kept: Keeper | None = None,
) -> list[torch.Tensor]:
    """γ and β of the distinct windows, [K, C], in dtype; if they have norms of their own, those of
    each image, [N·K, C].
    """
    backend = kernels.select(layout.palette)
    gathers = dtype.itemsize == 2 and backend.gathers_half
    if gathers and kept is not None and not torch.is_grad_enabled() and not convolutions.normalise:
        return packed_table(layout, windows, convolutions, dtype, kept, backend)
    first, first_bias = weight_of(convolutions.shared), convolutions.shared.bias
    weights, biases = zip(*convolutions.projections())
    # Norms magnify the differences between windows, which half precision would round away.
    within = torch.promote_types(dtype, torch.float32) if convolutions.normalise else dtype
    palette = layout.palette
    if gathers and within == dtype and not torch.is_grad_enabled():
        palette = padded_palette(layout, dtype)[:, : first.shape[1]]
    activations = convolutions.activations
    rows: Sequence[torch.Tensor]
    if [type(activation) for activation in activations] == [nn.ReLU]:
        rows = convolve_through_relu(
            palette, first, first_bias, windows.hidden, weights, biases, windows.table, within
        )
    else:
        hidden = convolve_windows(palette, first, first_bias, windows.hidden, within)
        hidden = activated(hidden, activations)
        rows = convolve_beside(hidden, weights, biases, windows.table, within)
    if convolutions.normalise:
        norms = (convolutions.gamma_norm, convolutions.beta_norm)
        rows = [normalise_over_images(table, windows, norm) for table, norm in zip(rows, norms)]
    return [table if table.dtype == dtype else table.to(dtype) for table in rows]


def activated(hidden: torch.Tensor, activations: list[nn.Module]) -> torch.Tensor:
    for activation in activations:
        hidden = activation(hidden)
    return hidden


def packed_table(
    layout: SemanticLayout,
    windows: Windows,
    convolutions: Convolutions,
    dtype: torch.dtype,
    kept: Keeper,
    backend: Backend,
) -> list[torch.Tensor]:
    """compute_table's result, without gradients, by kernels that gather rows in half precision and
    read weights in the order of `by_taps`, which `kept` keeps.
    """
    first, first_bias = weight_of(convolutions.shared), convolutions.shared.bias
    weights, biases = zip(*convolutions.projections())

    def packed():
        joint = [weight.to(dtype) for weight in weights]
        of_joint = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias.to(dtype)
            for weight, bias in zip(joint, biases)
        ]
        own_bias = first.new_zeros(first.shape[0]) if first_bias is None else first_bias
        return [
            by_taps(first.to(dtype)),
            own_bias.to(dtype),
            by_taps(torch.cat(joint)),
            torch.cat(of_joint),
        ]

    tensors = [first, first_bias, *weights, *biases]
    packs = kept.derive(convolutions.gamma, "packed", tensors, (dtype,), packed)
    convolve = backend.convolve_windows
    palette = padded_palette(layout, dtype)
    hidden = convolve(palette, packs[:1], packs[1:2], *windows.hidden[:2])
    hidden = padded(activated(hidden, convolutions.activations))
    rows = convolve(hidden, packs[2:3], packs[3:], *windows.table[:2])
    return list(rows.split([weight.shape[0] for weight in weights], dim=1))


def by_taps(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in, *kernel], stored as [out, *kernel, in], with channels of zeros that make
    `in` a multiple of ALIGNED.
    """
    rows = padded(weight.flatten(2).transpose(1, 2)).contiguous()
    return rows.transpose(1, 2).unflatten(2, weight.shape[2:])


def padded(rows: torch.Tensor) -> torch.Tensor:
    """rows [..., C], with zeros at the end that make C a multiple of ALIGNED."""
    missing = -rows.shape[-1] % ALIGNED
    return F.pad(rows, (0, missing)) if missing else rows


def padded_palette(layout: SemanticLayout, dtype: torch.dtype) -> torch.Tensor:
    """A layout's palette in dtype, `padded`, and kept as long as the layout does not change."""
    palette = layout.palette
    fits = palette.dtype == dtype and palette.shape[1] % ALIGNED == 0
    if fits or torch.compiler.is_compiling() or is_capturing(palette):
        return padded(palette.to(dtype))
    state = [layout.content, dtype, stream_of(palette)]
    found = _palettes.get(layout)
    if found is None or found[0] != state:
        found = _palettes[layout] = state, padded(palette.to(dtype))
    return found[1]


def normalise_over_images(
    table: torch.Tensor, windows: Windows, norm: InstanceNorm | None
) -> torch.Tensor:
    """A table [K, C], normalised over each image by instance norm, [N·K, C]: a row counts as often
    as its window occurs in the image.

    This is computed in float64, because the table is small and γ and β differ little from window to
    window: in float32, subtracting their mean lost the differences.
    """
    images, count = len(windows.index), windows.count
    if norm is None:
        return table.repeat(images, 1)
    share = windows.shares
    # Windows that an image does not have are replaced by 0, not multiplied by it: their rows may be
    # infinite or NaN.
    exact = table.double().where(share[:, :, None] > 0, 0)
    deviations = exact - torch.einsum("nk,nkc->nc", share, exact)[:, None]
    variance = torch.einsum("nk,nkc->nc", share, deviations.square())
    normalised = deviations * torch.rsqrt(variance + norm.eps)[:, None]
    if norm.affine:
        normalised = normalised * norm.weight + norm.bias
    return normalised.view(images * count, -1).to(table.dtype)


class Tables:
    """Keeps γ and β by layout, and for each layout by layer, size and dtype, in at most max_bytes.
    A kept table is used as long as the weights that it was computed from do not change. When a
    layout is freed, its tables are dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes: int = 0
        # By id, the most recently used one at the end.
        self._layouts: OrderedDict[int, tuple[weakref.ref, dict[tuple, Kept]]] = OrderedDict()
        # By module: what depends on its weights alone.
        self._derived: weakref.WeakKeyDictionary[nn.Module, dict[str, Kept]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.RLock()  # reentrant: a layout may be freed while the lock is held

    def get(
        self,
        layout: SemanticLayout,
        key: tuple,
        weights: list[torch.Tensor],
        marks: list,
        compute: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """The tensors that compute() returned for this layout, key, weights and marks before, or
        returns now.
        """
        state = [*states_of(weights), stream_of(layout.codes), marks]
        with self._lock:
            found = self._of(layout).get(key)
        if found is not None and found.state == state:
            return found.tensors
        kept = Kept(compute(), state, weights)
        with self._lock:
            self._keep(layout, key, kept)
        return kept.tensors

    def derive(
        self,
        module: nn.Module,
        name: str,
        weights: list[torch.Tensor | None],
        settings: tuple,
        compute: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """The tensors that compute() returns, which depend on this module's weights and these
        settings alone. For each name, the newest ones are kept.
        """
        given = [weight for weight in weights if weight is not None]
        if is_capturing(given[0]):
            return compute()  # a graph computes its own in each replay
        missing = [weight is None for weight in weights]
        state = [*states_of(given), *missing, stream_of(given[0]), settings]
        found = self._derived.get(module, {}).get(name)
        if found is not None and found.state == state:
            return found.tensors
        kept = Kept(compute(), state, given)
        kept.note()
        with self._lock:
            self._derived.setdefault(module, {})[name] = kept
        return kept.tensors

    def _of(self, layout):
        number = id(layout)
        if number not in self._layouts:
            gone = weakref.ref(layout, lambda _: self._drop(number))
            self._layouts[number] = (gone, {})
        self._layouts.move_to_end(number)
        return self._layouts[number][1]

    def _keep(self, layout, key, kept):
        own = self._of(layout)
        if key in own:
            self.bytes -= own.pop(key).bytes
        while self.bytes + kept.bytes > self.max_bytes and next(iter(self._layouts)) != id(layout):
            self._drop(next(iter(self._layouts)))
        if self.bytes + kept.bytes <= self.max_bytes:
            own[key] = kept
            self.bytes += kept.bytes

    def _drop(self, number):
        with self._lock:
            _, dropped = self._layouts.pop(number, (None, {}))
            self.bytes -= sum(kept.bytes for kept in dropped.values())

    def changed_unseen(self) -> set[nn.Module]:
        """The modules whose weights, after something was derived from them, were written to in a
        way that PyTorch does not see.
        """
        with self._lock:
            made = [(module, kept) for module, of in self._derived.items() for kept in of.values()]
        return {module for module, kept in made if kept.changed_unseen()}

    def limit(self, max_bytes: int) -> None:
        """Keeps at most max_bytes from now on."""
        with self._lock:
            self.max_bytes = max_bytes
            while self._layouts and self.bytes > max_bytes:
                self._drop(next(iter(self._layouts)))

    def clear(self) -> None:
        with self._lock:
            self._layouts.clear()
            self._derived.clear()
            self.bytes = 0


class Beside:
    """The tables of a stack of layouts: those that `tables` keeps for each part, in the order in
    which `SemanticLayout.stack` puts the parts' windows. The parts should have their windows before
    they are stacked.
    """

    def __init__(self, tables: Tables, parts: list[SemanticLayout]) -> None:
        self.tables, self.parts = tables, parts
        self.derive = tables.derive

    def get(
        self,
        layout: SemanticLayout,
        key: tuple,
        weights: list[torch.Tensor],
        marks: list,
        compute: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """As `Tables.get`, for SPADEs whose γ and β have no norms of their own."""
        spade, size, dtype, _ = key
        convolutions = Known.of(spade).convolutions
        assert convolutions is not None  # otherwise the SPADE has no tables
        kernel_size = convolutions.gamma.kernel_size[0]
        found = [
            kept_table(
                spade,
                part,
                part.windows(size, kernel_size),
                convolutions,
                dtype,
                None,
                self.tables,
            )
            for part in self.parts
        ]
        return [torch.cat(rows) for rows in zip(*found)]


class Kept:
    """Tables, and the state of what they were computed from. The memory of the weights is held, so
    that no others can be allocated there.
    """

    def __init__(
        self, tensors: list[torch.Tensor], state: list, weights: list[torch.Tensor]
    ) -> None:
        self.tensors, self.state = tensors, state
        self.weights = [weight.detach() for weight in weights]
        self.bytes: int = sum(tensor.nbytes for tensor in tensors)

    def note(self) -> None:
        """Notes the values of the weights, for `changed_unseen`."""
        self._noted = states_of(self.weights), list(map(sum_of_bits, self.weights))

    def changed_unseen(self) -> bool:
        """Whether the weights' values have changed since they were noted, but not their state."""
        states, sums = self._noted
        same = states_of(self.weights) == states
        return same and not all(map(torch.equal, sums, map(sum_of_bits, self.weights)))


def stream_of(tensor: torch.Tensor) -> int | None:
    """The GPU's current stream, because results from another one may not be ready yet."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else None


class keep_in(Scope):
    """Inside, in this thread or task, these modules get what they compute from their weights from
    `tables`: SPADEs by `tables.get(layout, key, weights, marks, compute)`, and all of them by
    `tables.derive(module, name, weights, settings, compute)`.
    """

    def __init__(self, tables: Keeper, modules: Iterable[nn.Module]) -> None:
        self.tables, self.modules = tables, weakref.WeakSet(modules)
        super().__init__(self)


def kept_tables(module: nn.Module) -> Keeper | None:
    """What keeps this module's tables in the present scope, or None."""
    if not keep_in.anywhere or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    for scope in keep_in.all_here():
        if module in scope.modules:
            return scope.tables
    return None


@contextmanager
def frozen(model: nn.Module, max_bytes: int = 1 << 30) -> Iterator[Tables]:
    """Inside `with frozen(model):` the weights of the model's SPADEs should not change, and with
    gradients off each SPADE computes the γ and β of a layout's distinct windows only once: for many
    samples of z, or for the steps of a diffusion sampler.

    It applies to this thread or asyncio task; `contextvars.copy_context().run` carries it into
    another thread. Weights that are replaced inside are noticed, and results of the old ones are
    not used. A change that PyTorch does not see (through `.data` or NumPy) is found at the end.
    Everything else that depends on weights alone is computed once as well: spectral norm's σ, the
    planes of batch norms with running statistics, and the weights in the order that kernels read.

    Args:
        model: a module with SPADEs.
        max_bytes: the memory that the tables may take. The tables of the least recently used layout
            are dropped first; if one layout alone needs more, the tables that do not fit are
            computed in each call. When a layout is freed, its tables are dropped.

    Yields:
        The tables, whose `bytes` is the memory that they take. They are dropped at the end.

    Raises:
        ValueError, TypeError: if the model has no SPADE or is not a module, or max_bytes is not a
            number of bytes.
        RuntimeError: at the end, if a weight is not what it was at the beginning.
    """
    check_module("model", model)
    max_bytes = whole_number("max_bytes", max_bytes, least=0)
    named = model.named_modules()
    layers = {name: module for name, module in named if isinstance(module, HasParts)}
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without any SPADE; it should have one")
    tables = Tables(max_bytes)
    own, given = fingerprints(layers), fingerprints(layers, named_given)
    try:
        with keep_in(tables, model.modules()):
            yield tables
    finally:
        unseen = tables.changed_unseen()
        tables.clear()
    changed = {name for name, _ in own.items() ^ fingerprints(layers).items()}
    now = fingerprints(layers, named_given)
    changed |= {name for name in given if now.get(name, given[name]) != given[name]}
    changed |= {name for name, module in model.named_modules() if module in unseen}
    if changed:
        raise RuntimeError(
            f"weights changed inside frozen(model): {', '.join(sorted(changed))}; what was computed"
            " there may come from the old ones"
        )


@torch.no_grad()
def sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    total = tensor.view(integers[tensor.element_size()]).sum(dtype=torch.int64)
    return total.full_tensor() if hasattr(total, "full_tensor") else total  # of all shards


@torch.no_grad()
def fingerprints(
    layers: dict[str, HasParts], named: Callable = nn.Module.named_parameters
) -> dict[str, tuple]:
    """For each weight that determines γ and β, by name: its shape, dtype and the sum of its bits,
    if it has any. Its address and version do not count: FSDP replaces weights by equal ones, and
    tables were not used after a change of them. named: returns a part's weights with their names.
    """
    found = {}
    for name, layer in layers.items():
        for part in layer.spade_form.of_condition:
            for weight_name, weight in named(part_of(layer, part)):
                own = (name, part, weight_name)
                bits = None if weight.is_meta else sum_of_bits(weight).item()
                found[".".join(filter(None, own))] = (weight.shape, weight.dtype, bits)
    return found
