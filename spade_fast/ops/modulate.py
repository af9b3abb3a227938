"""The modulation, y = activation((1 + γ)·x̂ + β) or activation(γ·x̂ + β), with a hand-written
backward, for every norm and backend.

`spade_modulate` checks its arguments and measures x; `Modulate` connects the forward and backward
kernels of one backend to autograd.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kernels
from ..kernels import contract, numbering, torch_backend
from ..kernels.contract import Activation
from ..recording import constant, gradients_of, is_recorded, is_transformed, ordinary
from . import norms, plain
from .arguments import check_modulate, check_x
from .norms import Kind


def spade_modulate(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    index: Tensor | None = None,
    order: Tensor | None = None,
    norm: Kind | None = "instance",
    num_groups: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: "dist.ProcessGroup | None" = None,
    activation: Activation | None = None,
    negative_slope: float = 0.2,
    plus_one: bool = True,
    moments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalises x, modulates it by γ and β, and applies an activation (Park et al. 2019, equation
    1).

    Args:
        x: [N, C, *spatial], one to three spatial dimensions; float16, bfloat16, float32 or float64;
            any strides.
        gamma, beta: γ and β, with x's shape and device, in one dtype, which may differ from x's.
        index: [N, *spatial], whole numbers: γ and β are then tables [K, C], and the index says
            which row each pixel has. On a CPU, numbers outside the table are refused.
        order: [N, pixels], int32: each image's pixels sorted by index, for backward, which sorts
            them if this is None.
        norm: "instance", "batch", "syncbatch", "group", or None, which does not normalise x.
        num_groups: the number of groups of channels, for norm="group".
        weight, bias: [C], the norm's own affine parameters, applied before the modulation.
        running_mean, running_var: [C], for "batch" and "syncbatch": read if training is False,
            otherwise updated in place.
        training: whether batch norms use x's statistics ("instance" and "group" always do).
        momentum: the weight of x's statistics in the update of the running ones.
        eps: added to the variance.
        process_group: the processes that share statistics, for "syncbatch"; None is the default
            group.
        activation: None, "relu", "leaky_relu" or "silu".
        negative_slope: the slope of leaky ReLU below zero.
        plus_one: whether x̂ is multiplied by 1 + γ, as in the paper, or by γ itself, as in the
            SpatialNorm of diffusers. (Passing γ − 1 would round γ.)
        moments: the result of `plane_moments(x)`, where several modulations share one x.
        out: the tensor to write y to, with y's shape and dtype; channels-last if x is, otherwise
            contiguous. It may be x, gamma or beta itself, which is then overwritten, but may not
            overlap one of them in part. It is refused where gradients are needed.

    Returns:
        y, with x's shape and memory layout and the dtype that x and γ promote to. Sums are held in
        float32, or in float64 if x is float64.

    Raises:
        ValueError, TypeError: if an argument is not as described above; the message names it.
        RuntimeError: if a backend is forced that cannot run.
    """
    check_modulate(
        x,
        gamma,
        beta,
        index,
        order,
        norm=norm,
        num_groups=num_groups,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        process_group=process_group,
        activation=activation,
        negative_slope=negative_slope,
        plus_one=plus_one,
        moments=moments,
        out=out,
    )
    settings = norms.Norm(norm, num_groups, training, momentum, eps, process_group)
    if index is not None and index.dtype != torch.int32:
        index = index.to(torch.int32)
    running = (running_mean, running_var)
    if is_recorded(x, gamma, beta, index, *running):
        y = plain.modulate(
            x,
            gamma,
            beta,
            index,
            settings,
            weight,
            bias,
            running,
            activation,
            negative_slope,
            plus_one,
        )
        return y if out is None else out.copy_(y)
    x, gamma, beta = map(ordinary, (x, gamma, beta))
    negative_slope = constant(negative_slope)
    backend = kernels.select(x, gamma)
    differentiable = (x, gamma, beta, weight, bias)
    differentiates = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in differentiable
    )
    if out is not None and (differentiates or (torch.is_grad_enabled() and out.requires_grad)):
        raise ValueError(
            "out is given; it should be None where gradients are needed: they depend on what it"
            " would overwrite"
        )
    own = (weight, bias, moments, out)
    if settings.kind == "instance" and all(argument is None for argument in own):
        if differentiates:
            return ModulateInstance.apply(
                x, gamma, beta, index, order, eps, activation, negative_slope, plus_one, backend
            )
        return backend.instance_forward(
            x, gamma, beta, index, eps, activation, negative_slope, False, plus_one
        )[0]
    if settings.kind is not None and not settings.measures and not differentiates:
        planes = backend.running_planes(x, *running, weight, bias, eps)
        return modulate_by(planes, x, gamma, beta, index, activation, negative_slope, out, plus_one)
    with torch.no_grad():
        if not settings.measures:
            moments = None
        elif moments is None:
            moments = backend.plane_moments(x)
        statistics, planes = norms.statistics_and_planes(
            settings, backend, x, moments, running, weight, bias
        )
    if differentiates:
        return Modulate.apply(
            *differentiable,
            index,
            order,
            *statistics,
            planes,
            settings,
            activation,
            negative_slope,
            plus_one,
            backend,
        )
    return modulate_by(planes, x, gamma, beta, index, activation, negative_slope, out, plus_one)


