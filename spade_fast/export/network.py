"""The network that is exported: a copy of the model with standing modules in place of its SPADEs.

The model runs once on the example, while it is watched: that is the truth which the copy has to
reach, and it shows which SPADEs see one condition at one size.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.weak import WeakTensorKeyDictionary

from ..convert import convert
from ..convert.recognise import looks_like_spade
from ..convert.swap import Call, Called
from ..layout import SemanticLayout
from ..nn.choice import window_mode
from ..nn.modules import CONVOLUTION_TYPES, MAKERS, hooks, is_watched
from ..nn.parts import HasParts, Known
from ..nn.upsampled import repeats
from .layers import (
    WINDOWS_FROM,
    Following,
    LookedUp,
    OfFeatures,
    OfLabels,
    Seen,
    Shared,
    Standing,
    can_look_up,
)

LABELS, TENSOR = object(), object()  # arguments that are inputs
WAYS = (
    "at the distinct windows of labels",
    "at the pixels of labels",
    "from features before their enlargement",
    "from features",
    "as they were",
)
SQUARES = 12  # along each axis of a drawn label map


class Labels(NamedTuple):
    """How label maps stand for a condition."""

    classes: int  # without "don't care"
    dont_care: int | None
    instances: bool
    shift: int = 0  # added to any label but dont_care

    @property
    def channels(self) -> int:
        """The condition's channels, without the edges of instances."""
        return self.classes + (self.dont_care is not None)

    def palette(self) -> torch.Tensor:
        """The condition's vector for each code: class + channels · (1 at an edge, else 0)."""
        eye = torch.eye(self.channels)
        if not self.instances:
            return eye
        edges = torch.arange(2.0).repeat_interleave(self.channels)[:, None]
        return torch.cat([eye.repeat(2, 1), edges], 1)

    def drawn(self, images: int, size: Sequence[int]) -> list[torch.Tensor]:
        """Label maps of a few rectangles, and instance maps if there are any."""
        random = torch.Generator().manual_seed(0)
        maps = []
        for highest in (self.channels, 5)[: 1 + self.instances]:
            numbers = torch.randint(highest, (images, *[SQUARES] * len(size)), generator=random)
            for dim, length in enumerate(size, start=1):
                wide = max(2, -(-length // SQUARES))
                numbers = numbers.repeat_interleave(wide, dim).narrow(dim, 0, length)
            maps.append(numbers)
        labels = maps[0] - self.shift
        if self.dont_care is not None:
            labels = torch.where(maps[0] == self.classes, self.dont_care, labels)
        return [labels, *maps[1:]]

    def condition(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """The condition that label maps stand for, as the network itself takes it."""
        labels, instances = maps[0] + self.shift, maps[1] if self.instances else None
        if self.dont_care is not None:
            labels = torch.where(maps[0] == self.dont_care, self.classes, labels)
        return SemanticLayout.from_labels(labels, self.channels, instances).to_segmap()


class Codes(nn.Module):
    """Label maps to a map of codes. A label that is no class is an error of the index_select,
    ONNX's Gather, that looks it up.
    """

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels
        self.classes = nn.Buffer(torch.arange(labels.channels))

    def forward(self, labels: torch.Tensor, instances: torch.Tensor | None = None) -> torch.Tensor:
        own = self.labels
        codes = labels + own.shift
        codes = torch.where((codes >= 0) & (codes < own.classes), codes, own.channels)
        if own.dont_care is not None:
            codes = torch.where(labels == own.dont_care, own.classes, codes)
        codes = self.classes.index_select(0, codes.flatten()).view(labels.shape)
        if instances is not None:
            codes = codes + own.channels * edges_of(instances)
        return codes[:, None].float()


def edges_of(instances: torch.Tensor) -> torch.Tensor:
    """1 where a direct neighbour along any axis has another number, else 0: int64 [N, *spatial]."""
    edges = torch.zeros_like(instances)
    for dim in range(1, instances.dim()):
        length = instances.shape[dim] - 1
        differ = instances.narrow(dim, 0, length) != instances.narrow(dim, 1, length)
        before = [0, 0] * (instances.dim() - 1 - dim)
        for sides in ([1, 0], [0, 1]):
            edges = edges + nn.functional.pad(differ.long(), [*before, *sides])
    return edges.clamp(max=1)


def arguments_of(
    places: Sequence[Any], inputs: Sequence[torch.Tensor], condition: Any
) -> list[Any]:
    """A model's arguments: the inputs in their places, and in that of label maps what `condition`
    makes of them.
    """
    tensors = sum(place is TENSOR for place in places)
    waiting, arguments = list(inputs), []
    for place in places:
        if place is LABELS:
            count = len(inputs) - tensors
            arguments.append(condition(*waiting[:count]))
            waiting = waiting[count:]
        else:
            arguments.append(waiting.pop(0) if place is TENSOR else place)
    return arguments


class Network(nn.Module):
    """The whole network: its inputs to the model's arguments to the model's result."""

    def __init__(
        self, model: nn.Module, places: Sequence[Any], codes: Codes | None, shared: Shared
    ) -> None:
        super().__init__()
        self.model, self.places, self.codes, self.shared = model, places, codes, shared

    def forward(self, *inputs: torch.Tensor) -> Any:
        self.shared.kept.clear()
        result = self.model(*arguments_of(self.places, inputs, self.codes))
        self.shared.kept.clear()
        return result

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        """`forward` with values, before any export."""
        with torch.no_grad(), window_mode("never"):  # a map of codes is not the condition itself
            result = self(*inputs)
        for name, module in list(self.named_modules()):
            if isinstance(module, LookedUp) and not module.has_looked_up:
                self.set_submodule(name, module.conv)  # it sees something else than label maps
        return result


class Itself:
    """The model itself in eval mode, which takes the inputs of its network."""

    def __init__(self, model: nn.Module, network: Network, labels: Labels | None) -> None:
        self.model, self.places, self.labels = copy_of(model).eval(), network.places, labels

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        """The model's own result."""
        with torch.no_grad(), window_mode("never"):
            return self.model(*arguments_of(self.places, inputs, self.condition))

    def condition(self, *maps: torch.Tensor) -> torch.Tensor:
        """The condition that label maps stand for."""
        assert self.labels is not None
        return self.labels.condition(maps).to(next(self.model.parameters()))


def network_of(
    model: nn.Module,
    arguments: Sequence[Any],
    labels: Labels | None,
    windows: bool,
    any_size: bool = False,
    kernels: bool = False,
    gathers: bool = False,
) -> tuple[Network, list[torch.Tensor], Any]:
    """The network to export, its inputs for this example, and the model's own result.

    arguments: the model's; a SemanticLayout stands for label maps, as `labels` describes.
    any_size: whether sizes may differ from the example's.
    kernels, gathers: see `Shared`.
    """
    places: list[Any] = []
    inputs: list[torch.Tensor] = []
    given: list[Any] = []
    own = copy_of(model).eval().requires_grad_(False)
    like = next(own.parameters())
    for argument in arguments:
        if isinstance(argument, SemanticLayout):
            assert labels is not None
            maps = labels.drawn(len(argument), argument.codes.shape[1:])
            places.append(LABELS)
            given.append(labels.condition(maps).to(like))
            inputs += [one.to(like.device) for one in maps]
        else:
            is_tensor = isinstance(argument, torch.Tensor)
            places.append(TENSOR if is_tensor else argument)
            given.append(argument)
            inputs += [argument] if is_tensor else []
    codes = None if labels is None else Codes(labels).to(like.device)
    network = Network(own, places, codes, Shared(kernels, gathers))
    with torch.no_grad():
        truth, seen, follow = watched(own, given)
        if any_size:
            seen = {name: [at_any_size(call) for call in calls] for name, calls in seen.items()}
        convert(own, blocks=False)
        fold(own)
        replace(network, seen, follow, labels, windows, like)
    return network, inputs, truth


def copy_of(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model."""
    memo = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            # Not a parameter, but computed from some in the previous call, so not copied as such.
            if isinstance(hook, MAKERS) and isinstance(vars(module).get(hook.name), torch.Tensor):
                made = vars(module)[hook.name]
                memo[id(made)] = made.detach().clone()
    return copy.deepcopy(model, memo)


def fold(model: nn.Module) -> None:
    """Computes, once for all, weights that spectral norm, weight norm or a parametrization make."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrizations: Any = module.parametrizations
            for name in list(parametrizations):
                parametrize.remove_parametrizations(module, name)


def watched(
    model: nn.Module, arguments: Sequence[Any]
) -> tuple[Any, dict[str, list[Seen | None]], dict[str, str]]:
    """The model's result; by the name of each SPADE how it was called; and by the name of a
    convolution that took what a SPADE returned, in its latest call, the name of that SPADE.
    """
    seen: dict[str, list[Seen | None]] = {}
    follow: dict[str, str] = {}
    returned = WeakTensorKeyDictionary()
    groups: list[tuple] = []

    def watching(name, module):
        call = Call(getattr(type(module), "own_class", type(module)).forward)

        def watch(module, given, named):
            pair = call.pair(given, named, Called())
            if pair is None or not all(isinstance(one, torch.Tensor) for one in pair):
                seen.setdefault(name, []).append(None)
                return
            x, condition = pair
            size = tuple(x.shape[2:])
            # The conditions are held, so that no two have one identity.
            known = [one is condition and size == other for one, other in groups]
            if True not in known:
                groups.append((condition, size))
                known.append(True)
            factor = repeats(condition, size) if condition.dim() == x.dim() else 1
            seen.setdefault(name, []).append(Seen(known.index(True), math.prod(size), factor))

        return watch

    def returning(name):
        def note(module, given, y):
            if isinstance(y, torch.Tensor):
                returned[y] = name, y._version

        return note

    def following(name):
        def note(module, given):
            if given and isinstance(given[0], torch.Tensor) and given[0] in returned:
                spade, version = returned[given[0]]
                if given[0]._version == version:  # as the SPADE returned it
                    follow[name] = spade

        return note

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, HasParts) or looks_like_spade(module):
            watch = watching(name, module)
            handles.append(module.register_forward_pre_hook(watch, with_kwargs=True))
            handles.append(module.register_forward_hook(returning(name)))
        elif isinstance(module, CONVOLUTION_TYPES):
            handles.append(module.register_forward_pre_hook(following(name)))
    try:
        with window_mode("never"):  # so that a condition stays the tensor that it is
            return model(*arguments), seen, follow
    finally:
        for handle in handles:
            handle.remove()


def at_any_size(call: Seen | None) -> Seen | None:
    """A call without a factor by which F.interpolate repeats the pixels of some sizes alone: it
    multiplies by a rounded quotient, which is exact for powers of two.
    """
    if call is None or call.factor & (call.factor - 1) == 0:
        return call
    return call._replace(factor=1)


def can_stand(spade: HasParts) -> bool:
    """Whether a `Standing` can be in the place of a SPADE."""
    form = spade.spade_form
    known = not is_watched(spade) and Known.of(spade).convolutions is not None
    return known and form.added is None and form.call in (None, Called())


def replace(
    network: Network,
    seen: dict[str, list[Seen | None]],
    follow: dict[str, str],
    labels: Labels | None,
    windows: bool,
    like: torch.Tensor,
) -> None:
    """Puts standing modules in the place of SPADEs and, for label maps, of other convolutions."""
    palette = None if labels is None else labels.palette().to(like.device)
    groups: dict[tuple, list[OfLabels]] = {}
    made: dict[int, Standing] = {}  # by the id of the SPADE: it may have two names
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if id(module) not in made:
            call = once(name, seen.get(name.removeprefix("model").removeprefix("."), []))
            if call is None or not isinstance(module, HasParts) or not can_stand(module):
                continue
            if palette is None:
                made[id(module)] = OfFeatures(module, call, network.shared)
            else:
                pays = windows and call.pixels >= WINDOWS_FROM
                stands = OfLabels(module, call, network.shared, palette, pays)
                key = (call.group, stands.taps, str(stands.activations), way_of(stands))
                stands.group = groups.setdefault(key, [])
                stands.group.append(stands)
                made[id(module)] = stands
        network.set_submodule(name, made[id(module)])
    for name, of in follow.items():
        conv, spade = (network.get_submodule(f"model.{one}".rstrip(".")) for one in (name, of))
        following = Following.of(conv, spade)
        if following is not None:
            network.set_submodule(f"model.{name}", following)
    for standing in made.values():
        standing.prepare()
    if palette is None:
        return
    for name, module in list(network.named_modules()):
        if any(name.startswith(f"{other}.") for other in names_of(network, Standing)):
            continue
        if type(module) not in CONVOLUTION_TYPES or hooks(module):
            continue
        if module.in_channels == palette.shape[1] and can_look_up(module):
            network.set_submodule(name, LookedUp(module, palette))


def once(name: str, calls: Sequence[Seen | None]) -> Seen | None:
    """The one way in which a SPADE is called. If there are several, one that shares nothing with
    other SPADEs; None if it is not called, or with more than x and a condition.
    """
    if not calls or None in calls:
        return None
    first, *others = [call for call in calls if call is not None]
    if all(call == first for call in others):
        return first
    factor = first.factor if all(call.factor == first.factor for call in others) else 1
    return Seen(name, min(call.pixels for call in (first, *others)), factor)


def names_of(network: nn.Module, kind: type) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, kind)]


def ways_of(network: nn.Module) -> dict[str, int]:
    """How many SPADEs compute γ and β in each way."""
    found = [module for module in network.modules() if isinstance(module, (Standing, HasParts))]
    return {way: len([one for one in found if way_of(one) == way]) for way in WAYS}


def way_of(spade: nn.Module) -> str:
    if isinstance(spade, OfLabels):
        return WAYS[0] if spade.windows else WAYS[1]
    if isinstance(spade, OfFeatures):
        return WAYS[2] if spade.enlarges else WAYS[3]
    return WAYS[4]
