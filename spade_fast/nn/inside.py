"""What is inside a value, and so may change while the value stays the same object."""

import abc
import array
import functools
import logging
import pathlib
import re
import sys
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import Enum
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.nn as nn

NAME = "_spade_fast_found"  # the attribute of a module that holds its facts
OURS = frozenset((NAME, "spade_form"))  # attributes that this package adds to modules
PLAIN = (bool, int, float, complex, str, bytes, type(None))  # these are compared by value
MOST_INSIDE = 1000  # the most values inside an attribute that are compared in each call
TOO_MANY = "have too many values to be watched"
MOST_BYTES = 2**14  # the largest array that is compared in each call
numpy = sys.modules.get("numpy")  # torch has imported it where it is installed
# Nothing inside these, or inside what is derived from these, decides what a forward computes. Types
# and Python modules are here because a forward reaches them without an attribute as well.
CONSTANTS = (
    *(type, types.ModuleType, Enum, logging.Logger, pathlib.PurePath),
    *(torch._ops.OperatorBase, torch._ops.OpOverloadPacket),
    *(() if numpy is None else (numpy.dtype, numpy.number, numpy.bool_, numpy.ufunc)),
    getattr(torch.distributed, "ProcessGroup", Enum),
)
CONSTANT_TYPES = {
    *(type(Ellipsis), type(NotImplemented), range, re.Pattern, types.GenericAlias, types.UnionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo),
    *(types.FunctionType, types.CodeType, types.GetSetDescriptorType, types.MemberDescriptorType),
    *(types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType),
    *(type(functools.lru_cache(len)), type(threading.Lock()), type(threading.RLock())),
    type(vars(abc.ABC)["_abc_impl"]),
}
# What is inside values of these types cannot be exchanged: the names of the attributes with it.
FIXED = {
    types.MethodType: ("__self__", "__func__"),
    types.BuiltinFunctionType: ("__self__",),
    types.MethodWrapperType: ("__self__",),
    functools.partial: ("func", "args", "keywords"),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    slice: ("start", "stop", "step"),
}
MAPPINGS = (OrderedDict, defaultdict, dict, types.MappingProxyType)
SEQUENCES = (list, tuple, set, frozenset, deque)
CONTAINERS = (*MAPPINGS, *SEQUENCES)
ARRAYS = (*(() if numpy is None else (numpy.ndarray,)), array.array, bytearray)
# The first class of a type's MRO that is here says what is inside it besides attributes.
BASES = (*CONTAINERS, *ARRAYS, *FIXED, *PLAIN, nn.Module, object)
MANAGED = 1 << 4  # the flag of a type whose instances have their dictionary in front of them


class Unwatched(Exception):
    """Raised for a value that cannot be compared in each call. Its text follows "attributes"."""


class Met(NamedTuple):
    """A value that `walk` met, and everything that is directly inside it."""

    value: Any
    container: type | None = None  # the kind of container that it is
    live: list[Iterable] = []  # views of what may be exchanged in it
    size: int = 0  # the number of values directly inside it
    before: int | None = None  # where it was met before, if it was


def walk(value: Any, known: Collection[int] = ()) -> Iterator[Met]:
    """A value and everything inside it, each once. Raises Unwatched if there is too much of it, or
    if something in it is of a type of which it is not known where it keeps its values.

    known: the ids of values inside which nothing is met.
    """
    places: dict[int, tuple[int, Any]] = {}  # with the values, so that no others get their ids
    waiting, number = [value], 0
    while waiting:
        value = waiting.pop()
        if type(value) in PLAIN or isinstance(value, torch.Tensor):
            yield Met(value)
        elif id(value) in places:
            yield Met(value, before=places[id(value)][0])
        else:
            places[id(value)] = number, value
            container, fixed, live = (None, (), []) if id(value) in known else _inside(value)
            most = MOST_INSIDE - number - len(waiting)
            inside = list(islice(chain(fixed, *live), most + 1))
            if len(inside) > most:
                raise Unwatched(TOO_MANY)
            if container in (set, frozenset):  # whose order another process changes
                inside.sort(key=_name_of)
            yield Met(value, container, live, len(inside))
            waiting.extend(reversed(inside))
        number += 1


def _name_of(value):
    return repr(value) if type(value) in PLAIN else ""


def _inside(value: Any) -> tuple[type | None, Iterable, list[Iterable]]:
    """The kind of container that a value is; what is inside it and cannot be exchanged; and views
    of what can be.
    """
    kind = type(value)
    if kind in (list, tuple, dict):  # most values are of these
        return (kind, *_inside_base(value, kind))
    layout = _layout(kind)
    if layout == "constant":
        return None, (), []
    if layout == "unknown":
        raise Unwatched(f"hold what cannot be watched ({kind.__name__})")
    number, slots, has_attributes = layout
    base = BASES[number]
    fixed, live = _inside_base(value, base)
    if kind is not base:
        live.append(Each(_own_class if base is nn.Module else type, (value,)))
    if slots:
        live.append(Slots(value, slots))
    if has_attributes:
        live.append(Attributes(value) if base is nn.Module else Each(vars, (value,)))
    return base if base in CONTAINERS else None, fixed, live


