"""Facts about a module, kept until anything in the module is replaced."""

import argparse
import operator
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, compress
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules import module as calls

NAME = "_spade_fast_found"  # the attribute of a module that holds its facts
_ENTRIES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
MOST_INSIDE = 1000  # the most values in an attribute's containers that are compared
_IN_EVERY_MODULE = frozenset(vars(nn.Module()))
_of_part = tuple(map(operator.attrgetter, ("__class__", "__class__.forward", "__dict__")))
_END = object()


def until_changed(module: nn.Module, find: Callable[[nn.Module], Any]) -> Any:
    """find(module), or its earlier result if everything that it can see is unchanged: the module's
    parts, their classes, attributes, hooks, parameters and buffers are the very same objects. The
    caller has to check whether their values have changed.
    """
    traced = torch._C._get_tracing_state() is not None  # a trace would record the comparisons
    if traced or torch.compiler.is_compiling() or calls._has_any_global_hook():
        return find(module)
    found = module.__dict__.get(NAME)
    if found is None:
        found = module.__dict__[NAME] = Found()
    elif found.owner is not None and found.owner() is not module:
        return find(module)  # a replica or shallow copy, which has its module's attributes
    elif found.holds(module):
        return found.value
    found.keep(module, find)
    return found.value


class Found:
    """What was found about one module. It holds the objects that it saw, so that no others can be
    allocated there, but not the module itself. In copies and pickles of the module it is empty.
    """

    def __init__(self) -> None:
        self.owner: weakref.ref[nn.Module] | None = None
        self.value: Any = None
        self._parts: list[nn.Module] = []
        self._views: list[Iterable] = []
        self._others: list[bool] = []
        self._seen: list[object] = [None]

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is unchanged."""
        try:
            return all(map(operator.is_, self._now(module), self._seen))
        except RuntimeError:  # another thread is changing it
            return False

    def keep(self, module: nn.Module, find: Callable[[nn.Module], Any]) -> None:
        new = Found()
        new._parts = list(module.modules())[1:]
        new._views = list(views_inside_of_module(module))
        for part in new._parts:
            new._views += (vars(part), vars(part).values(), *views_inside_of_module(part))
        new._others = [name != NAME for name in module.__dict__]
        new._seen = list(new._now(module))
        new.value, new.owner = find(module), weakref.ref(module)
        self.__dict__.update(new.__dict__)

    def _now(self, module: nn.Module) -> Iterator[object]:
        """Every object that the finding depends on. The views show the present state."""
        own = module.__dict__
        return chain(
            (type(module), type(module).forward),
            own,
            compress(own.values(), self._others),
            *(map(of, self._parts) for of in _of_part),
            chain.from_iterable(self._views),
            (_END,),  # differs if the sequence became shorter or longer
        )

    def __deepcopy__(self, memo: dict) -> "Found":
        return Found()

    def __reduce__(self) -> tuple:
        return Found, ()


def views_inside_of_module(module: nn.Module) -> Iterator[Iterable]:
    """Views of what may change inside a module's attributes."""
    for name, value in module.__dict__.items():
        if name in _ENTRIES:
            yield from (value, value.values())
        elif name not in _IN_EVERY_MODULE and not isinstance(value, torch.Tensor):
            yield from views_inside(value)


def views_inside(value: Any) -> Iterator[Iterable]:
    """Views of what may change inside one attribute, whose containers may contain themselves."""
    waiting, taken = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if type(value) in (argparse.Namespace, types.SimpleNamespace):
            value = vars(value)
        is_dict = type(value) is dict
        if isinstance(value, torch.Tensor) or len(waiting) > MOST_INSIDE:
            yield Another()
        elif (is_dict or type(value) in (list, tuple)) and id(value) not in taken:
            taken.add(id(value))
            yield value
            if is_dict:
                yield value.values()
            waiting += value.values() if is_dict else value


class Another:
    """A view that never counts as unchanged: of a tensor, whose numbers may change, or of too many
    values to compare in each call.
    """

    def __iter__(self) -> Iterator[object]:
        yield object()
