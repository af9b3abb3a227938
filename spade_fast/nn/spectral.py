"""Convolutions under `torch.nn.utils.spectral_norm`, without a pass over their weights for the
division by σ in each call.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ..identity import state_of
from ..kernels.contract import sum_dtype
from ..recording import gradients_of, is_recorded, is_transformed
from ..streams import is_capturing
from .modules import CONVOLUTION_TYPES, Convolution, Model, check_module, is_called_plainly
from .tables import Keeper, kept_tables

CONVERGED = 1e-6  # the relative change of σ in one power iteration
MOST_ITERATIONS = 1000


def convolve(convolution: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """convolution(x). Where spectral norm divides the weight W by σ and x is smaller than W, x is
    divided instead.

    conv(x, W / σ) = conv(x / σ, W), and the gradients follow: `Quotient` computes them with fewer
    passes over the weight than PyTorch. Where x is divided, `convolution.weight`, which spectral
    norm sets, is left unchanged.
    """
    norm = spectral_norm_of(convolution)
    if norm is None or not isinstance(convolution, Convolution) or is_recorded(x):
        return convolution(x)
    weight, _, _ = made_of(convolution)
    divides_x = x.numel() < weight.numel()
    kept = None if convolution.training else kept_tables(convolution)
    if kept is None and _has_own_gradients(weight, norm):
        with torch.no_grad():
            found = after_iterations(convolution, norm)
        divided = Quotient.apply(x if divides_x else None, weight, *found)
        if not divides_x:
            convolution.weight = divided  # as spectral norm does
    elif not divides_x and kept is None:
        return convolution(x)
    else:
        sigma = largest_singular_value(convolution, norm, kept)
        divided = (x if divides_x else weight) / sigma
    x, weight = (divided, weight) if divides_x else (x, divided)
    return convolution._conv_forward(x, weight, convolution.bias)


def made_of(module: nn.Module, name: str = "weight") -> tuple[torch.Tensor, ...]:
    """What spectral norm computes a weight from: the one that it divides, and the vectors u and
    v.
    """
    return tuple(getattr(module, f"{name}_{part}") for part in ("orig", "u", "v"))


def _has_own_gradients(weight, norm):
    """Whether gradients are needed that `Quotient` computes; a compiler derives its own."""
    wanted = torch.is_grad_enabled() and weight.requires_grad and norm.dim == 0
    return wanted and not torch.compiler.is_compiling()


def spectral_norm_of(module: nn.Module) -> SpectralNorm | None:
    """The spectral norm of a convolution, or None if it has none, or other hooks as well."""
    if type(module) not in CONVOLUTION_TYPES or not is_called_plainly(module):
        return None
    own = module._forward_pre_hooks
    watched = module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    if len(own) != 1 or watched:
        return None
    (norm,) = own.values()
    return norm if type(norm) is SpectralNorm and norm.name == "weight" else None


def largest_singular_value(
    module: nn.Module, norm: SpectralNorm, kept: Keeper | None = None
) -> torch.Tensor:
    """σ = u · W v, after the power iterations of train mode: what `SpectralNorm.compute_weight`
    divides by. It is computed once if something keeps it.
    """
    if kept is not None:
        weight, u, v = made_of(module)
        device = weight.device.type
        rounds = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return kept.derive(
            module,
            "sigma",
            [weight, u, v],
            (rounds, norm.dim),
            lambda: [largest_singular_value(module, norm)],
        )[0]
    return after_iterations(module, norm)[0]


def after_iterations(module: nn.Module, norm: SpectralNorm) -> tuple[torch.Tensor, ...]:
    """σ = u · W v, and u and v, after the power iterations of train mode."""
    weight, own_u, own_v = made_of(module)
    u, v = own_u, own_v
    matrix, product = norm.reshape_weight_to_matrix(weight), None
    if module.training and norm.n_power_iterations > 0:
        with torch.no_grad():
            for _ in range(norm.n_power_iterations):
                v = _normalised(torch.mv(matrix.t(), u), v, norm.eps)
                product = torch.mv(matrix, v)
                u = _normalised(product, u, norm.eps)
            # In place, because replicas of the module share the buffers. The u and v that are
            # returned are not overwritten by a second forward before the first one's backward.
            torch._foreach_copy_([own_u, own_v], [u, v])
    if product is None or torch.is_grad_enabled():
        product = torch.mv(matrix, v)
    return torch.dot(u, product), u, v


def _normalised(vector, like, eps):
    """F.normalize(vector, dim=0, eps=eps) in the dtype of `like`, with fewer calls."""
    length = torch.linalg.vector_norm(vector, keepdim=True).clamp_min_(eps)
    return torch.div(vector, length, out=torch.empty_like(like))


class Quotient(torch.autograd.Function):
    """x, or the weight W if x is None, divided by σ = u · W v, where W [out, ...] is a matrix of
    `out` rows. With g the gradient of the quotient q, g/σ is the gradient of the dividend, and
    −Σ(g·q)/σ · u vᵀ is the gradient of W through σ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor | None,
        weight: torch.Tensor,
        sigma: torch.Tensor,
        u: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        quotient = (weight if x is None else x) / sigma
        ctx.save_for_backward(x, weight, sigma, u, v, quotient)
        return quotient

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, sigma, u, v, quotient = ctx.saved_tensors
        if is_transformed(gradient):
            return *_differentiable_backward(gradient, x, weight, u, v), None, None, None
        share = (gradient * quotient).sum(dtype=sum_dtype(gradient.dtype))
        rows = u.view(-1, *[1] * (weight.dim() - 1))
        columns, of_weight = v.view(1, *weight.shape[1:]), torch.empty_like(weight)
        if x is None:  # in the weight's memory layout, so that it may become its `grad`
            torch.addcmul(gradient, rows * share, columns, value=-1, out=of_weight).div_(sigma)
            return None, of_weight, None, None, None
        torch.mul(rows * (share / -sigma), columns, out=of_weight)
        return gradient / sigma if ctx.needs_input_grad[0] else None, of_weight, None, None, None


