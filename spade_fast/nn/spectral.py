"""Convolutions under `torch.nn.utils.spectral_norm`, without a pass over their weights for the
division by σ in each call.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.spectral_norm import SpectralNorm

from ..identity import state_of
from ..recording import is_recorded
from .modules import CONVOLUTION_TYPES, is_called_plainly
from .tables import Tables, kept_tables


def convolve(convolution: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """convolution(x); where spectral norm has its weight W divided by σ, and x is the smaller of
    the two, x is divided instead.

    conv(x, W / σ) = conv(x / σ, W), and the gradients follow. `convolution.weight`, which spectral
    norm sets, is then left as it was.
    """
    norm = spectral_norm_of(convolution)
    if norm is None or is_recorded(x):
        return convolution(x)
    weight, divides_x = convolution.weight_orig, x.numel() < convolution.weight_orig.numel()
    kept = None if convolution.training else kept_tables(convolution)
    if not divides_x and kept is None:
        return convolution(x)
    sigma = largest_singular_value(convolution, norm, kept)
    x, weight = (x / sigma, weight) if divides_x else (x, weight / sigma)
    return convolution._conv_forward(x, weight, convolution.bias)


def spectral_norm_of(module: nn.Module) -> SpectralNorm | None:
    """The spectral norm of a convolution that nothing else is done to."""
    if type(module) not in CONVOLUTION_TYPES or not is_called_plainly(module):
        return None
    own = module._forward_pre_hooks
    watched = module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    if len(own) != 1 or watched:
        return None
    (norm,) = own.values()
    return norm if type(norm) is SpectralNorm and norm.name == "weight" else None


def largest_singular_value(
    module: nn.Module, norm: SpectralNorm, kept: Tables | None = None
) -> torch.Tensor:
    """σ = u · W v, after the power iterations that training makes: what
    `SpectralNorm.compute_weight` divides by. It is found once where something keeps it.
    """
    u, v = module.weight_u, module.weight_v
    if kept is not None:
        device = u.device.type
        rounds = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return kept.derive(
            module,
            "sigma",
            [module.weight_orig, u, v],
            (rounds, norm.dim),
            lambda: [largest_singular_value(module, norm)],
        )[0]
    matrix = norm.reshape_weight_to_matrix(module.weight_orig)
    if module.training:
        with torch.no_grad():
            # In place: they are buffers, which replicas of the module share.
            for _ in range(norm.n_power_iterations):
                F.normalize(torch.mv(matrix.t(), u), dim=0, eps=norm.eps, out=v)
                F.normalize(torch.mv(matrix, v), dim=0, eps=norm.eps, out=u)
        u, v = u.clone(), v.clone()  # of a second forward before the first one's backward
    return torch.dot(u, torch.mv(matrix, v))


class Folded(SpectralNorm):
    """Spectral norm that divides the weight once for as long as nothing that decides it changes,
    for inference: where gradients are wanted, in train mode and where operations are recorded it
    divides in each call, as always.
    """

    def __init__(self, norm: SpectralNorm) -> None:
        self.__dict__.update(norm.__dict__)
        self._forget()

    def __call__(self, module: nn.Module, inputs: object) -> None:
        made_of = [getattr(module, f"{self.name}_{part}") for part in ("orig", "u", "v")]
        weight = made_of[0]
        asks_anew = module.training or torch.is_grad_enabled() and weight.requires_grad
        recorded = torch.compiler.is_compiling() or is_recorded(weight)
        if asks_anew or recorded or weight.is_cuda and torch.cuda.is_current_stream_capturing():
            self._forget()
            return super().__call__(module, inputs)
        state = [state_of(tensor) for tensor in made_of]
        own = module.__dict__.get(self.name)
        if state != self._state or own is not self._weight or state_of(own) != self._made:
            with torch.inference_mode(False), torch.no_grad():
                weight = self.compute_weight(module, do_power_iteration=False)
            setattr(module, self.name, weight)
            # The memory is held, so that no other weight can come to lie there.
            self._held = [tensor.detach() for tensor in made_of]
            self._weight, self._made, self._state = weight, state_of(weight), state
        return None

    def _forget(self) -> None:
        self._state = self._held = self._weight = self._made = None

    def __getstate__(self) -> dict:
        return self.__dict__ | dict.fromkeys(("_state", "_held", "_weight", "_made"))


def fold_spectral_norm(model: nn.Module) -> nn.Module:
    """For inference: divides the weights under `torch.nn.utils.spectral_norm` by their σ once,
    instead of in every call, and anew where one was written to or exchanged. Returns the model.

    Where gradients of them are wanted, and in train mode, they are divided in every call as before.
    The state_dict stays as it is. (What PyTorch does not see of a change, through `.data` or NumPy,
    is not seen here: call this again after it.)
    """
    for part in model.modules():
        for key, hook in part._forward_pre_hooks.items():
            if isinstance(hook, SpectralNorm):
                part._forward_pre_hooks[key] = Folded(hook)
    return model
