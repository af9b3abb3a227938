"""Convolutions under `torch.nn.utils.spectral_norm`, without a pass over their weights for the
division by σ.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.spectral_norm import SpectralNorm

from ..kernels import is_exporting
from .spade import CONVOLUTIONS, hooks


def convolve(convolution, x):
    """convolution(x); where spectral norm has its weight W divided by σ, and x is the smaller of
    the two, x is divided instead.

    conv(x, W / σ) = conv(x / σ, W), and the gradients follow. `convolution.weight`, which spectral
    norm sets, is then left as it was.
    """
    norms = [
        hook
        for hook in hooks(convolution)
        if isinstance(hook, SpectralNorm) and hook.name == "weight"
    ]
    understood = (
        type(convolution) in CONVOLUTIONS.values() and len(norms) == len(hooks(convolution)) == 1
    )
    if not understood or is_exporting() or x.numel() >= convolution.weight_orig.numel():
        return convolution(x)
    return convolution._conv_forward(
        x / largest_singular_value(convolution, *norms), convolution.weight_orig, convolution.bias
    )


def largest_singular_value(module, norm):
    """σ = u · W v, after the power iterations that training makes: what
    `SpectralNorm.compute_weight` divides by.
    """
    matrix, u, v = (
        norm.reshape_weight_to_matrix(module.weight_orig),
        module.weight_u,
        module.weight_v,
    )
    if module.training:
        with torch.no_grad():
            for _ in range(
                norm.n_power_iterations
            ):  # in place: they are buffers, which replicas of the module share
                F.normalize(torch.mv(matrix.t(), u), dim=0, eps=norm.eps, out=v)
                F.normalize(torch.mv(matrix, v), dim=0, eps=norm.eps, out=u)
        u, v = u.clone(), v.clone()  # of a second forward before the first one's backward
    return torch.dot(u, torch.mv(matrix, v))


def fold(module):
    """Gives every convolution in a module that is under spectral norm its weight divided by σ, as
    it is now, until `unfold`.
    """
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, SpectralNorm) and hook.name == "weight":
                with torch.no_grad():
                    weight = hook.compute_weight(part, do_power_iteration=False)
                del part._forward_pre_hooks[key], part.weight
                part.register_buffer(
                    "weight", weight, persistent=False
                )  # of the module's device and dtype, and not of its state_dict
                part.folded_norm = hook


def unfold(module):
    """Undoes `fold`. Returns whether there was anything to undo."""
    folded = [part for part in module.modules() if "folded_norm" in part.__dict__]
    for part in folded:
        del part.weight
        part.weight = part.weight_orig.data  # as spectral norm leaves it
        part.register_forward_pre_hook(part.__dict__.pop("folded_norm"))
    return bool(folded)
