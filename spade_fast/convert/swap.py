"""The fast classes: subclasses of other people's classes, whose forward is this project's for every
call that was proved, and the own class's for every other call.
"""

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from itertools import chain
from typing import Any, NamedTuple, SupportsIndex

import torch
import torch.fx
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_map, tree_structure

from ..layout import SemanticLayout
from ..nn.block import ResidualBlock
from ..nn.inside import PLAIN, Each
from ..nn.modules import (
    KINDS,
    MAKERS,
    NOT_MARKED,
    Same,
    dtype_of_weights,
    hooks,
    is_called_plainly,
    is_watched,
    mark_of,
    marks_of,
    marks_of_settings,
    within,
)
from ..nn.parts import Form, HasParts, Known, part_of
from ..nn.pixels import dense, resize
from ..nn.spade import SpatiallyAdaptive, batch_of
from ..nn.unchanged import Version, until_changed, views_inside
from ..recording import is_recorded
from .again import again
from .fuse import fusing, may_pay
from .later import Later


class Mark(Enum):
    """What stands in a result for a tensor that depends on the arguments."""

    Y = "y"
    CONDITION = "the condition, resized to x"


class Called(NamedTuple):
    """How a forward is called, and what it returns."""

    swapped: bool = False  # whether the condition comes before x
    keyed: bool = False  # whether the condition is in a dictionary, under any key
    caches: tuple[str, ...] = ()  # arguments that are dictionaries of dictionaries, empty at first
    # Arguments with features that x is concatenated with, and the numbers of their channels.
    beside: dict[str, int] = {}
    # Arguments whose values do not matter if they have the structure of these.
    ignores: dict[str, Any] = {}
    # With marks in place of tensors; None if it is not known what they are.
    result: Any = Mark.Y
    # The part whose output follows y's channels. It is given the channels of the condition that
    # follow those of the labels.
    appended: str | None = None

    def returned(self, y: torch.Tensor, condition: Callable[[], torch.Tensor]) -> Any:
        """The result with this y. condition: makes the resized condition."""
        marked = {Mark.Y: lambda: y, Mark.CONDITION: condition}
        return tree_map(
            lambda leaf: marked[leaf]() if isinstance(leaf, Mark) else leaf, self.result
        )


class Proof(NamedTuple):
    """The states in which a module's own forward and the fast one were found to agree. A forward
    may depend on more than its arguments and weights, so in any other state the own forward runs.
    """

    marks: list  # of the module's own attributes, and of those of its parts
    children: tuple  # the kinds of its parts
    modes: tuple  # pairs: whether in train mode, whether gradients are recorded
    dtypes: tuple  # whether in train mode, then the dtypes of weights, x and autocast (or None)
    sizes: frozenset  # of a condition relative to x, along an axis: "same", "larger", "smaller"

    def holds(self, module: "Fast", x: torch.Tensor, segmap: torch.Tensor) -> bool:
        """Whether the proof covers the module's present state and these arguments."""
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtypes = (module.training, dtype_of_weights(module), x.dtype, autocast)
        return (
            (module.training, torch.is_grad_enabled()) in self.modes
            and dtypes in self.dtypes
            and sizes_against(x, segmap) <= self.sizes
            and until_changed(module, is_as_proved, views_of_marks)
        )


def is_as_proved(module: "Fast") -> bool:
    """Whether a module is unchanged since it was proved, except for its weights."""
    form = module.spade_form
    return (
        kinds_of_children(module) == form.proof.children
        and follows(module)
        and marks(module, form) == form.proof.marks
        and marks_of_class(module.own_class) == module.class_marks
    )


def views_of_marks(module: "Fast") -> Iterator[Iterable]:
    """Views of everything that `is_as_proved` compares. Comparing marks takes far longer than
    comparing the objects in these views.
    """
    parts, wrappers = parts_of(module), wrappers_in(module, module.spade_form)
    entries = [vars(kind) for kind in kinds_of(module.own_class)]
    entries += [own for of in (module, *wrappers) for own in (of._modules, of._buffers)]
    yield Each(type, module._modules.values())
    for own in (*entries, *map(vars, wrappers)):
        yield from (own, own.values())
    for part in parts:
        yield from (vars(part), Each(_but_tensors, vars(part).values()))
    for of in (module, *parts, *wrappers):
        entries.append({name: own for name, own in vars(of).items() if name not in NOT_MARKED})
    known = within(module)
    for value in chain.from_iterable(own.values() for own in entries):
        yield from views_inside(value, Version, known)