def _layout(kind: type) -> Any:
    """Where the instances of a type keep their values: the number of its type in BASES, the names
    of its slots, and whether they have a dictionary; or "constant" or "unknown".
    """
    if kind in CONSTANT_TYPES or issubclass(kind, CONSTANTS) or kind.__module__ == "typing":
        return "constant"
    base = next(own for own in kind.__mro__ if own in BASES)
    slots = [
        own
        for of in kind.__mro__
        if "__slots__" in vars(of) or of is defaultdict
        for own in vars(of).values()
        if type(own) is types.MemberDescriptorType
    ]
    if not _shows_everything(kind, base, slots):
        return "unknown"
    has_attributes = kind.__dictoffset__ != 0 and kind not in FIXED
    return BASES.index(base), tuple(own.__name__ for own in slots), has_attributes


# This is torch.compiler.assume_constant_result without its import, which takes a second.
setattr(_layout, "_dynamo_marked_constant", True)


def _inside_base(value: Any, base: Any) -> tuple[Iterable, list[Iterable]]:
    """What is inside a value because of the type that its own is derived from: what cannot be
    exchanged, and views of what can be.
    """
    if base in MAPPINGS:
        return (), [base.keys(value), base.values(value)]
    if base in (tuple, frozenset):
        return base.__iter__(value), []
    if base in SEQUENCES:
        return (), [value if type(value) is base else Items(value, base)]
    if base in ARRAYS:
        return (), [Bytes(value)]
    return [getattr(value, name) for name in FIXED.get(base, ())], []


def _shows_everything(kind: type, base: type, slots: list) -> bool:
    """Whether a type's instances hold nothing besides what is inside its base, their slots, their
    dictionary and weak references to them: whether they take no more memory. `copyreg` asks the
    same before it takes an object's dictionary and slots for all of it.
    """
    if kind.__itemsize__ != base.__itemsize__:
        return False
    pointers = sum(own.__objclass__ not in base.__mro__ for own in slots)
    pointers += bool(
        kind.__dictoffset__ and not base.__dictoffset__ and not kind.__flags__ & MANAGED
    )
    pointers += kind.__weakrefoffset__ > 0 and not base.__weakrefoffset__
    return kind.__basicsize__ <= base.__basicsize__ + pointers * tuple.__itemsize__


def _own_class(module):
    """A module's class; a converted module's is the one that it had."""
    return getattr(type(module), "own_class", type(module))


class Each:
    """A view of a function's results for several things."""

    def __init__(self, of: Callable[[Any], object], things: Iterable) -> None:
        self._of, self._things = of, things

    def __iter__(self) -> Iterator[object]:
        return map(self._of, self._things)


class Attributes:
    """A view of a module's attributes, without those that this package adds."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __iter__(self) -> Iterator[object]:
        return chain.from_iterable(own for own in vars(self._module).items() if own[0] not in OURS)


class Items:
    """A view of what is inside a container, whatever its class makes of `__iter__`."""

    def __init__(self, container: Any, base: Any) -> None:
        self._container, self._base = container, base

    def __iter__(self) -> Iterator[object]:
        return self._base.__iter__(self._container)


class Unset:
    """Stands for the value of a slot that has none."""


class Slots:
    """A view of an object's slots."""

    def __init__(self, value: Any, names: tuple[str, ...]) -> None:
        self._value, self._names = value, names

    def __iter__(self) -> Iterator[object]:
        return (getattr(self._value, name, Unset) for name in self._names)


class Bytes:
    """A view of an array's numbers: the very same object as long as they are the same."""

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers
        self._seen: tuple | None = None

    def __iter__(self) -> Iterator[object]:
        if torch.compiler.is_compiling():
            return  # graphs have arrays as inputs: nothing is known of their numbers
        try:
            memory = memoryview(self._numbers)
        except (BufferError, TypeError, ValueError):
            raise Unwatched(
                "hold what cannot be watched (an array of other than numbers)"
            ) from None
        with memory:
            if memory.nbytes > MOST_BYTES:
                raise Unwatched(TOO_MANY)
            if "O" in memory.format:
                raise Unwatched("hold what cannot be watched (an array of objects)")
            now = memory.format, memory.shape, memory.tobytes()
        if now != self._seen:
            self._seen = now
        yield self._seen
