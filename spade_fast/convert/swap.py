"""Classes that are a stranger's but for their forward, which is the project's for every call that
was proved, and the stranger's for every other.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, SupportsIndex

import torch
import torch.fx
import torch.nn as nn

from ..layout import SemanticLayout
from ..nn.block import ResidualBlock
from ..nn.modules import (
    KINDS,
    MAKERS,
    NOT_MARKED,
    PLAIN,
    Same,
    first_weight,
    hooks,
    is_watched,
    mark_of,
    marks_of,
    marks_of_settings,
)
from ..nn.parts import Form, HasParts
from ..nn.spade import SpatiallyAdaptive, batch_of
from ..nn.unchanged import Each, Version, until_changed, views_inside
from ..recording import is_recorded


class Proof(NamedTuple):
    """What a module's own forward and the fast one were found to agree on. A forward may look at
    more than its arguments and weights: for anything else, the own forward is what there is.
    """

    marks: list  # the module's own attributes, and those of its parts
    children: tuple  # the kinds of its parts
    modes: tuple  # (training, whether gradients are recorded)
    dtypes: tuple  # (training, the weights', x's, autocast's or None)
    sizes: frozenset  # of a condition beside x, along an axis: "same", "larger", "smaller"

    def holds(self, module: "Fast", x: torch.Tensor, segmap: torch.Tensor) -> bool:
        """Whether it is of the module as it is now, with these arguments."""
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtypes = (module.training, first_weight(module).dtype, x.dtype, autocast)
        return (
            (module.training, torch.is_grad_enabled()) in self.modes
            and dtypes in self.dtypes
            and sizes_against(x, segmap) <= self.sizes
            and until_changed(module, is_as_proved, views_of_marks)
        )


def is_as_proved(module: "Fast") -> bool:
    """Whether a module is as it was when it was proved."""
    form = module.spade_form
    return (
        kinds_of_children(module) == form.proof.children
        and follows(module)
        and marks(module, form) == form.proof.marks
        and marks_of_class(module.own_class) == module.class_marks
    )


def views_of_marks(module: "Fast") -> Iterator[Iterable]:
    """Views of everything that `is_as_proved` looks at: comparing it takes far longer."""
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
    for value in chain.from_iterable(own.values() for own in entries):
        yield from views_inside(value, Version)


def _but_tensors(value):
    """A value; in place of a tensor, which a call may compute anew, its class."""
    return torch.Tensor if isinstance(value, torch.Tensor) else value


def marks(module: nn.Module, form: Form) -> list:
    parts = [marks_of_settings(part) for part in parts_of(module)]
    return [marks_of(module), parts, marks_of_wrappers(module, form)]


def kinds_of_children(module: nn.Module) -> tuple:
    """The own classes of a module's parts. A norm that is known may become another."""
    own = [getattr(type(child), "own_class", type(child)) for child in module._modules.values()]
    return tuple("norm" if kind in KINDS else kind for kind in own)


def marks_of_class(own_class: type[nn.Module]) -> list:
    """What a class and those that it is derived from say: a method may be exchanged."""
    return [
        (Same(kind), {name: mark_of(own) for name, own in vars(kind).items()})
        for kind in kinds_of(own_class)
    ]


def kinds_of(own_class: type[nn.Module]) -> tuple:
    """A class and those that it is derived from, up to torch's."""
    return own_class.__mro__[: own_class.__mro__.index(nn.Module)]


def marks_of_wrappers(module: nn.Module, form: Form) -> list:
    """The attributes of what parts of unknown classes have inside, where that is looked into."""
    return [(Same(own), marks_of(own)) for own in wrappers_in(module, form)]


def wrappers_in(module: nn.Module, form: Form) -> list[nn.Module]:
    """The modules with others in them, where parts of unknown classes are looked into."""
    if not form.inside:
        return []
    parts = (module.get_submodule(name) for name in (form.shared, form.gamma, form.beta))
    return [own for part in parts for own in part.modules() if own._modules]


def follows(module: nn.Module) -> bool:
    """Whether a module's parts are in its mode."""
    return all(child.training == module.training for child in parts_of(module))