def _but_tensors(value):
    """The value; or for any tensor, which a call may recompute, the class Tensor."""
    return torch.Tensor if isinstance(value, torch.Tensor) else value


def marks(module: nn.Module, form: "Form | OwnForm") -> list:
    """The marks of a module's attributes, of its parts' settings, and of its wrappers."""
    known = within(module)
    parts = [marks_of_settings(part, known) for part in parts_of(module)]
    wrappers = [(Same(own), marks_of(own, known)) for own in wrappers_in(module, form)]
    return [marks_of(module, known), parts, wrappers]


def kinds_of_children(module: nn.Module) -> tuple:
    """The own classes of a module's parts. All known norms count as one kind, because one may be
    replaced by another.
    """
    own = [getattr(type(child), "own_class", type(child)) for child in module._modules.values()]
    return tuple("norm" if kind in KINDS else kind for kind in own)


def marks_of_class(own_class: type[nn.Module]) -> list:
    """The marks of the attributes of a class and its base classes: a method may be replaced."""
    return [
        (Same(kind), {name: mark_of(own) for name, own in vars(kind).items()})
        for kind in kinds_of(own_class)
    ]


def kinds_of(own_class: type[nn.Module]) -> tuple:
    """A class and its base classes, up to torch.nn.Module, which is left out."""
    return own_class.__mro__[: own_class.__mro__.index(nn.Module)]


def wrappers_in(module: nn.Module, form: "Form | OwnForm") -> list[nn.Module]:
    """The wrappers: modules that contain others, in the parts of a SPADE whose contents count
    (`form.inside`).
    """
    if isinstance(form, OwnForm) or not form.inside:
        return []
    parts = (module.get_submodule(name) for name in form.of_condition)
    return [own for part in parts for own in part.modules() if own._modules]


def follows(module: nn.Module) -> bool:
    """Whether a module's parts are all in its own mode, train or eval."""
    return all(child.training == module.training for child in parts_of(module))


def parts_of(module: nn.Module) -> list[nn.Module]:
    """A module's children, their children and so on, of all of which a forward may read attributes.
    Without norms and SPADEs, which are checked when they are used.
    """
    parts: list[nn.Module] = []
    for own in chain([module], parts):  # which goes on with the parts that it has found
        parts += [
            child
            for child in own._modules.values()
            if child is not None and type(child) not in KINDS and not isinstance(child, HasParts)
        ]
    return parts


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or equal numbers, flags or strings."""
    return one is other or (type(one) is type(other) and type(one) in PLAIN and one == other)


def sizes_against(x: torch.Tensor, segmap: torch.Tensor | SemanticLayout) -> set:
    """The sizes of a condition relative to x's, each axis as "same", "larger" or "smaller"."""
    given = segmap.codes.shape[1:] if isinstance(segmap, SemanticLayout) else segmap.shape[2:]
    found = set()
    for own, wanted in zip(given, x.shape[2:]):
        found.add("same" if own == wanted else "larger" if own > wanted else "smaller")
    return found


def is_empty(x: torch.Tensor | SemanticLayout) -> bool:
    return 0 in (x.codes if isinstance(x, SemanticLayout) else x).shape


