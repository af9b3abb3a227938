"""The residual block of the SPADE generators."""

import argparse
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..arguments import whole_number
from ..kernels.contract import Activation
from ..layout import SemanticLayout
from ..ops.modulate import plane_moments
from ..recording import is_recorded, of_their_class, ordinary
from .choice import find_layout
from .config import dimensions, parse_config
from .modules import CONVOLUTIONS, is_watched, may_overwrite_result
from .pixels import like_pixels_of, resize, with_channels_together
from .spade import SPADE, SpatiallyAdaptive
from .spectral import convolve
from .upsampled import repeat_pixels, repeats, repeats_exactly

PARTS = ("norm_0", "norm_1", "norm_s", "conv_0", "conv_1", "conv_s", "se")
ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


class ResidualBlock(nn.Module):
    """The computation of a residual block, for any class that has norm_0, norm_1, conv_0 and
    conv_1, and either both norm_s and conv_s or neither.

    The activation is the one that the block has as another module, or leaky ReLU of slope 0.2. A
    norm that is watched, or is not a SPADE of ours, is called with the condition that the block was
    called with, and without the activation, so that its hooks see what they see in the plain block.
    """

    norm_0: nn.Module
    norm_1: nn.Module
    norm_s: nn.Module
    conv_0: nn.Module
    conv_1: nn.Module
    conv_s: nn.Module
    se: nn.Module

    def forward(
        self, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout, scale: int = 1
    ) -> torch.Tensor:
        """Maps x [N, fin, *spatial] and segmap [N, label_nc, *any], or a SemanticLayout, to [N,
        fout, *spatial].

        scale: the factor by which x is enlarged first, by nearest neighbour, and so is the result.
        Raises what SPADE.forward raises, and if scale is not a whole number of at least 1.
        """
        scale = whole_number("scale", scale, least=1)
        self.check(x, segmap)
        return self.compute(x, segmap, scale)

    def check(self, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout) -> None:
        """Raises ValueError or TypeError, naming x or segmap, if norm_0 cannot take it."""
        if isinstance(self.norm_0, SpatiallyAdaptive):
            self.norm_0.check(x, segmap)

    def is_open(self, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout) -> bool:
        """Whether calling the module with these runs ResidualBlock.forward and nothing else."""
        return type(self).forward is ResidualBlock.forward and not is_watched(self)

    def compute(
        self, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout, scale: int = 1
    ) -> torch.Tensor:
        """`forward` after its arguments have been checked."""
        x = with_channels_together(ordinary(x), scale)
        has_shortcut, open_0 = has_part(self, "norm_s"), opened(self.norm_0, x, segmap)
        open_s = opened(self.norm_s, x, segmap) if has_shortcut else None
        moments = None
        taking = sum(norm.measures for norm in (open_0, open_s) if norm is not None)
        # One pass over x serves both norms, or reads a smaller x.
        if taking + (scale > 1) >= 2 and not is_recorded(x) and repeats_exactly(x, scale):
            moments = repeated_moments(plane_moments(x), scale ** (x.dim() - 2))
        x = repeat_pixels(x, scale)
        layout = find_layout(segmap)
        seen = segmap if layout is None else layout
        if isinstance(seen, torch.Tensor):  # resized once for all SPADEs
            size = x.shape[2:]
            seen = like_pixels_of(x, seen if repeats(seen, size) > 1 else resize(seen, size))
        shortcut = x
        if has_shortcut:
            given = segmap if open_s is None else seen
            shortcut = convolve(self.conv_s, normalised(self.norm_s, open_s, x, given, moments))
        activation = activation_of(self)
        watched = activation if activation is not None and is_watched(activation) else None
        settings = activation_settings(activation) if watched is None else (None, 0.0)
        given = segmap if open_0 is None else seen
        dx = normalised(self.norm_0, open_0, x, given, moments, *settings)
        dx = convolve(self.conv_0, dx if watched is None else watched(dx))
        open_1 = opened(self.norm_1, dx, segmap)
        given = segmap if open_1 is None else seen
        dx = normalised(self.norm_1, open_1, dx, given, None, *settings)
        dx = convolve(self.conv_1, dx if watched is None else watched(dx))
        dx = self.se(dx) if "se" in self._modules else dx
        if has_shortcut and not torch.is_grad_enabled() and may_overwrite_result(self.conv_s):
            if shortcut.dtype == dx.dtype and shortcut.shape == dx.shape:
                return of_their_class(shortcut.add_(dx), segmap)
        return of_their_class(shortcut + dx, segmap)


def opened(
    norm: nn.Module, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout
) -> SpatiallyAdaptive | None:
    """The norm if it is a SPADE whose `modulate` may be called instead of it, otherwise None."""
    return norm if isinstance(norm, SpatiallyAdaptive) and norm.is_open(x, segmap) else None


def normalised(
    norm: nn.Module,
    spade: SpatiallyAdaptive | None,
    x: torch.Tensor,
    segmap: torch.Tensor | SemanticLayout,
    moments: torch.Tensor | None,
    activation: Activation | None = None,
    negative_slope: float = 0.0,
) -> torch.Tensor:
    """A norm of x and the activation that follows it, in the same pass if the norm is `opened`."""
    if spade is None:
        return activate(norm(x, segmap), activation, negative_slope)
    moments = moments if spade.measures else None
    return spade.modulate(x, segmap, activation, negative_slope, moments)