def modulate_by(
    planes: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    out: Tensor | None = None,
    plus_one: bool = True,
) -> Tensor:
    """y, without gradients, from arguments that have been checked and the shift, scale and offset
    of each plane.
    """
    backend = kernels.select(x, gamma)
    if out is None:
        return backend.apply(
            x, planes, gamma, beta, index, activation, negative_slope, False, plus_one
        )[0]
    backend.apply_out(x, planes, gamma, beta, index, activation, negative_slope, out, plus_one)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # a backward that needs the old values fails
    return out


def plane_moments(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each plane of x [N, C, *spatial]: [2, N, C], in
    float32, or in float64 if x is float64.

    For `spade_modulate(..., moments=...)`, where several modulations share one x. The result is not
    differentiable: each modulation's backward accounts for the statistics it was given. Raises
    TypeError or ValueError if x is not such a tensor.
    """
    check_x(x)
    with torch.no_grad():
        recorded = is_recorded(x)
        return (torch_backend if recorded else kernels.select(x)).plane_moments(x)


class Modulate(torch.autograd.Function):
    """The modulation with any norm. For backward it keeps x, γ and what the activation's derivative
    needs: one bit per element (ReLU, leaky ReLU) or β (SiLU). A table of β is kept in any case, for
    `modulated_again`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        index: Tensor | None,
        order: Tensor | None,
        mean: Tensor,
        inverse_deviation: Tensor,
        count: int | Tensor,
        planes: Tensor,
        norm: norms.Norm,
        activation: Activation | None,
        negative_slope: float,
        plus_one: bool,
        backend: contract.Backend,
    ) -> Tensor:
        y, signs = backend.apply(
            x, planes, gamma, beta, index, activation, negative_slope, True, plus_one
        )
        kept_beta = beta if activation == "silu" or index is not None else None
        ctx.by_tables = index is not None
        ctx.save_for_backward(
            x, gamma, kept_beta, weight, bias, index, order, mean, inverse_deviation, planes, signs
        )
        ctx.count, ctx.norm, ctx.backend = count, norm, backend
        ctx.activation, ctx.negative_slope, ctx.plus_one = activation, negative_slope, plus_one
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, bias, index, order, mean, inverse_deviation, planes, signs = (
            ctx.saved_tensors
        )
        statistics = norms.Statistics(mean, inverse_deviation, ctx.count)
        if is_transformed(dy):
            gradients = _differentiable_backward(
                ctx, dy, x, gamma, beta, weight, bias, index, statistics, signs
            )
            return *gradients, *[None] * 11
        activation = (ctx.activation, ctx.negative_slope, ctx.plus_one)
        order = numbering.sort_pixels(index) if order is None and index is not None else order
        dgamma, dbeta, sums = ctx.backend.backward_sums(
            dy, x, planes, gamma, beta, index, order, signs, *activation
        )
        terms = norms.backward(ctx.norm, ctx.backend, x, statistics, sums, weight)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.backend.backward_input(
                dy, x, planes, gamma, beta, index, signs, terms, *activation
            )
        if ctx.activation is None and index is None:
            dbeta = dy.to(gamma.dtype)  # with no activation dβ is dy itself
        return (
            dx,
            dgamma,
            dbeta,
            *norms.backward_affine(statistics, sums, weight, bias),
            *[None] * 11,
        )