class Fast(nn.Module):
    """The base of the classes that `convert` creates. These classes cannot be imported by name, so
    pickle and copy create them again.
    """

    kind: type  # FastSPADE, FastModulation or FastBlock
    own_class: type[nn.Module]
    class_marks: list  # of the own class, when this class was created
    call: "Call"
    spade_form: Any  # a Form or an OwnForm
    check: Callable[..., None]  # with x and segmap
    _fast: Callable[[torch.Tensor, torch.Tensor | SemanticLayout], torch.Tensor]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        getstate: Any = getattr(
            self.own_class, "__getstate__", None
        )  # object's, or the own class's
        is_own = getstate is not getattr(object, "__getstate__", None)
        return _empty, (self.kind, self.own_class), getstate(self) if is_own else self.__dict__

    def __init_subclass__(cls) -> None:
        """Skips the own class's: a registry of its subclasses should not list this class."""

    def _get_name(self) -> str:
        return f"Fast{self.own_class.__name__}"

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The result of the own forward, for any arguments that the own forward takes."""
        if isinstance(arguments, torch.fx.Proxy):
            raise TypeError(
                "torch.fx cannot trace a converted module alone: call revert(model) first, or trace"
                " the model that contains it"
            )
        if not isinstance(self, Fast):  # reverted while it was called
            return self.forward(*arguments, **named)
        pair = self.call.pair(arguments, named, self.spade_form.call or Called())
        if pair is not None and self._is_proved(*pair):
            return self._fast(*pair)
        return self._own(arguments, named)

    def _own(self, arguments, named):
        """The result of the own forward."""
        given = [dense(argument, self) for argument in arguments]
        named = {name: dense(argument, self) for name, argument in named.items()}
        return self.own_class.forward(self, *given, **named)

    def is_open(self, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout) -> bool:
        return (
            type(self).forward is Fast.forward
            and not is_watched(self)
            and self._is_proved(x, segmap)
        )

    def _is_proved(self, x, segmap):
        """Whether the proof covers this call in the present state. Recorded calls go to the own
        forward, and so do calls with bad arguments, because users know its errors.
        """
        try:
            self.check(x, segmap)
        except (TypeError, ValueError):
            return False
        if is_recorded(x) or batch_of(segmap) != x.shape[0] or is_empty(x) or is_empty(segmap):
            return False
        return self.spade_form.proof.holds(self, x, segmap)


class OwnForm(NamedTuple):
    """A call of a module's own forward in which a modulation can be fused: the sizes of its
    arguments, and how it is made.
    """

    norm_nc: int
    label_nc: int
    spatial_dims: int
    call: Called
    norms: frozenset[str]  # the kinds of norms whose modulation was fused
    proof: Proof | None = None
    apart: bool = False


class FusesOwn(Fast):
    """Runs the own forward with a modulation in it as one operation (fuse.py), in states for which
    this was proved and where it pays.
    """

    def _own(self, arguments, named):
        if not self._may_fuse(arguments, named):
            return super()._own(arguments, named)
        with fusing() as mode:
            result = super()._own(arguments, named)
        return mode.finish(result)

    @property
    def _own_form(self):
        return self.spade_form.own

    def _may_fuse(self, arguments, named):
        """Whether to fuse: never where hooks or tracers see what parts return."""
        own: OwnForm | None = self._own_form
        if own is None or own.proof is None or torch.compiler.is_compiling() or is_recorded():
            return False
        is_slow = "instance" in own.norms or ("batch" in own.norms and self.training)
        if not may_pay((*arguments, *named.values()), is_slow):
            return False
        dtype = dtype_of_weights(self)
        return (
            (self.training, torch.is_grad_enabled()) in own.proof.modes
            and (self.training, dtype, dtype, None) in own.proof.dtypes
            and is_called_plainly(self)
            and not watches_inside(self)
        )


class FastSPADE(FusesOwn, SpatiallyAdaptive):
    """A SPADE of another class, as `nn/spade.py` computes it."""

    def _is_proved(self, x, segmap):
        """Also False if parts that were opened have to be called as a whole, or those with the rows
        of labels at all, because something watches them: γ and β alone need not be what they
        return.
        """
        form = self.spade_form
        if form.by_label is not None and Known.of(self).by_label is None:
            return False
        if form.shared is None and form.inside and Known.of(self).pointwise is None:
            return False
        return super()._is_proved(x, segmap)

    def _fast(self, x, segmap):
        y, form = again(self.modulate(x, segmap)), self.spade_form
        called = form.call or Called()
        if called.appended is not None:
            rows, given = Known.of(self).by_label, dense(segmap, self)
            assert rows is not None  # otherwise the own forward runs
            others = resize(given[:, len(rows.gamma) :], x.shape[2:])
            y = torch.cat([y, part_of(self, called.appended)(others)], dim=1)
        if called.result is Mark.Y:
            return y
        given = dense(segmap, self).clone()  # a caller may write to its own
        make = functools.partial(_resized, given, x.shape[2:], form.apart)
        if torch.compiler.is_compiling():  # which leaves out what is not read
            return called.returned(y, make)
        shape = (*given.shape[:2], *x.shape[2:])
        return called.returned(y, lambda: Later(make, shape, given.dtype, given.device))


def _resized(condition, size, apart):
    return resize(condition, size, apart).clone()


class FastModulation(FusesOwn):
    """A module whose own forward runs, with its modulation as one operation where that pays."""

    def _is_proved(self, x, segmap):
        return False

    @property
    def _own_form(self):
        return self.spade_form

    def _fast(self, x, segmap):
        """The result for the arguments of the form's call."""
        with fusing(any_size=True) as mode:
            called = self.spade_form.call
            result = call_own(self.own_class.forward, self, self.call, x, segmap, called)
        return mode.finish(result)


