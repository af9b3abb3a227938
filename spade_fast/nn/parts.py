"""The parts of a SPADE, whatever its class calls them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn as nn
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm

from ..layout import LARGEST_KERNEL
from .modules import (
    INSTANCE_NORMS,
    POINTWISE,
    Convolution,
    KnownNorm,
    Same,
    changes_itself,
    first_weight,
    is_known,
    is_plain,
    keeps_size,
    leaves,
    marks_of_settings,
    taps_of,
    weights_in,
)
from .unchanged import until_changed


class Form(NamedTuple):
    """The names of a layer's sub-modules that are SPADE's parts, and its sizes."""

    norm: str
    shared: str
    gamma: str
    beta: str
    norm_nc: int
    label_nc: int
    spatial_dims: int
    pad: str | None = None  # the module that the hidden map goes through before gamma and beta
    inside: bool = False  # whether a part of an unknown class runs its children one after another
    proof: Any = None  # for a converted module: in which calls and states its parts say it all


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
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that compute γ and β."""
        return first_weight(self.gamma).dtype

    @cached_property
    def marks(self) -> list:
        """What else determines the table: the modules and their attributes."""
        modules = (self.shared, *self.activations, self.gamma, self.beta)
        norms = (self.gamma_norm, self.beta_norm)
        every = [part for of in (*modules, *norms) if of is not None for part in of.modules()]
        return [(Same(part), type(part), marks_of_settings(part)) for part in every]

    @cached_property
    def changes_itself(self) -> bool:
        """Whether each call may change the weights of the next one."""
        return any(changes_itself(module) for module in (self.shared, self.gamma, self.beta))


class Parts(NamedTuple):
    """The modules of a SPADE: h = shared(segmap); y = norm(x) · (1 + gamma(h)) + beta(h)."""

    norm: nn.Module
    shared: nn.Module
    gamma: nn.Module
    beta: nn.Module
    pad: nn.Module | None
    inside: bool

    @classmethod
    def of(cls, spade: HasParts) -> "Parts":
        form = spade.spade_form
        return cls(
            part_of(spade, form.norm),
            part_of(spade, form.shared),
            part_of(spade, form.gamma),
            part_of(spade, form.beta),
            None if form.pad is None else part_of(spade, form.pad),
            form.inside,
        )

    def convolutions(self) -> Convolutions | None:
        """What determines γ and β, or None if that is more than a window's codes and the weights of
        convolutions that keep a map's size.
        """
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
        own_norms: list[InstanceNorm | None] = []
        for norms in (gamma_norms, beta_norms):
            norm = norms[0] if norms else None
            if norm is not None and not _is_measured(norm):
                return None
            own_norms.append(norm)
        return Convolutions(shared, activations, gamma, beta, *own_norms)


class Known(NamedTuple):
    """The facts about a SPADE that each call needs."""

    parts: Parts
    weight: torch.Tensor | None  # the first one in the shared part, if there is one
    own_norm: KnownNorm | None  # its norm, if `spade_modulate` can compute it
    convolutions: Convolutions | None  # the result of `Parts.convolutions`

    @classmethod
    def of(cls, spade: HasParts) -> "Known":
        """The facts about `spade`, found again whenever anything in it has been replaced."""
        return until_changed(spade, _known)


def _known(spade):
    parts = Parts.of(spade)
    weight = next(iter(weights_in(parts.shared)), None)
    own_norm = parts.norm if is_known(parts.norm) else None
    return Known(parts, weight, own_norm, parts.convolutions())


def _is_measured(norm: nn.Module) -> TypeGuard[InstanceNorm]:
    """Whether a module is an instance norm without running statistics."""
    is_own = is_plain(norm, INSTANCE_NORMS.values()) and isinstance(norm, InstanceNorm)
    return is_own and not norm.track_running_stats


def part_of(spade: nn.Module, name: str) -> nn.Module:
    """The sub-module of this name, which may be a dotted path."""
    own = spade._modules.get(name)
    return spade.get_submodule(name) if own is None else own
