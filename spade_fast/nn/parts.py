"""The parts of a SPADE, whatever its class calls them."""

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn as nn
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm

from ..windows import LARGEST_KERNEL
from .modules import (
    INSTANCE_NORMS,
    POINTWISE,
    Convolution,
    KnownNorm,
    Same,
    changes_itself,
    dtype_of_weights,
    first_weight,
    is_known,
    is_plain,
    is_watched,
    keeps_size,
    leaves,
    marks_of_settings,
    taps_of,
    weight_of,
    weights_in,
    within,
)
from .unchanged import until_changed


class Form(NamedTuple):
    """The names of a layer's sub-modules that are SPADE's parts, and its sizes."""

    norm: str
    shared: str | None  # None if gamma and beta convolve the condition itself
    gamma: str
    beta: str
    norm_nc: int
    label_nc: int
    spatial_dims: int
    pad: str | None = None  # the module that the hidden map goes through before gamma and beta
    added: str | None = None  # the module of the condition whose output is added to x at first
    plus_one: bool = True  # whether 1 + γ multiplies the normalised x, or γ
    apart: bool = False  # how a condition of frames is resized: see `pixels.resize`
    # The halves of one convolution's output that are γ and β, (0, 1) or (1, 0); None if gamma and
    # beta are two convolutions.
    halves: tuple[int, int] | None = None
    inside: bool = False  # whether a part of an unknown class runs its children one after another
    # The names of two parameters [labels, norm_nc] that hold γ's and β's rows, by label, if no
    # convolution computes them. `gamma` and `beta` then name the modules that have them.
    by_label: tuple[str, str] | None = None
    proof: Any = None  # for a converted module: in which calls and states its parts say it all
    call: Any = None  # for a converted module: how it is called, and what it returns
    own: Any = None  # for a converted module: when a modulation in its own forward may be fused

    @property
    def of_condition(self) -> list[str]:
        """The names of the parts that make γ and β of the condition, or convolve it."""
        names = (self.shared, self.gamma, self.beta, self.added)
        return [name for name in names if name is not None]


class HasParts(nn.Module):
    """A module whose `spade_form` names a SPADE's parts."""

    spade_form: Form


