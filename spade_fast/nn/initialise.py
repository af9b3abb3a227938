"""The weights that training begins with."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from .modules import Convolution, Model, check_module

KINDS = {
    "xavier": lambda weight, gain: nn.init.xavier_normal_(weight, gain),
    "xavier_uniform": lambda weight, gain: nn.init.xavier_uniform_(weight, gain),
    "normal": lambda weight, gain: nn.init.normal_(weight, 0.0, gain),
    "kaiming": lambda weight, gain: nn.init.kaiming_normal_(weight),
    "orthogonal": lambda weight, gain: nn.init.orthogonal_(weight, gain),
}
CONVOLUTION_OR_LINEAR = (Convolution, nn.Linear)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)  # the first are batch and instance norms


def initialise(network: Model, kind: str = "xavier", gain: float = 0.02) -> Model:
    """Gives a network the weights that the published training begins with, in place; PyTorch's
    global generator draws them, module by module. Returns the network.

    The weight of every convolution and linear layer is drawn as `kind` says; under spectral norm
    this is the weight that is divided by σ. The weight of every norm that has one is drawn from
    N(1, gain²). Biases become 0. Buffers, such as running statistics and the vectors of spectral
    norm, do not change, and neither do parameters of other modules.

    Args:
        network: a module; given a part of a network, only that part is initialised.
        kind: "xavier", as published: normal with the variance
            gain² · 2 / (fan_in + fan_out) (Glorot and Bengio 2010, which has gain 1);
            "xavier_uniform": the same variance;
            "normal": N(0, gain²);
            "kaiming": normal with the variance 2 / fan_in (He et al. 2015), whatever `gain` is;
            "orthogonal": `gain` times an orthogonal matrix (Saxe et al. 2013).
        gain: positive; see `kind`.

    Raises:
        TypeError, ValueError: if an argument is not as described above, if a weight has no values
            yet, or if it is computed from other parameters, except by spectral norm. Nothing has
            been drawn then.
    """
    check_module("network", network)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it should be one of {', '.join(KINDS)}")
    if isinstance(gain, bool) or not isinstance(gain, numbers.Real) or not 0 < gain < math.inf:
        raise ValueError(f"gain is {gain!r}; it should be a positive number")

    def of_norm(weight, gain):
        return nn.init.normal_(weight, 1.0, gain)

    draws: list[tuple[Callable, torch.Tensor]] = []
    biases: list[torch.Tensor] = []
    for name, module in network.named_modules():
        if isinstance(module, CONVOLUTION_OR_LINEAR):
            draws.append((KINDS[kind], _own_weight(module, name)))
        elif isinstance(module, NORMS) and module.weight is not None:
            draws.append((of_norm, module.weight))
        else:
            continue
        if module.bias is not None:
            biases.append(module.bias)
    for tensor in [*(weight for _, weight in draws), *biases]:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ValueError(
                "network has parameters without values, lazy or on the meta device: they should"
                " get some first, from a forward or from to_empty(device=…)"
            )
    for draw, weight in draws:
        draw(weight, gain)
    for bias in biases:
        nn.init.zeros_(bias)
    return network


def _own_weight(module: nn.Module, name: str) -> torch.Tensor:
    """A convolution's or linear layer's weight as a parameter: itself, or the one that is divided
    by σ.
    """
    if parametrize.is_parametrized(module, "weight"):
        parametrizations: Any = module.parametrizations
        made = parametrizations.weight
        if all(isinstance(one, _SpectralNorm) for one in made):
            return made.original
    for own in ("weight", "weight_orig"):
        if (weight := module._parameters.get(own)) is not None:
            return weight
    raise ValueError(
        f"the weight of {name or type(module).__name__} is computed from other parameters; it"
        " should be a parameter itself, or under spectral norm"
    )
