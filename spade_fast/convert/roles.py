"""Which of a module's parts measures x, which makes the factor and which the summand, and which
argument is x: found by what a forward does with the outputs of the parts, whatever their names.

The forward runs once on small tensors, with random numbers in place of each part's output. In what
it returns, those numbers show how it combined them.
"""

import warnings
from collections.abc import Iterable, Iterator
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

from ..nn.modules import CONVOLUTION_TYPES, Convolution
from ..nn.pixels import resize
from .copies import Values, copy_of, trying
from .swap import Call, Called, Mark, call_own

# Sizes of x and of a condition. Three axes begin with an odd number of frames.
PIXELS = (5, 4, 4)
SIZES = ((3, 2, 2), PIXELS, (9, 7, 5))
EXACT = 1e-10  # the distance between two computations of one formula in float64, relative to y


class Unlike(Exception):
    """The reason why a module is left as it was."""


class OwnForwardFails(Unlike):
    """The module's own forward fails on a probe."""


class Roles(NamedTuple):
    """The names of a module's parts by what they do, and how the module is called."""

    norm: str
    gamma: str
    beta: str
    shared: str | None
    pad: str | None
    added: str | None
    plus_one: bool
    apart: bool
    halves: tuple[int, int] | None
    channels: int
    label_nc: int
    call: Called


class Ran(NamedTuple):
    """A call of a part: the tensors that it was given, and those that stood for its output."""

    name: str
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def parts_by_name(module: nn.Module) -> dict[str, nn.Module]:
    """A module's children by name; in place of a ModuleList, the modules in it."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found |= {f"{name}.{own}": part for own, part in parts_by_name(child).items()}
        else:
            found[name] = child
    return found


def convolution_of(part: nn.Module) -> Convolution | None:
    """The convolution in a part, or None if there are several or none."""
    found = [own for own in part.modules() if isinstance(own, CONVOLUTION_TYPES)]
    return found[0] if len(found) == 1 else None


def convolutions_of(module: nn.Module) -> dict[str, Convolution]:
    """The parts of a module that contain one convolution, and those convolutions."""
    found = {name: convolution_of(part) for name, part in parts_by_name(module).items()}
    return {name: own for name, own in found.items() if own is not None}


def dimensions_of(convolution: Convolution) -> int:
    """The number of its spatial dimensions."""
    return len(convolution.kernel_size)


def pairs(convolutions: Iterable[Convolution]) -> list[tuple[int, int]]:
    """The channels, before and after, that two or more convolutions have in common."""
    channels = [(own.in_channels, own.out_channels) for own in convolutions]
    return list(dict.fromkeys(pair for pair in channels if channels.count(pair) > 1))


def halved(convolutions: Iterable[Convolution], normalised: set[int]) -> list[tuple[int, int]]:
    """The channels before, and half of those after, convolutions that may make both γ and β for a
    norm of these channels.
    """
    channels = [(own.in_channels, own.out_channels) for own in convolutions]
    return [(before, after // 2) for before, after in channels if after / 2 in normalised]


def normalised_channels(module: nn.Module) -> set[int]:
    """The numbers of channels that a module's norms say they have."""
    return {
        getattr(child, name)
        for child, name in product(module.children(), ("num_features", "num_channels"))
        if hasattr(child, name)
    }


