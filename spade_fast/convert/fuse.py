"""Runs somebody's forward as it is, except that norm(x) · (1 + γ) + β in it is one modulation.

What a norm returns is not computed at once: a tensor stands for it, which knows x and the norm. So
does one for 1 + γ, and one for the product. Where β is added to that, `spade_modulate` computes the
sum. Where anything else reads such a tensor, it is computed as the forward would have done it. So
no forward has to be understood: it may take any arguments, and do anything before and after.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..nn.unchanged import version_of
from ..ops.arguments import DTYPES, is_divisor
from ..ops.modulate import spade_modulate
from ..recording import PLAIN
from .later import Later

Tensor = torch.Tensor
# The least elements of x for which one operation is faster than the own steps, without and with
# gradients, on a CPU (torch 2.13, one thread, x in contiguous memory): for norms that PyTorch
# computes in several passes, and for others.
LEAST_OF_SLOW, LEAST = (2**17, 2**20), (2**21, 2**22)


def pays(elements: int, is_slow: bool) -> bool:
    """Whether fusing takes less time. is_slow: whether the norm is instance norm, or batch norm in
    train mode.
    """
    return elements >= (LEAST_OF_SLOW if is_slow else LEAST)[torch.is_grad_enabled()]


def may_pay(arguments: Iterable, is_slow: bool) -> bool:
    """Whether fusing may take less time in a forward with these arguments."""
    return pays(max(map(_elements, arguments), default=0), is_slow)


def _elements(argument):
    if isinstance(argument, dict):
        argument = tuple(argument.values())
    if isinstance(argument, (list, tuple)):
        return max(map(_elements, argument), default=0)
    return argument.numel() if isinstance(argument, Tensor) else 0


class Deferred(Later):
    """Stands for a tensor, which is computed from the sources when something reads it."""

    sources: tuple[Tensor, ...]
    versions: list[int | None]
    records: bool  # whether gradients were recorded when it was returned
    needs: bool  # whether it then requires them

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], like: Tensor, sources: tuple[Tensor, ...]
    ) -> "Deferred":
        records = torch.is_grad_enabled()
        needs = records and any(
            own.needs if isinstance(own, Deferred) else own.requires_grad for own in sources
        )
        found = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=needs
        )
        found._make, found.sources, found.versions = make, sources, _versions(sources)
        found.records, found.needs = records, needs
        if needs:
            with torch._C.DisableTorchFunctionSubclass():
                found.register_hook(_refuse)
        return found

    @property
    def is_unread(self) -> bool:
        return self._make is not None

    def read(self) -> Tensor:
        if not self.is_unread:
            return self._made
        self.check()
        # A mode that is active would defer it again.
        with torch._C.DisableTorchFunction(), torch.set_grad_enabled(self.records):
            return super().read()

    def check(self) -> None:
        if self.versions != _versions(self.sources):
            raise RuntimeError(
                "what a norm was given was changed in place, unseen, before its result was used;"
                " call spade_fast.revert(module) for a module that does this"
            )


class Normalised(Deferred):
    """Stands for norm(x)."""

    x: Tensor
    settings: dict[str, Any]  # the arguments of `spade_modulate` for the norm


class PlusOne(Deferred):
    """Stands for 1 + γ."""


class Scaled(Deferred):
    """Stands for norm(x) · (1 + γ), or for norm(x) · γ."""

    normalised: Normalised
    gamma: Tensor
    plus_one: bool


class fusing(TorchFunctionMode):
    """Inside, norm(x) · (1 + γ) + β is one operation where that pays, or at any size. `fused` is
    the number of these operations. The result of a forward that ran inside goes through `finish`.
    """

    def __init__(self, any_size: bool = False) -> None:
        super().__init__()
        self.fused, self._any_size = 0, any_size
        self.kinds: set[str] = set()  # of the norms that were fused
        self._deferred: list[weakref.ref[Deferred]] = []
        # By id: batch norms that update their running statistics when they are computed.
        self._updating: dict[int, Normalised] = {}
        self._running: set[int] = set()  # the ids of those statistics

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._updating and any(id(own) in self._running for own in (*args, *kwargs.values())):
            self._read_before_writing((args, kwargs))
        rule = RULES.get(func)
        found = None if rule is None else rule(self, func, args, kwargs)
        if found is not None:
            return found
        if self._deferred and _may_write(func, args, kwargs):
            self._read_before_writing((args, kwargs))
        return func(*args, **kwargs)

    def finish(self, result: Any) -> Any:
        """The result, after everything has been computed that still stands for a tensor."""
        for deferred in (*self._updating.values(), *self._unread()):
            deferred.read()
        if type(result) in PLAIN:
            return result
        return tree_map_only(Deferred, Deferred.read, result)

    def norm(self, func: Callable, args: tuple, kwargs: dict) -> Normalised | None:
        try:
            described = NORMS[func](*args, **kwargs)
        except TypeError:  # the function raises its own error
            return None
        if described is None or not _is_known(*described):
            return None
        x, settings = described
        is_slow = settings["norm"] == "instance" or bool(settings.get("training"))
        if not self._any_size and not pays(x.numel(), is_slow):
            return None
        own = [value for value in settings.values() if isinstance(value, Tensor)]
        updates = settings.get("training") and settings["running_mean"] is not None

        def make():
            if not updates:
                return func(*args, **kwargs)
            names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            return F.batch_norm(x, *(settings[name] for name in names))

        found = self._defer(Normalised, make, x, x, *own)
        found.x, found.settings = x, settings
        if updates:
            self._updating[id(found)] = found
            self._running |= {id(settings["running_mean"]), id(settings["running_var"])}
        return found

    def add(self, func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
        if kwargs or len(args) != 2:
            return None
        for one, other in (args, args[::-1]):
            if type(one) is Scaled:
                return self._modulate(one, other)
            if type(other) in (int, float) and other == 1 and type(one) in PLAIN:
                if one.dtype in DTYPES and (self._any_size or pays(one.numel(), True)):
                    return self._defer(PlusOne, lambda: func(*args), one, one)
        return None

    def multiply(self, func: Callable, args: tuple, kwargs: dict) -> Scaled | None:
        if kwargs or len(args) != 2:
            return None
        normalised, factor = args if type(args[0]) is Normalised else args[::-1]
        if type(normalised) is not Normalised or not normalised.is_unread:
            return None
        plus_one = type(factor) is PlusOne and factor.is_unread
        gamma = factor.sources[0] if plus_one else factor
        records = {torch.is_grad_enabled(), normalised.records}
        records |= {factor.records} if plus_one else set()
        if not _fits(gamma, normalised.x) or len(records) > 1:
            return None

        def make():
            return func(*(own.read() if isinstance(own, Deferred) else own for own in args))

        found = self._defer(Scaled, make, normalised.x, normalised, factor)
        found.normalised, found.gamma, found.plus_one = normalised, gamma, plus_one
        return found

    def _modulate(self, scaled, beta):
        """The modulation, or None if it has to be computed step by step."""
        norm = scaled.normalised
        unread = scaled.is_unread and norm.is_unread
        same = torch.is_grad_enabled() == scaled.records
        if not unread or not same or not _fits(beta, norm.x):
            return None
        scaled.check()
        norm.check()
        y = spade_modulate(norm.x, scaled.gamma, beta, plus_one=scaled.plus_one, **norm.settings)
        if self._updating.pop(id(norm), None) is not None:
            # Another use of the norm's result should not update the statistics again.
            norm.settings |= {"running_mean": None, "running_var": None}
            norm.versions = _versions(norm.sources)
        self.fused += 1
        self.kinds.add(norm.settings["norm"])
        return y

    def _defer(self, kind, make, like, *sources):
        found = kind(make, like, sources)
        self._deferred.append(weakref.ref(found))
        return found

    def _unread(self):
        found = [reference() for reference in self._deferred]
        return [own for own in found if own is not None and own.is_unread]

    def _read_before_writing(self, written):
        """Reads what is computed from any of these tensors, or from others in their memory."""
        tensors = [own for own in tree_leaves(written) if isinstance(own, Tensor)]
        same = {id(own) for own in tensors}
        memory = {_memory(own) for own in tensors if not isinstance(own, Deferred)} - {None}
        for deferred in self._unread():
            for own in deferred.sources:
                if id(own) in same or (type(own) in PLAIN and _memory(own) in memory):
                    deferred.read()
                    break


def _memory(tensor):
    """The address of a tensor's memory, or None if it has none of that kind."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None


