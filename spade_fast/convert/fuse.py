"""Runs somebody's forward as it is, except that norm(x) · (1 + γ) + β in it is one modulation.

What a norm returns is not computed at once: a tensor stands for it, which knows x and the norm. So
does one for 1 + γ, and one for the product. Where β is added to that, `spade_modulate` computes the
sum. Where anything else reads such a tensor, it is computed as the forward would have done it. So
no forward has to be understood: it may take any arguments, and do anything before and after.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..nn.unchanged import version_of
from ..ops.arguments import DTYPES, is_divisor
from ..ops.modulate import spade_modulate
from ..recording import PLAIN, is_recorded
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


class State(NamedTuple):
    """What decides how an operation is recorded for autograd."""

    gradients: bool
    inference: bool
    hooks: tuple | None  # the innermost torch.autograd.graph.saved_tensors_hooks

    @staticmethod
    def now() -> "State":
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return State(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks)

    @contextmanager
    def again(self, device: str) -> Iterator[None]:
        """Inside, operations are recorded as they were in this state, and not transformed or cast,
        since nothing is deferred where they are.
        """
        inner = []
        while (hooks := State.now().hooks) not in (None, self.hooks):
            inner.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
        with ExitStack() as stack:
            for hooks in inner:
                stack.callback(torch._C._autograd._push_saved_tensors_default_hooks, *hooks)
            stack.enter_context(temporarily_clear_interpreter_stack())
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            stack.enter_context(torch.autocast(device, enabled=False))
            yield


class Deferred(Later):
    """Stands for a tensor, which is computed from the sources when something reads it."""

    sources: tuple[Tensor, ...]
    versions: list[int | None]
    state: State  # when it was returned
    needs: bool  # whether it then requires gradients
    is_fused: bool  # whether it is a step of a modulation whose gradients do not pass it

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], like: Tensor, sources: tuple[Tensor, ...]
    ) -> "Deferred":
        needs = torch.is_grad_enabled() and any(
            own.needs if isinstance(own, Deferred) else own.requires_grad for own in sources
        )

        def make_empty():
            return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)

        device = like.device
        with torch._C.DisableTorchFunction():
            found = _Refusing.apply(make_empty, *sources) if needs else make_empty()
        found._make, found.sources, found.versions = make, sources, _versions(sources)
        found.state, found.needs, found.is_fused = State.now(), needs, False
        return found

    @property
    def is_unread(self) -> bool:
        return self._make is not None

    def read(self) -> Tensor:
        if not self.is_unread:
            return self._made
        # A mode that is active would defer it again.
        with torch._C.DisableTorchFunction():
            self.check()
            with self.state.again(self.device.type):
                made = super().read()
        # What it was computed from is not kept.
        self.__dict__ = {"_make": None, "_made": made, "is_fused": self.is_fused}
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        wanted = OF_GRADIENTS.get(func)
        if wanted is not None:
            found = tree_leaves(wanted(*args, **(kwargs or {})))
            if any(isinstance(own, Deferred) and own.is_fused for own in found):
                raise RuntimeError(
                    "the gradient of a step of a modulation is asked for, which was computed as one"
                    " operation; call spade_fast.revert(module) for a module that does this"
                )
        return super().__torch_function__(func, types, args, kwargs)

    def check(self) -> None:
        if self.versions != _versions(self.sources):
            raise RuntimeError(
                "what a norm was given was changed in place, unseen, before its result was used;"
                " call spade_fast.revert(module) for a module that does this"
            )


class _Refusing(torch.autograd.Function):
    """Connects a deferred tensor to its sources, so that no gradient is lost unseen where it is
    given to something that does not read it.
    """

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(
            "a torch.autograd.Function, a scripted function or a transform was given a step of a"
            " modulation, which is not computed yet; call spade_fast.revert(module) for a module"
            " that does this"
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
        self._running: set[int] = set()  # where those statistics lie in memory
        self._hooks = State.now().hooks
        self._is_exposed = False  # whether something may write to memory unseen

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._updating and not self._running.isdisjoint(map(_memory, _tensors((args, kwargs)))):
            self._read_before_writing((args, kwargs))
        if func in EXPOSES:
            self._is_exposed = True
            self._read_all()
        rule = RULES.get(func)
        found = None if rule is None else rule(self, func, args, kwargs)
        if found is not None:
            return found
        if self._deferred and _may_write(func, args, kwargs):
            self._read_before_writing((args, kwargs))
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for deferred in self._updating.values():
            deferred.read()

    def finish(self, result: Any) -> Any:
        """The result, after everything has been computed that still stands for a tensor. A step of
        a modulation that requires gradients keeps its class, which refuses to be asked for them.
        """
        self._read_all()
        if not any(isinstance(own, Deferred) for own in tree_leaves(result)):
            return result  # itself, which may also be kept elsewhere
        return tree_map_only(Deferred, lambda own: own if own.is_fused else own.read(), result)

    def norm(self, func: Callable, args: tuple, kwargs: dict) -> Normalised | None:
        try:
            described = NORMS[func](*args, **kwargs)
        except TypeError:  # the function raises its own error
            return None
        if described is None or not _is_known(*described) or not self._may_defer():
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
            self._running |= {_memory(settings[name]) for name in ("running_mean", "running_var")}
        return found

    def add(self, func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
        if kwargs or len(args) != 2:
            return None
        for one, other in (args, args[::-1]):
            if type(one) is Scaled:
                return self._modulate(one, other)
            if type(other) in (int, float) and other == 1 and type(one) in PLAIN:
                is_large = self._any_size or pays(one.numel(), True)
                if one.dtype in DTYPES and is_large and self._may_defer():
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
        states = {State.now(), normalised.state} | ({factor.state} if plus_one else set())
        if not _fits(gamma, normalised.x) or len(states) > 1 or not self._may_defer():
            return None

        def make():
            return func(*(own.read() if isinstance(own, Deferred) else own for own in args))

        found = self._defer(Scaled, make, normalised.x, normalised, factor)
        found.normalised, found.gamma, found.plus_one = normalised, gamma, plus_one
        return found

    def _modulate(self, scaled, beta):
        """The modulation, or None if it has to be computed step by step."""
        if not scaled.is_unread or not scaled.normalised.is_unread:
            return None
        norm = scaled.normalised
        if State.now() != scaled.state or not self._may_defer() or not _fits(beta, norm.x):
            return None
        scaled.check()
        norm.check()
        updates = self._updating.pop(id(norm), None) is not None
        y = spade_modulate(norm.x, scaled.gamma, beta, plus_one=scaled.plus_one, **norm.settings)
        if updates:
            # Another use of the norm's result should not update the statistics again.
            norm.settings |= {"running_mean": None, "running_var": None}
            norm.versions = _versions(norm.sources)
        for step in (scaled, *scaled.sources):
            if isinstance(step, Deferred):
                step.is_fused = step.needs
        self.fused += 1
        self.kinds.add(norm.settings["norm"])
        return y

    def _may_defer(self):
        """Whether what is deferred now could be computed later as it would be now."""
        return not self._is_exposed and State.now().hooks == self._hooks and not is_recorded()

    def _read_all(self):
        for deferred in self._unread():
            deferred.read()

    def _defer(self, kind, make, like, *sources):
        found = kind(make, like, sources)
        self._deferred.append(weakref.ref(found))
        return found

    def _unread(self):
        found = [reference() for reference in self._deferred]
        return [own for own in found if own is not None and own.is_unread]

    def _read_before_writing(self, written):
        """Reads what is computed from any of these tensors, or from others in their memory."""
        tensors = _tensors(written)
        same, memory = set(map(id, tensors)), set(map(_memory, tensors)) - {None}
        for deferred in self._unread():
            for own in deferred.sources:
                if id(own) in same or not memory.isdisjoint((_memory(own), UNKNOWN)):
                    deferred.read()
                    break


def _tensors(tree):
    return [own for own in tree_leaves(tree) if isinstance(own, Tensor)]


def _memory(tensor):
    """The address of a tensor's memory; None if it has none yet, UNKNOWN if it cannot be asked."""
    tensor = _computed(tensor)
    if isinstance(tensor, Deferred):
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor, or one under a transform
        return UNKNOWN


def _versions(tensors):
    """The number of times that each was written to; 0 for a tensor that is not computed yet."""
    now = map(_computed, tensors)
    return [0 if isinstance(own, Deferred) else version_of(own) or 0 for own in now]


def _computed(tensor):
    """The tensor itself, or the one that was computed for it."""
    return tensor._made if isinstance(tensor, Deferred) and not tensor.is_unread else tensor


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
    if len(args) != 2 or kwargs or type(args[0]) is not Normalised or not args[0].is_unread:
        return None
    return args[0] if args[1] is args[0].x.dtype else None


UNKNOWN = -1
# Functions that return what can write to a tensor's memory unseen.
EXPOSES = {
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.storage,
    Tensor.untyped_storage,
}
# Functions that ask for gradients, and the tensors whose gradients they ask for.
OF_GRADIENTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.register_hook, Tensor.retain_grad), lambda tensor, *rest: tensor),
    Tensor.backward: lambda *rest, inputs=None, **named: inputs,
    torch.autograd.backward: lambda *rest, inputs=None, **named: inputs,
    torch.autograd.grad: lambda outputs, inputs, *rest, **named: inputs,
}
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
