"""Whether a converted module still has what it had when all of its marks were compared last: the
same objects, one by one. That is asked in each call, and to compare marks takes far longer.
"""

import weakref
from collections.abc import Iterable, Mapping
from operator import is_, itemgetter

import torch
import torch.nn as nn

from ..nn.modules import CONTAINERS, MOST_MARKED, NOT_MARKED, contents_of


class Seen:
    """The objects that a module had. Its copy has seen nothing: other modules have others."""

    def __init__(self) -> None:
        self._objects: Objects | None = None

    def see(self, module: nn.Module, *others: Iterable) -> None:
        self._objects = Objects(module, *others)

    def has_the_same(self, module: nn.Module) -> bool:
        objects = self._objects  # another thread may exchange it
        return objects is not None and objects.are_those_of(module)

    def __deepcopy__(self, memo: dict) -> "Seen":
        return Seen()

    def __reduce__(self) -> tuple:
        return Seen, ()


class Objects:
    """The objects that decide the marks of a module, and where each of them was.

    parts: those of its children whose attributes count, but for tensors; wrappers: modules inside
    of them of which all counts; kinds: the module's classes.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Iterable[nn.Module],
        wrappers: Iterable[nn.Module],
        kinds: Iterable[type],
    ) -> None:
        self.module = weakref.ref(module)  # which holds this
        self.own = Attributes(vars(module), counts_tensors=True)
        self.attributes = [(vars(part), Attributes(vars(part), False)) for part in parts]
        self.attributes += [(vars(own), Attributes(vars(own), True)) for own in wrappers]
        self.dictionaries: list[tuple[Mapping, list]] = [
            (vars(kind), _listed(vars(kind))) for kind in kinds
        ]
        marked = [value for kind in kinds for value in vars(kind).values()]
        for own in (module, *wrappers):
            self.dictionaries += [(of, _listed(of)) for of in (own._modules, own._buffers)]
            marked += [value for name, value in vars(own).items() if name not in NOT_MARKED]
            marked += own._buffers.values()
        for part in parts:
            marked += [value for name, value in vars(part).items() if name not in NOT_MARKED]
        self.types = list(map(type, module._modules.values()))
        self.containers, self.versions = _what_changes(marked)

    def are_those_of(self, module: nn.Module) -> bool:
        return (
            self.module() is module
            and self.own.are_in(vars(module))
            and _are_same(map(type, module._modules.values()), self.types)
            and all(attributes.are_in(own) for own, attributes in self.attributes)
            and all(_are_same(_listed(own), objects) for own, objects in self.dictionaries)
            and all(
                _are_same(contents_of(own, MOST_MARKED) or (), objects)
                for own, objects in self.containers
            )
            and all(tensor._version == version for tensor, version in self.versions)
        )


class Attributes:
    """The objects that a module's dictionary has, by name."""

    def __init__(self, own: dict, counts_tensors: bool) -> None:
        names = [name for name in own if name != "spade_form"]  # which holds this
        self.length, self.uncounted = len(own), []
        if not counts_tensors:
            self.uncounted = [name for name in names if isinstance(own[name], torch.Tensor)]
            names = [name for name in names if name not in self.uncounted]
        self.get = itemgetter(*names)
        self.objects = self.get(own)

    def are_in(self, own: dict) -> bool:
        try:
            return (
                len(own) == self.length
                and all(map(is_, self.get(own), self.objects))
                and all(isinstance(own[name], torch.Tensor) for name in self.uncounted)
            )
        except KeyError:
            return False


def _listed(dictionary):
    return [*dictionary, *dictionary.values()]


def _are_same(some, others):
    some = list(some)
    return len(some) == len(others) and all(map(is_, some, others))


def _what_changes(values):
    """What changes and stays the same object, among values and what they have in them: containers
    with their contents, tensors with their versions.
    """
    containers, versions, known, waiting = [], [], set(), list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor) and not value.is_inference():
            versions.append((value, value._version))
        elif type(value) in CONTAINERS and id(value) not in known:
            known.add(id(value))
            inside = contents_of(value, MOST_MARKED) or []
            waiting += inside
            if type(value) is not tuple:
                containers.append((value, inside))
    return containers, versions