def _versions(tensors):
    return [version_of(own) for own in tensors if not isinstance(own, Deferred)]


def _refuse(gradient):
    raise RuntimeError(
        "a torch.autograd.Function was given what a norm returns, which is not computed yet; call"
        " spade_fast.revert(module) for a module that does this"
    )


def _may_write(func, args, kwargs):
    """Whether a function may write to its arguments."""
    name = getattr(func, "__name__", "_")
    in_place = name.endswith("_") and not name.endswith("__")
    flags = (*args, kwargs.get("inplace"))
    sets = name in ("__setitem__", "__set__") or "out" in kwargs
    return in_place or sets or any(flag is True for flag in flags)


def _fits(tensor, x):
    """Whether a tensor may be γ or β of x as it is."""
    return (
        type(tensor) in PLAIN
        and tensor.shape == x.shape
        and tensor.dtype == x.dtype
        and tensor.device == x.device
    )


def _is_known(x, settings):
    """Whether `spade_modulate` normalises x with these settings as the norm does."""
    if type(x) not in PLAIN or x.dtype not in DTYPES or not 3 <= x.dim() <= 5:
        return False
    if x.is_meta or x.shape[0] == 0 or math.prod(x.shape[2:]) < 2:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    for own in settings.values():
        if isinstance(own, Tensor):
            alike = own.dtype == x.dtype and own.device == x.device
            if type(own) not in PLAIN or own.shape != x.shape[1:2] or not alike:
                return False
    groups = settings.get("num_groups", 1)
    return is_divisor(groups, x.shape[1])


