"""The modulation in plain PyTorch, which PyTorch can differentiate itself (once, twice, in forward
mode, under vmap) and every tracer can record.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import contract, torch_backend
from ..kernels.contract import Activation
from . import norms


def modulate(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    norm: norms.Norm,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running: norms.Running = (None, None),
    activation: Activation | None = None,
    negative_slope: float = 0.2,
    plus_one: bool = True,
) -> Tensor:
    """`spade_modulate`, which describes the arguments, after they have been checked.

    Only running statistics are updated in place. Derivatives go through x's own statistics, too.
    """
    dtype = contract.sum_dtype(x.dtype)
    if norm.measures:
        moments = torch_backend.plane_moments(x)
        statistics = norms.measure(norm, moments, math.prod(x.shape[2:]), *running)
    elif norm.kind is None:
        statistics = norms.identity(x.shape[1], dtype, x.device)
    else:
        statistics = norms.given(*running, norm.eps, dtype)
    return modulate_with(
        x, gamma, beta, index, statistics, weight, bias, activation, negative_slope, plus_one
    )


def modulate_with(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    statistics: norms.Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool,
) -> Tensor:
    """The same with given statistics."""
    planes = norms.planes(statistics, x.shape[:2], weight, bias)
    shift, scale, offset = planes.reshape(*planes.shape, *[1] * (x.dim() - 2)).unbind(0)
    gamma, beta = (torch_backend.look_up(rows, index) for rows in (gamma, beta))
    within = torch.promote_types(planes.dtype, gamma.dtype)
    normalised = (x.to(within) - shift) * scale + offset
    gamma = gamma.to(within)
    y = normalised * (1 + gamma if plus_one else gamma) + beta
    if activation == "relu":
        y = F.relu(y)
    elif activation == "leaky_relu":
        y = F.leaky_relu(y, negative_slope)
    elif activation == "silu":
        y = F.silu(y)
    return y.to(torch.promote_types(x.dtype, gamma.dtype))