@torch.no_grad()
def modulated_again(ctx: Any) -> Tensor:
    """y of a modulation by tables, without its activation, from the context that it kept."""
    x, gamma, beta, _, _, index, _, _, _, planes, _ = ctx.saved_tensors
    return ctx.backend.apply(x, planes, gamma, beta, index, None, 0.0, False, ctx.plus_one)[0]


class ModulateInstance(torch.autograd.Function):
    """The same for instance norm without parameters of its own, which is most SPADEs' norm: one
    operator forward and one backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        index: Tensor | None,
        order: Tensor | None,
        eps: float,
        activation: Activation | None,
        negative_slope: float,
        plus_one: bool,
        backend: contract.Backend,
    ) -> Tensor:
        y, signs, planes = backend.instance_forward(
            x, gamma, beta, index, eps, activation, negative_slope, True, plus_one
        )
        ctx.save_for_backward(
            x, gamma, beta if activation == "silu" else None, index, order, planes, signs
        )
        ctx.norm, ctx.backend = norms.Norm("instance", eps=eps), backend
        ctx.activation, ctx.negative_slope, ctx.plus_one = activation, negative_slope, plus_one
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, index, order, planes, signs = ctx.saved_tensors
        if is_transformed(dy):
            dx, dgamma, dbeta, _, _ = _differentiable_backward(
                ctx, dy, x, gamma, beta, None, None, index, None, signs
            )
        else:
            order = numbering.sort_pixels(index) if order is None and index is not None else order
            activation = (ctx.activation, ctx.negative_slope, ctx.plus_one)
            dgamma, dbeta, dx = ctx.backend.instance_backward(
                dy, x, planes, gamma, beta, index, order, signs, *activation
            )
            if ctx.activation is None and index is None:
                dbeta = dy.to(gamma.dtype)
        return dx, dgamma, dbeta, *[None] * 7


def _differentiable_backward(ctx, dy, x, gamma, beta, weight, bias, index, statistics, signs):
    """The same gradients in plain PyTorch, for second derivatives (create_graph=True) and for
    transforms of backward (torch.func, is_grads_batched=True).
    """
    if ctx.norm.processes > 1:
        raise RuntimeError(
            "second derivatives of norm='syncbatch' over several processes are not supported"
        )
    activation = (ctx.activation, ctx.negative_slope)
    if signs.numel():  # the activation is linear on either side of zero, and which side is known
        dy = torch_backend.through_activation(
            dy, x, x.to(contract.sum_dtype(x.dtype)), None, None, signs, *activation
        )
        activation = (None, 0.0)
    # Aliases, because autograd.grad would also follow the path from γ back to x if γ was computed
    # from x.
    beta = torch.zeros_like(gamma, requires_grad=True) if beta is None else beta
    with torch.enable_grad():
        inputs = [
            None if tensor is None else tensor.view_as(tensor)
            for tensor in (x, gamma, beta, weight, bias)
        ]
        x, gamma, beta, weight, bias = inputs
        if ctx.norm.measures:
            moments = torch_backend.plane_moments(x)
            statistics = norms.measure(ctx.norm, moments, math.prod(x.shape[2:]))
        y = plain.modulate_with(
            x, gamma, beta, index, statistics, weight, bias, *activation, ctx.plus_one
        )
    return gradients_of(y, inputs, dy.to(y.dtype))