def has_part(module: nn.Module, name: str) -> bool:
    return name in module._modules and module._modules[name] is not None


def activation_of(block: nn.Module) -> nn.Module | None:
    """The module of a block that is its activation: the first of a known kind that has no other
    place in the block.
    """
    others = (module for name, module in block._modules.items() if name not in PARTS)
    return next((module for module in others if type(module) in ACTIVATIONS), None)


def activation_settings(module: nn.Module | None) -> tuple[Activation | None, float]:
    """The `activation` and `negative_slope` of a SPADE that stand for an activation module."""
    if module is None:
        return "leaky_relu", 0.2
    return ACTIVATIONS[type(module)], getattr(module, "negative_slope", 0.2)


def activate(y: torch.Tensor, activation: Activation | None, negative_slope: float) -> torch.Tensor:
    """The activation that follows a norm which was called without it."""
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    return y if activation is None else {"relu": F.relu, "silu": F.silu}[activation](y)


def repeated_moments(moments: torch.Tensor, times: int) -> torch.Tensor:
    """`plane_moments` of x with every pixel repeated, from those of x: only the sum of squares
    grows.
    """
    return torch.stack([moments[0], times * moments[1]]) if times > 1 else moments


class PublishedOptions(Protocol):
    """The options of the published code that a block reads."""

    norm_G: str
    semantic_nc: int


class SPADEResnetBlock(ResidualBlock):
    """x + conv_1(a(norm_1(conv_0(a(norm_0(x)))))), with a = leaky ReLU of slope 0.2. If fin ≠ fout,
    conv_s(norm_s(x)) replaces the first x.

    The wiring and the state_dict keys are those of the published code (Park et al. 2019, figure 4);
    the signature is that of face models with the same wiring. The published signature,
    SPADEResnetBlock(fin, fout, opt) with opt.norm_G and opt.semantic_nc, is accepted as well.
    norm_0 and norm_s share one pass over x for its moments.

    Args:
        fin, fout: channels of x and of the result; between the two convolutions there are min(fin,
            fout).
        norm_G: `[spectral]spade[spectral][instance|batch|syncbatch|group][KxK]`; "spectral" puts
            torch.nn.utils.spectral_norm on the block's convolutions (where it is cheaper, x is
            divided by σ instead of the weight: see `spectral.py`).
        label_nc: channels of the condition.
        use_se: whether the residual branch ends with a squeeze-and-excitation layer.
        dilation: the dilation of conv_0 and conv_1.
        nhidden: hidden channels of each SPADE.
        spatial_dims: 1, 2 or 3.

    Raises:
        ValueError, TypeError: if an argument is not as described above; the message names it.
    """

    __call__: Callable[..., torch.Tensor]  # nn.Module's returns Any

    def __init__(
        self,
        fin: int,
        fout: int,
        norm_G: str | argparse.Namespace | PublishedOptions,
        label_nc: int | None = None,
        use_se: bool = False,
        dilation: int = 1,
        *,
        nhidden: int = 128,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        options: Any = norm_G
        if label_nc is None and hasattr(options, "norm_G") and hasattr(options, "semantic_nc"):
            norm_G, label_nc = options.norm_G, options.semantic_nc  # the published code's options
        config = parse_config(norm_G, "norm_G")
        spatial_dims = dimensions(spatial_dims)
        fin, fout = whole_number("fin", fin, least=1), whole_number("fout", fout, least=1)
        dilation, fmiddle = whole_number("dilation", dilation, least=1), min(fin, fout)
        label_nc = whole_number("label_nc", label_nc, least=1)

        def convolution(*arguments, **settings):
            module = CONVOLUTIONS[spatial_dims](*arguments, **settings)
            return nn.utils.spectral_norm(module) if config.spectral else module

        def norm(channels):
            return SPADE(
                channels,
                label_nc,
                nhidden,
                config.kernel_size,
                config.norm,
                spatial_dims=spatial_dims,
            )

        self.learned_shortcut = fin != fout
        self.conv_0 = convolution(fin, fmiddle, 3, padding=dilation, dilation=dilation)
        self.conv_1 = convolution(fmiddle, fout, 3, padding=dilation, dilation=dilation)
        if self.learned_shortcut:
            self.conv_s = convolution(fin, fout, 1, bias=False)
        self.norm_0 = norm(fin)
        self.norm_1 = norm(fmiddle)
        if self.learned_shortcut:
            self.norm_s = norm(fin)
        self.se = SqueezeExcitation(fout) if use_se else nn.Identity()


class SPADEResBlk(SPADEResnetBlock):
    """The block under its shorter name, with instance norm, 3×3 convolutions and no spectral
    norm.
    """

    def __init__(self, fin: int, fout: int, label_nc: int) -> None:
        super().__init__(fin, fout, "spadeinstance3x3", label_nc)


class SqueezeExcitation(nn.Module):
    """x · sigmoid(W_2 relu(W_1 mean(x))), with the mean over space and a sixteenth of the channels
    in between (Hu et al. 2018).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(channels // 16, 1)
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.fc(x.flatten(2).mean(-1))
        return x * scale.reshape(*scale.shape, *[1] * (x.dim() - 2))