def find_roles(module: nn.Module) -> Roles:
    """The roles of a module's parts. Raises Unlike if its forward does not modulate a norm of x."""
    convolutions = convolutions_of(module)
    call, failure = Call(type(module).forward), None
    dims = max(map(dimensions_of, convolutions.values()), default=0)
    with trying(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that are tried out
        values = Values(module)
        for channels, label_nc, size, swapped in _attempts(module, convolutions):
            try:
                copy = copy_of(module, values(torch.float64))
                x, condition = pair = random_pair(module, dims, channels, label_nc, size)
                ran = trace(copy, parts_by_name(copy))
                called = Called(swapped)
                result = call_own(type(copy).forward, copy, call, x, condition, called)
            except Exception as error:  # the own forward may raise anything
                failure = failure or OwnForwardFails(
                    f"its own forward fails on x {list(x.shape)} and a condition"
                    f" {list(condition.shape)}: {type(error).__name__}: {error}"
                )
                continue
            roles = _roles(pair, swapped, ran, result, convolutions)
            ignores = _ignored(module, values, call, pair, roles.call)
            return roles._replace(call=roles.call._replace(ignores=ignores))
    raise failure or Unlike("it has no two convolutions for a factor and a summand of one shape")


def _attempts(module: nn.Module, convolutions: dict[str, Convolution]) -> Iterator[tuple]:
    """The channels of x and of the condition, the condition's size, and whether it is the first
    argument: the probable ones first.
    """
    found = list(convolutions.values())
    before = list(dict.fromkeys(own.in_channels for own in found))
    normalised = normalised_channels(module)
    for hidden, channels in dict.fromkeys([*pairs(found), *halved(found, normalised)]):
        if normalised and channels not in normalised:
            continue
        # A convolution that is not of the pair has the condition before it, if there is one.
        others = [number for number in before if number != hidden]
        yield from product([channels], [*others, hidden], SIZES, (False, True))


def random_pair(
    module: nn.Module, dims: int, channels: int, label_nc: int, size: tuple
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random x and a random condition of this size."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"dtype": torch.float64, "device": next(module.parameters()).device}
    x = torch.randn(2, channels, *PIXELS[:dims], **given) + 1
    return x, torch.randn(2, label_nc, *size[:dims], **given)


def trace(module: nn.Module, parts: dict[str, nn.Module]) -> list[Ran]:
    """Has random numbers stand for the outputs of a module's parts from now on. Returns the list to
    which each call of a part is added.
    """
    ran: list[Ran] = []
    for name, part in parts.items():
        if type(part) not in (nn.ModuleDict, nn.ModuleList):
            part.__dict__["forward"] = _Traced(name, part, ran)
    return ran


class _Traced:
    """Stands for a part's forward, and notes its calls."""

    def __init__(self, name: str, part: nn.Module, ran: list[Ran]) -> None:
        self.name, self.part, self.ran = name, part, ran

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        inputs = [tensor.clone() for tensor in _tensors((arguments, named))]
        result = tree_map(_noise, type(self.part).forward(self.part, *arguments, **named))
        # Copies, because a forward may write into what it was given.
        outputs = [tensor.clone() for tensor in _tensors(result)]
        self.ran.append(Ran(self.name, inputs, outputs))
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _noise(leaf):
    floats = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return torch.randn_like(leaf) if floats else leaf


def _is_same(one, other):
    if one.shape != other.shape or not one.numel():
        return False
    return bool((one - other).abs().max() <= EXACT * other.abs().max())


def _roles(pair, swapped, ran, result, convolutions):
    """The roles, from one traced run of the own forward."""
    leaves, spec = tree_flatten(result)
    found = _modulation(ran, leaves, pair, convolutions)
    place, norm, added, x, gamma, beta, plus_one, halves = found
    if x is not pair[0]:
        pair, swapped = (x, pair[0]), not swapped
    if not _is_same(gamma.inputs[0], beta.inputs[0]):
        raise Unlike(f"{gamma.name} and {beta.name} are not given the same")
    hidden, pad, shared = gamma.inputs[0], None, None
    before = _that_returned(hidden, ran)
    if before is not None and before.name not in convolutions:
        pad, before = before, _that_returned(before.inputs[0], ran)
    if before is not None:
        shared = before
    first = gamma if shared is None else shared
    if convolutions[first.name].in_channels != pair[1].shape[1]:
        raise Unlike(
            f"{first.name} is given neither the condition nor what another of its parts returns"
        )
    given, size = first.inputs[0], x.shape[2:]
    apart = False
    if len(size) == 3 and not _is_same(resize(pair[1], size), given):
        apart = pair[1].shape[2] > 1 and _is_same(resize(pair[1], size, apart=True), given)
    marked = [Mark.CONDITION if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    marked[place] = Mark.Y
    shared, pad, added = (None if own is None else own.name for own in (shared, pad, added))
    called = Called(swapped, result=tree_unflatten(marked, spec))
    names = (norm.name, gamma.name, beta.name, shared, pad, added)
    return Roles(*names, plus_one, apart, halves, x.shape[1], pair[1].shape[1], called)


def _modulation(ran, leaves, pair, convolutions):
    """Where y = n·(1 + a) + b or n·a + b is among the leaves of a result, the calls of the parts
    that returned n, a and b, whether there is a 1, and which halves a and b are of what one call
    returned, or None.
    """
    tensors = [(place, y) for place, y in enumerate(leaves) if isinstance(y, torch.Tensor)]
    outputs = [(own, out) for own in ran if own.name in convolutions for out in own.outputs]
    candidates = [(*one, *other, None) for one, other in permutations(outputs, 2)]
    for (own, out), halves in product(outputs, permutations(range(2))):
        if out.dim() > 1 and out.shape[1] % 2 == 0:
            both = out.chunk(2, dim=1)
            candidates.append((own, both[halves[0]], own, both[halves[1]], halves))
    for norm, added, x in _measuring(ran, pair, convolutions):
        normalised = norm.outputs[0]
        for (place, y), (gamma, a, beta, b, halves) in product(tensors, candidates):
            if not y.shape == normalised.shape == a.shape == b.shape:
                continue
            for plus_one in (True, False):
                if _is_same(y, normalised * (a + plus_one) + b):
                    return place, norm, added, x, gamma, beta, plus_one, halves
    raise Unlike(
        "its own forward does not return n · (1 + a) + b or n · a + b, where n is a part's output"
        " for x, and a and b are outputs of parts with a convolution"
    )


def _measuring(ran, pair, convolutions):
    """The calls of parts that may be the norm: they have no convolution, and are given an argument,
    to which the output of another part may have been added. Yields the call, that part's call or
    None, and the argument.
    """
    for norm in ran:
        if norm.name in convolutions or not norm.inputs or not norm.outputs:
            continue
        for x in pair:
            if _is_same(norm.inputs[0], x):
                yield norm, None, x
            for other in ran:
                for output in other.outputs if other.name in convolutions else ():
                    if output.shape == x.shape and _is_same(norm.inputs[0], x + output):
                        yield norm, other, x


def _that_returned(tensor, ran):
    """The call of the part that returned a tensor, or None."""
    return next((own for own in ran if any(_is_same(tensor, out) for out in own.outputs)), None)


def _ignored(module, values, call, pair, called):
    """The optional arguments whose values do not matter if they have the structure of something
    that the own forward returns beside y: a cache that is passed on but not read.
    """
    if not isinstance(called.result, tuple):
        return {}

    def run(x, condition, **further):
        copy = copy_of(module, values(torch.float64))
        return call_own(type(copy).forward, copy, call, x, condition, called, **further)

    try:
        result = run(*pair)
        # Another call's results, of another size.
        earlier = run(*(torch.cat([tensor, tensor], dim=2) for tensor in pair))
    except Exception:  # it does not take that size
        return {}
    found = {}
    for name, default in call.neutral.items():
        if default is not None or name in (*call.names[:2], *call.required):
            continue
        for kept, marked in zip(earlier, called.result):
            try:
                again = run(*pair, **{name: kept})
            except Exception:  # not what this argument is for
                continue
            same = tree_structure(again) == tree_structure(result)
            tensors = zip(_tensors(again), _tensors(result))
            if same and marked is not Mark.Y and all(torch.equal(*both) for both in tensors):
                found[name] = marked
    return found