@dataclass(frozen=True)
class Convolutions:
    """What determines the γ and β of a window: three convolutions, the activations after the first,
    and norms of γ and β, if there are any.
    """

    shared: Convolution
    activations: list[nn.Module]
    gamma: Convolution
    beta: Convolution
    gamma_norm: InstanceNorm | None
    beta_norm: InstanceNorm | None
    halves: tuple[int, int] | None = None

    @property
    def normalise(self) -> bool:
        """Whether γ or β is normalised over each image, so that each image needs its own rows."""
        return self.gamma_norm is not None or self.beta_norm is not None

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        """Every tensor that determines the table."""
        modules = (self.shared, self.gamma, self.beta, self.gamma_norm, self.beta_norm)
        return [tensor for of in modules if of is not None for tensor in weights_in(of)]

    @property
    def channels(self) -> int:
        """The channels of γ, which are those of β."""
        return self.gamma.out_channels // (1 if self.halves is None else 2)

    def projections(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The weights and biases that compute γ and β, computed as by `weight_of`."""
        if self.halves is None:
            return [(weight_of(module), module.bias) for module in (self.gamma, self.beta)]
        weights, bias = weight_of(self.gamma).chunk(2), self.gamma.bias
        biases = (None, None) if bias is None else bias.chunk(2)
        return [(weights[half], biases[half]) for half in self.halves]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that compute γ and β."""
        dtype = dtype_of_weights(self.gamma)
        assert dtype is not None  # a convolution has weights
        return dtype

    @cached_property
    def marks(self) -> list:
        """What else determines the table: the modules and their attributes."""
        modules = (self.shared, *self.activations, self.gamma, self.beta)
        norms = (self.gamma_norm, self.beta_norm)
        every = [part for of in (*modules, *norms) if of is not None for part in of.modules()]
        return [(Same(part), type(part), marks_of_settings(part, within(part))) for part in every]

    @cached_property
    def changes_itself(self) -> bool:
        """Whether each call may change the weights of the next one."""
        return any(changes_itself(module) for module in (self.shared, self.gamma, self.beta))


class Pointwise(NamedTuple):
    """Two convolutions of one tap, which compute the γ and β of a pixel from its condition."""

    gamma: Convolution
    beta: Convolution


class ByLabel(NamedTuple):
    """The γ and β of each label, [labels, norm_nc]."""

    gamma: torch.Tensor
    beta: torch.Tensor

    @classmethod
    def of(cls, spade: HasParts) -> "ByLabel | None":
        """The rows of a SPADE, or None if it has none, or something watches the modules that have
        them.
        """
        form = spade.spade_form
        if form.by_label is None:
            return None
        for owner in (part_of(spade, form.gamma), part_of(spade, form.beta)):
            if owner is not spade and is_watched(owner):
                return None
        return cls(*(operator.attrgetter(name)(spade) for name in form.by_label))


class Parts(NamedTuple):
    """The modules of a SPADE: h = shared(segmap); y = norm(x) · (1 + gamma(h)) + beta(h)."""

    norm: nn.Module
    shared: nn.Module | None
    gamma: nn.Module
    beta: nn.Module
    pad: nn.Module | None
    added: nn.Module | None
    apart: bool
    inside: bool
    halves: tuple[int, int] | None

    @property
    def first(self) -> nn.Module:
        """The part that the condition goes through first."""
        return self.gamma if self.shared is None else self.shared

    @classmethod
    def of(cls, spade: HasParts) -> "Parts":
        form = spade.spade_form
        names = (form.norm, form.shared, form.gamma, form.beta, form.pad, form.added)
        norm, shared, gamma, beta, pad, added = (
            None if name is None else part_of(spade, name) for name in names
        )
        assert norm is not None and gamma is not None and beta is not None
        return cls(norm, shared, gamma, beta, pad, added, form.apart, form.inside, form.halves)

    def convolutions(self) -> Convolutions | None:
        """What determines γ and β, or None if that is more than a window's codes and the weights of
        convolutions that keep a map's size.
        """
        if self.shared is None or self.apart:
            return None
        shared, *activations = leaves(self.shared, self.inside)
        gamma, *gamma_norms = leaves(self.gamma, self.inside)
        beta, *beta_norms = leaves(self.beta, self.inside)
        size = taps_of(gamma)
        if self.pad is not None or not 1 <= size <= LARGEST_KERNEL:
            return None
        if not (keeps_size(shared, size) and keeps_size(gamma, size) and keeps_size(beta, size)):
            return None
        if not all(is_plain(module, POINTWISE) for module in activations):
            return None
        if len(gamma_norms) > 1 or len(beta_norms) > 1:
            return None
        if self.halves is not None and gamma_norms:
            return None
        own_norms: list[InstanceNorm | None] = []
        for norms in (gamma_norms, beta_norms):
            norm = norms[0] if norms else None
            if norm is not None and not _is_measured(norm):
                return None
            own_norms.append(norm)
        of_gamma, of_beta = own_norms
        return Convolutions(shared, activations, gamma, beta, of_gamma, of_beta, self.halves)

    def pointwise(self) -> Pointwise | None:
        """The two convolutions of one tap that compute γ and β from the condition itself, or None
        if γ and β are computed otherwise.
        """
        if self.shared is not None or self.pad is not None or self.halves is not None:
            return None
        (gamma, *of_gamma), (beta, *of_beta) = (
            leaves(part, self.inside) for part in (self.gamma, self.beta)
        )
        alone = not of_gamma and not of_beta
        if alone and keeps_size(gamma, 1, derived=True) and keeps_size(beta, 1, derived=True):
            return Pointwise(gamma, beta)
        return None


class Known(NamedTuple):
    """The facts about a SPADE that each call needs."""

    parts: Parts
    weight: torch.Tensor | None  # the first one that the condition meets, if there is one
    own_norm: KnownNorm | None  # its norm, if `spade_modulate` can compute it
    convolutions: Convolutions | None  # the result of `Parts.convolutions`
    pointwise: Pointwise | None  # the result of `Parts.pointwise`
    by_label: ByLabel | None  # the result of `ByLabel.of`

    @classmethod
    def of(cls, spade: HasParts) -> "Known":
        """The facts about `spade`, found again whenever anything in it has been replaced."""
        return until_changed(spade, _known)


def _known(spade):
    parts = Parts.of(spade)
    weight = first_weight(parts.first)
    own_norm = parts.norm if is_known(parts.norm) else None
    computed = (parts.convolutions(), parts.pointwise(), ByLabel.of(spade))
    return Known(parts, weight, own_norm, *computed)


def _is_measured(norm: nn.Module) -> TypeGuard[InstanceNorm]:
    """Whether a module is an instance norm without running statistics."""
    is_own = is_plain(norm, INSTANCE_NORMS.values()) and isinstance(norm, InstanceNorm)
    return is_own and not norm.track_running_stats


def part_of(spade: nn.Module, name: str) -> nn.Module:
    """The sub-module of this name, which may be a dotted path."""
    own = spade._modules.get(name)
    return spade.get_submodule(name) if own is None else own