class FastBlock(Fast, ResidualBlock):
    """A residual block of another class, as `nn/block.py` computes it."""

    def _fast(self, x, segmap):
        return self.compute(x, segmap)

    def _is_proved(self, x, segmap):
        """Also False if a part has hooks: they should see the calls that the own forward makes."""
        return not watches_inside(self) and super()._is_proved(x, segmap)


class Call:
    """The signature of a forward: x, a condition, and any further arguments."""

    def __init__(self, forward: Any) -> None:
        _, *parameters = inspect.signature(forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names: list[str] = []
        self.several = False
        # Each argument's default; None if it is required.
        self.neutral: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                self.several = len(self.names) == 1  # forward(x, *conditions)
            elif parameter.kind in positional:
                self.names.append(parameter.name)
            if parameter.kind in positional or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                is_required = parameter.default is inspect.Parameter.empty
                self.neutral[parameter.name] = None if is_required else parameter.default
        self.required = [
            parameter.name
            for parameter in parameters
            if parameter.name in self.neutral and parameter.default is inspect.Parameter.empty
        ][2 if not self.several else 1 :]

    def pair(self, arguments: tuple, named: dict, called: Called) -> tuple | None:
        """x and the condition, if every further argument has its default value or one that does not
        matter; else None.
        """
        if self.several:
            further = all(self._is_neutral(*given, called) for given in named.items())
            return arguments if len(arguments) == 2 and further else None
        if len(arguments) > len(self.names) or len(self.names) < 2:
            return None
        given = dict(zip(self.names, arguments))
        if given.keys() & named.keys():
            return None  # given twice, for which the own forward raises an error
        given.update(named)
        first, second = self.names[:2]
        if first not in given or second not in given:
            return None
        pair = given.pop(first), given.pop(second)
        if not all(self._is_neutral(*argument, called) for argument in given.items()):
            return None
        return pair[::-1] if called.swapped else pair

    def _is_neutral(self, name, value, called):
        if name not in self.neutral:
            return False
        if is_same(value, self.neutral[name]):
            return True
        if name not in called.ignores:
            return False
        leaves, structure = tree_flatten(value)
        has_tensors = all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        return has_tensors and structure == tree_structure(called.ignores[name])


def call_own(
    forward: Callable,
    module: nn.Module,
    call: Call,
    x: torch.Tensor,
    condition: torch.Tensor,
    called: Called,
    **further: Any,
) -> Any:
    """The result of a forward of a module, called as `called` says, without hooks."""
    given = AnyKey(condition) if called.keyed else condition
    pair = (given, x) if called.swapped else (x, given)
    named: dict[str, Any] = dict.fromkeys(call.required)
    named |= {name: defaultdict(lambda: defaultdict(type(None))) for name in called.caches}
    for name, channels in called.beside.items():
        repeats = -(-channels // x.shape[1])
        named[name] = torch.cat([x] * repeats, dim=1)[:, :channels] * 2
    return forward(module, *pair, **named | further)


class AnyKey(dict):
    """A dictionary with one value under every key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __missing__(self, key: Any) -> Any:
        return self.value


def watches_inside(module: nn.Module) -> bool:
    """Whether a part of a module has hooks, besides those that compute its weight."""
    waiting = list(module._modules.values())
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        if not all(isinstance(hook, MAKERS) for hook in hooks(part)):
            return True
        waiting += part._modules.values()
    return False


@functools.cache
def fast_class(kind: type[Fast], own_class: type[nn.Module]) -> type[Fast]:
    """The subclass of `own_class` with the fast forward."""
    attributes = {
        "kind": kind,
        "own_class": own_class,
        "class_marks": marks_of_class(own_class),
        "call": Call(own_class.forward),
    }
    metaclass: Any = type(own_class)
    return metaclass(own_class.__name__, (kind, own_class), attributes)


def _empty(kind, own_class):
    kind = fast_class(kind, own_class)
    return kind.__new__(kind)


def make_fast(module: nn.Module, kind: type[Fast], form: Form | OwnForm) -> None:
    """Gives a module its fast class, in place."""
    # mypy asks these classes for the hash of their instances.
    module.__class__ = fast_class(kind, type(module))  # type: ignore[arg-type]
    setattr(module, "spade_form", form)


def make_own(module: nn.Module) -> None:
    """Undoes `make_fast`."""
    module.__class__ = getattr(module, "own_class")
    module.__dict__.pop("spade_form", None)