def _differentiable_backward(gradient, x, weight, u, v):
    """The same gradients of x and W in plain PyTorch, for second derivatives and for transforms of
    backward.
    """
    with torch.enable_grad():
        x, weight = inputs = [None if one is None else one.view_as(one) for one in (x, weight)]
        sigma = torch.dot(u, torch.mv(weight.flatten(1), v))
        quotient = (weight if x is None else x) / sigma
    return gradients_of(quotient, inputs, gradient)


class Folded(SpectralNorm):
    """Spectral norm for inference, which divides the weight once for as long as nothing that
    determines it changes. Where gradients are needed, in train mode, and where operations are
    recorded or captured, it divides in each call as usual.
    """

    _state: list[tuple] | None
    _held: list[torch.Tensor] | None
    _weight: torch.Tensor | None
    _made: tuple | None

    def __init__(self, norm: SpectralNorm) -> None:
        self.__dict__.update(norm.__dict__)
        self._forget()

    def __call__(self, module: nn.Module, inputs: object) -> None:
        tensors = made_of(module, self.name)
        weight = tensors[0]
        asks_anew = module.training or (torch.is_grad_enabled() and weight.requires_grad)
        recorded = torch.compiler.is_compiling() or is_recorded(weight)
        if asks_anew or recorded or is_capturing(weight):
            self._forget()
            return super().__call__(module, inputs)
        state = [state_of(tensor) for tensor in tensors]
        own = module.__dict__.get(self.name)
        kept = self._weight
        is_kept = own is kept and kept is not None and state_of(kept) == self._made
        if state != self._state or not is_kept:
            with torch.inference_mode(False), torch.no_grad():
                weight = self.compute_weight(module, do_power_iteration=False)
            setattr(module, self.name, weight)
            # Their memory is held, so that no other weight can be allocated there.
            self._held = [tensor.detach() for tensor in tensors]
            self._weight, self._made, self._state = weight, state_of(weight), state
        return None

    def _forget(self) -> None:
        self._state = self._held = self._weight = self._made = None

    def __getstate__(self) -> dict:
        return self.__dict__ | dict.fromkeys(("_state", "_held", "_weight", "_made"))


def fold_spectral_norm(model: Model) -> Model:
    """For inference: divides the weights under `torch.nn.utils.spectral_norm` by their σ once,
    instead of in every call, and again when one is written to or replaced. Returns the model.

    Where their gradients are needed, and in train mode, they are divided in every call as before.
    The state_dict does not change. (Changes that PyTorch does not see, through `.data` or NumPy, go
    unnoticed: call this again after them.)

    Errors: TypeError if the model is not a module.
    """
    check_module("model", model)
    for part in model.modules():
        for key, hook in part._forward_pre_hooks.items():
            if isinstance(hook, SpectralNorm):
                part._forward_pre_hooks[key] = Folded(hook)
    return model


def converge(network: Model) -> Model:
    """Brings the vectors u and v of every spectral norm in a network to convergence, in place:
    power iterations in float64 begin with u and end when σ changes by at most CONVERGED, or
    after MOST_ITERATIONS. Training makes one iteration per forward. Returns the network.
    """
    with torch.no_grad():
        for matrix, u, v, eps in spectral_vectors(network):
            matrix, left = matrix.double(), u.double()
            before: torch.Tensor | None = None
            for _ in range(MOST_ITERATIONS):
                right = nn.functional.normalize(matrix.t() @ left, dim=0, eps=eps)
                product = matrix @ right
                sigma = torch.linalg.vector_norm(product)
                left = product / sigma.clamp_min(eps)
                if before is not None and (sigma - before).abs() <= CONVERGED * sigma:
                    break
                before = sigma
            u.copy_(left), v.copy_(right)
    return network


def spectral_vectors(network: nn.Module) -> Iterator[tuple]:
    """The weight as a matrix, the vectors u and v, and eps, for each spectral norm in a network, in
    PyTorch's old form or as a parametrization.
    """
    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                weight, u, v = made_of(module, hook.name)
                yield hook.reshape_weight_to_matrix(weight), u, v, hook.eps
        if not parametrize.is_parametrized(module):
            continue
        parametrizations: Any = module.parametrizations
        for made in parametrizations.values():
            if len(made) == 1 and isinstance(made[0], _SpectralNorm) and made.original.dim() > 1:
                norm = made[0]
                matrix = norm._reshape_weight_to_matrix(made.original)
                yield matrix, norm._u, norm._v, norm.eps
