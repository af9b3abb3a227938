"""Tables that are kept while weights stay as they are: γ and β of a layout's windows, for any
number of forward passes.
"""

import threading
from collections import OrderedDict
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

_kept = (
    WeakKeyDictionary()
)  # the Tables that a SPADE keeps its own in: those of the innermost `frozen` around it


@contextmanager
def frozen(model, max_bytes=1 << 30):
    """Inside `with frozen(model):` the weights of the model's SPADEs stay as they are, and with
    gradients off each computes the γ and β of a layout's distinct windows once: for samples of z,
    for the steps of a diffusion sampler.

    Args:
        model: a module with SPADEs.
        max_bytes: what the tables may take. Those of the layout that was not used for longest make
            room; for one layout alone that needs more, the tables that do not fit are computed each
            time.

    Yields:
        The tables, whose `bytes` says how much they hold. They are dropped at the end.

    Raises:
        ValueError: the model has no SPADE.
        RuntimeError: at the end, if a weight is not what it was at the beginning: results may have
            been those of the old weights.
    """
    from .spade import SpatiallyAdaptive

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SpatiallyAdaptive)
    }
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without any SPADE, it should have one")
    tables, before = Tables(max_bytes), fingerprints(layers)
    try:
        with keep_in(tables, layers.values()):
            yield tables
    finally:
        tables.clear()
    changed = sorted({name for name, _ in before.items() ^ fingerprints(layers).items()})
    if changed:
        raise RuntimeError(
            f"weights changed inside frozen(model): {', '.join(changed)}; what was computed there"
            " may be of the old ones"
        )


@contextmanager
def keep_in(tables, layers):
    """Inside, these SPADEs get their tables by `tables.get(layout, key, compute)`, as they
    otherwise compute them.
    """
    layers = list(layers)
    around = {layer: _kept.get(layer) for layer in layers}
    _kept.update(dict.fromkeys(layers, tables))
    try:
        yield
    finally:
        for layer, outer in around.items():
            if outer is None:
                _kept.pop(layer, None)
            else:
                _kept[layer] = outer


def kept_tables(spade):
    """The Tables that this layer's are kept in now, or None."""
    return None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _kept.get(spade)


class Tables:
    """γ and β by layout, and for each layout by layer, size and dtype: no more than max_bytes of
    them.
    """

    def __init__(self, max_bytes):
        self.max_bytes, self.bytes = max_bytes, 0
        self._layouts = OrderedDict()  # the one that was used last at the end
        self._lock = threading.Lock()

    def get(self, layout, key, compute):
        """The tensors that compute() gave for this layout and key before, or gives now."""
        with self._lock:
            found = self._of(layout).get(key)
        if found is None:
            found = compute()
            with self._lock:
                self._keep(layout, key, found)
        return found

    def _of(self, layout):
        own = self._layouts.setdefault(layout, {})
        self._layouts.move_to_end(layout)
        return own

    def _keep(self, layout, key, tensors):
        size, own = sum(tensor.nbytes for tensor in tensors), self._of(layout)
        while self.bytes + size > self.max_bytes and next(iter(self._layouts)) is not layout:
            _, dropped = self._layouts.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for kept in dropped.values() for tensor in kept)
        if self.bytes + size <= self.max_bytes and key not in own:
            own[key] = tensors
            self.bytes += size

    def clear(self):
        self._layouts.clear()
        self.bytes = 0


@torch.no_grad()
def fingerprints(layers):
    """Of each weight that decides γ and β, by name: where it is, how often it was written to, and
    the sum of its bits.
    """
    found = {}
    for name, layer in layers.items():
        for part in (layer.spade_form.shared, layer.spade_form.gamma, layer.spade_form.beta):
            for weight_name, weight in getattr(layer, part).named_parameters():
                bits = weight.view(
                    {8: torch.int64, 4: torch.int32, 2: torch.int16}[weight.element_size()]
                )
                state = (
                    weight.data_ptr(),
                    None if weight.is_inference() else weight._version,
                    weight.shape,
                    weight.dtype,
                )
                found[".".join(filter(None, (name, part, weight_name)))] = (
                    *state,
                    bits.sum(dtype=torch.int64).item(),
                )
    return found