def parts_of(module: nn.Module) -> list[nn.Module]:
    """A module's own parts, but for norms and SPADEs: at those is looked when they are used."""
    return [
        child
        for child in module._modules.values()
        if child is not None and type(child) not in KINDS and not isinstance(child, HasParts)
    ]


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are one object, or equal numbers, flags or names."""
    return one is other or (type(one) is type(other) and type(one) in PLAIN and one == other)


def sizes_against(x: torch.Tensor, segmap: torch.Tensor | SemanticLayout) -> set:
    """How a condition's size is beside x's, along each axis."""
    given = segmap.codes.shape[1:] if isinstance(segmap, SemanticLayout) else segmap.shape[2:]
    found = set()
    for own, wanted in zip(given, x.shape[2:]):
        found.add("same" if own == wanted else "larger" if own > wanted else "smaller")
    return found


def is_empty(x: torch.Tensor | SemanticLayout) -> bool:
    return 0 in (x.codes if isinstance(x, SemanticLayout) else x).shape


class Fast(nn.Module):
    """Marks the classes that `convert` makes. They have no name that could be imported: pickle and
    copy make them anew.
    """

    kind: type  # FastSPADE or FastBlock
    own_class: type[nn.Module]
    class_marks: list  # of the own class when this one was made
    call: "Call"
    spade_form: Form
    check: Callable[[torch.Tensor, torch.Tensor | SemanticLayout], None]
    _fast: Callable[[torch.Tensor, torch.Tensor | SemanticLayout], torch.Tensor]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        getstate: Any = getattr(self.own_class, "__getstate__", None)  # object's, or the stranger's
        is_own = getstate is not getattr(object, "__getstate__", None)
        return _empty, (self.kind, self.own_class), getstate(self) if is_own else self.__dict__

    def __init_subclass__(cls) -> None:
        """The stranger's is not asked: a registry of its classes is not for this one."""

    def _get_name(self) -> str:
        return f"Fast{self.own_class.__name__}"

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The own forward's result, of whatever it takes."""
        if isinstance(arguments, torch.fx.Proxy):
            raise TypeError(
                "torch.fx cannot trace a converted module by itself: revert(model) first, or trace"
                " the model that it is in"
            )
        if not isinstance(self, Fast):  # reverted while it was called
            return self.forward(*arguments, **named)
        pair = self.call.pair(arguments, named)
        if pair is not None and self._is_proved(*pair):
            return self._fast(*pair)
        dtype = first_weight(self).dtype
        given = [dense(argument, dtype) for argument in arguments]
        named = {name: dense(argument, dtype) for name, argument in named.items()}
        return self.own_class.forward(self, *given, **named)

    def is_open(self, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout) -> bool:
        return (
            type(self).forward is Fast.forward
            and not is_watched(self)
            and self._is_proved(x, segmap)
        )

    def _is_proved(self, x, segmap):
        """Whether this is a call, in a state, that the proof holds for. Calls that are recorded
        go to the own forward, and so do wrong ones: its users know its errors.
        """
        try:
            self.check(x, segmap)
        except (TypeError, ValueError):
            return False
        if is_recorded(x) or batch_of(segmap) != x.shape[0] or is_empty(x) or is_empty(segmap):
            return False
        return self.spade_form.proof.holds(self, x, segmap)


class FastSPADE(Fast, SpatiallyAdaptive):
    """A SPADE of another class, as `nn/spade.py` computes it."""

    def _fast(self, x, segmap):
        return self.modulate(x, segmap)


class FastBlock(Fast, ResidualBlock):
    """A residual block of another class, as `nn/block.py` computes it."""

    def _fast(self, x, segmap):
        return self.compute(x, segmap)

    def _is_proved(self, x, segmap):
        """Nor is it where somebody watches a part: the own forward calls them in its own way."""
        return not watches_inside(self) and super()._is_proved(x, segmap)


class Call:
    """How a forward is called: with x and a condition, and what else it takes."""

    def __init__(self, forward: Any) -> None:
        _, *parameters = inspect.signature(forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names: list[str] = []
        self.several = False
        # What each further argument is in a call without it; None where it has to be given.
        self.neutral: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                self.several = len(self.names) == 1  # forward(x, *conditions)
            elif parameter.kind in positional:
                self.names.append(parameter.name)
            if parameter.kind in positional or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                is_given = parameter.default is inspect.Parameter.empty
                self.neutral[parameter.name] = None if is_given else parameter.default
        self.required = [
            parameter.name
            for parameter in parameters
            if parameter.name in self.neutral and parameter.default is inspect.Parameter.empty
        ][2 if not self.several else 1 :]

    def pair(self, arguments: tuple, named: dict) -> tuple | None:
        """x and the condition, where the call has nothing else that says anything; else None."""
        if self.several:
            further = all(self._says_nothing(name, value) for name, value in named.items())
            return arguments if len(arguments) == 2 and further else None
        if len(arguments) > len(self.names) or len(self.names) < 2:
            return None
        given = dict(zip(self.names, arguments))
        if given.keys() & named.keys():
            return None  # twice, which the own forward says
        given.update(named)
        x, segmap = self.names[:2]
        if x not in given or segmap not in given:
            return None
        pair = given.pop(x), given.pop(segmap)
        return pair if all(self._says_nothing(*argument) for argument in given.items()) else None

    def _says_nothing(self, name, value):
        if name not in self.neutral:
            return False
        return is_same(value, self.neutral[name])


def watches_inside(module: nn.Module) -> bool:
    """Whether a part of a module has hooks, besides those that make its weight."""
    waiting = list(module._modules.values())
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        if not all(isinstance(hook, MAKERS) for hook in hooks(part)):
            return True
        waiting += part._modules.values()
    return False


def dense(argument: Any, dtype: torch.dtype) -> Any:
    """An argument as strangers know it: the condition itself in place of a layout."""
    return argument.to_segmap(dtype) if isinstance(argument, SemanticLayout) else argument


@functools.cache
def fast_class(kind: type[Fast], own_class: type[nn.Module]) -> type[Fast]:
    """The class that is own_class but for forward."""
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


def make_fast(module: nn.Module, kind: type[Fast], form: Form) -> None:
    """Gives a module its fast class, in place."""
    # mypy asks these classes for the hash of their instances.
    module.__class__ = fast_class(kind, type(module))  # type: ignore[arg-type]
    setattr(module, "spade_form", form)


def make_own(module: nn.Module) -> None:
    """Undoes `make_fast`."""
    module.__class__ = getattr(module, "own_class")
    module.__dict__.pop("spade_form", None)
