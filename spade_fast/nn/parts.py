"""The parts of a SPADE, whatever its class calls them."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn as nn

from ..layout import LARGEST_KERNEL
from .modules import (
    INSTANCE_NORMS,
    POINTWISE,
    Same,
    changes_itself,
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
    """The names of the sub-modules that a layer has for SPADE's parts, and its sizes."""

    norm: str
    shared: str
    gamma: str
    beta: str
    norm_nc: int
    label_nc: int
    spatial_dims: int
    pad: str | None = None  # what the hidden map goes through before gamma and beta
    inside: bool = False  # whether parts of unknown classes are what the modules in them say
    proof: object = None  # of a converted module: when its parts are all that it is


class HasParts:
    """A module whose `spade_form` names a SPADE's parts."""

    spade_form: Form


@dataclass(frozen=True)
class Convolutions:
    """What decides the γ and β of a window: three convolutions, what follows the first, and norms
    of γ's and β's own.
    """

    shared: nn.Module
    activations: list
    gamma: nn.Module
    beta: nn.Module
    gamma_norm: nn.Module | None
    beta_norm: nn.Module | None

    @property
    def normalise(self) -> bool:
        """Whether γ or β is normalised over each image: then images with one window have two rows
        for it.
        """
        return self.gamma_norm is not None or self.beta_norm is not None

    @cached_property
    def weights(self) -> list:
        """Every tensor that decides the table."""
        modules = (self.shared, self.gamma, self.beta, self.gamma_norm, self.beta_norm)
        return [tensor for of in modules if of is not None for tensor in weights_in(of)]

    @property
    def dtype(self) -> torch.dtype:
        """γ's and β's."""
        return weights_in(self.gamma)[0].dtype

    @cached_property
    def marks(self) -> list:
        """What else decides it: the modules, and their attributes."""
        modules = (self.shared, *self.activations, self.gamma, self.beta)
        norms = (self.gamma_norm, self.beta_norm)
        every = [part for of in (*modules, *norms) if of is not None for part in of.modules()]
        return [(Same(part), type(part), marks_of_settings(part)) for part in every]

    @cached_property
    def changes_itself(self) -> bool:
        """Whether each call changes the next one's weights."""
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
    def of(cls, spade: nn.Module) -> "Parts":
        form = spade.spade_form
        return cls(
            part_of(spade, form.norm),
            part_of(spade, form.shared),
            part_of(spade, form.gamma),
            part_of(spade, form.beta),
            part_of(spade, form.pad),
            form.inside,
        )

    def convolutions(self) -> Convolutions | None:
        """What decides γ and β, or None where that is more than a window's codes and the weights
        of plain convolutions.
        """
        shared, *activations = leaves(self.shared, self.inside)
        gamma, *gamma_norms = leaves(self.gamma, self.inside)
        beta, *beta_norms = leaves(self.beta, self.inside)
        size = taps_of(gamma)
        if self.pad is not None or not 1 <= size <= LARGEST_KERNEL:
            return None
        if not all(keeps_size(module, size) for module in (shared, gamma, beta)):
            return None
        if not all(is_plain(module, POINTWISE) for module in activations):
            return None
        if len(gamma_norms) > 1 or len(beta_norms) > 1:
            return None
        own_norms = [*gamma_norms, *beta_norms]
        if not all(
            is_plain(module, INSTANCE_NORMS.values()) and not module.track_running_stats
            for module in own_norms
        ):
            return None
        norms = (of[0] if of else None for of in (gamma_norms, beta_norms))
        return Convolutions(shared, activations, gamma, beta, *norms)


class Known(NamedTuple):
    """What is asked about a SPADE in each call."""

    parts: Parts
    weight: torch.Tensor | None  # of the shared convolution, where it has one by itself
    own_norm: bool  # whether `spade_modulate` does what its norm does
    convolutions: Convolutions | None  # as Parts has it

    @classmethod
    def of(cls, spade: nn.Module) -> "Known":
        """Asked anew where anything in the layer is another than before."""
        return until_changed(spade, _known)


def _known(spade):
    parts = Parts.of(spade)
    weight = next(iter(weights_in(parts.shared)), None)
    return Known(parts, weight, is_known(parts.norm), parts.convolutions())


def part_of(spade: nn.Module, name: str | None) -> nn.Module | None:
    """The sub-module of this name, which may lie deeper."""
    if name is None:
        return None
    own = spade._modules
    return own[name] if name in own else spade.get_submodule(name)