def _of_instance(
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if running_mean is not None or running_var is not None or not use_input_stats:
        return None
    return x, {"norm": "instance", "weight": weight, "bias": bias, "eps": eps}


def _of_group(x, num_groups, weight=None, bias=None, eps=1e-5):
    own = {"norm": "group", "num_groups": num_groups}
    return x, own | {"weight": weight, "bias": bias, "eps": eps}


def _of_batch(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if (running_mean is None) != (running_var is None) or not (
        training or running_mean is not None
    ):
        return None
    own = {"running_mean": running_mean, "running_var": running_var, "training": training}
    own |= {"norm": "batch", "momentum": momentum}
    return x, own | {"weight": weight, "bias": bias, "eps": eps}


def _describe(mode, func, args, kwargs):
    """What is known of a deferred tensor without computing it."""
    if not args or not isinstance(args[0], Deferred):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _cast(mode, func, args, kwargs):
    """A deferred tensor that is cast to its own dtype."""
    if len(args) != 2 or kwargs or type(args[0]) is not Normalised:
        return None
    return args[0] if args[1] is args[0].x.dtype else None


NORMS: dict[Any, Callable[..., tuple | None]] = {
    F.instance_norm: _of_instance,
    F.group_norm: _of_group,
    F.batch_norm: _of_batch,
}
RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(NORMS, fusing.norm),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), fusing.add),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), fusing.multiply),
    **dict.fromkeys((Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__), _describe),
    **{getattr(Tensor, own).__get__: _describe for own in ("shape", "dtype", "device", "ndim")},
    **dict.fromkeys((Tensor.type, Tensor.to), _cast),
}
