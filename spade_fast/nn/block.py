"""The residual block of the SPADE generators."""

import torch
import torch.nn as nn

from ..ops.modulate import plane_moments
from .config import parse_config
from .spade import CONVOLUTIONS, SPADE, like_pixels_of, owns_result, resize
from .spectral import convolve
from .upsampled import repeat_pixels, repeats
from .windows import find_layout, with_channels_together

ACTIVATIONS = {nn.LeakyReLU: "leaky_relu", nn.ReLU: "relu", nn.SiLU: "silu"}


class ResidualBlock:
    """What a module does as the residual block, whatever its class: it has norm_0, norm_1, conv_0,
    conv_1; norm_s and conv_s or neither.

    Its activation is leaky ReLU of slope 0.2, or the one that it has as a module.
    """

    def forward(self, x, segmap, scale=1):
        """x [N, fin, *spatial] and segmap [N, label_nc, *any], or a SemanticLayout, to [N, fout,
        *spatial].

        scale: x is made so many times larger first, by nearest neighbour. Errors: SPADE.forward's.
        """
        self.norm_0.check(x, segmap)
        layout = find_layout(segmap)
        x = with_channels_together(x, scale)
        has_shortcut, settings = "norm_s" in self._modules, self.activation_settings()
        moments = None
        if self.norm_0.measures and (scale > 1 or has_shortcut and self.norm_s.measures):
            moments = repeated_moments(plane_moments(x), scale ** (x.dim() - 2))
        x = repeat_pixels(x, scale)
        if layout is not None:
            segmap = layout
        else:  # once for all SPADEs
            segmap = segmap if repeats(segmap, x.shape[2:]) > 1 else resize(segmap, x.shape[2:])
            segmap = like_pixels_of(x, segmap)
        shortcut = x
        if has_shortcut:
            shortcut = convolve(
                self.conv_s,
                self.norm_s(x, segmap, moments=moments if self.norm_s.measures else None),
            )
        dx = convolve(self.conv_0, self.norm_0(x, segmap, moments=moments, **settings))
        dx = convolve(self.conv_1, self.norm_1(dx, segmap, **settings))
        dx = self.se(dx) if "se" in self._modules else dx
        if (
            has_shortcut
            and owns_result(self.conv_s)
            and shortcut.dtype == dx.dtype
            and not torch.is_grad_enabled()
        ):
            return shortcut.add_(dx)
        return shortcut + dx

    def activation_settings(self):
        """The activation as arguments of a SPADE."""
        for module in self.children():
            if type(module) in ACTIVATIONS:
                return {
                    "activation": ACTIVATIONS[type(module)],
                    "negative_slope": getattr(module, "negative_slope", 0.2),
                }
        return {"activation": "leaky_relu", "negative_slope": 0.2}


def repeated_moments(moments, times):
    """`plane_moments` of x with every pixel repeated: the mean stays, there are more squares."""
    return torch.stack([moments[0], times * moments[1]]) if times > 1 else moments


class SPADEResnetBlock(ResidualBlock, nn.Module):
    """x + conv_1(a(norm_1(conv_0(a(norm_0(x)))))), a = leaky ReLU of slope 0.2; where fin ≠ fout
    conv_s(norm_s(x)) replaces x.

    The wiring and the state_dict keys are those of the published code (Park et al. 2019, figure 4);
    the signature is that of the face models that share it. norm_0 and norm_s share one pass over x
    for its moments.

    Args:
        fin, fout: channels of x and of the result; between the two convolutions there are min(fin,
            fout).
        norm_G: `[spectral]spade[spectral][instance|batch|syncbatch|group][KxK]`; "spectral" puts
            torch.nn.utils.spectral_norm on the block's convolutions (whose weights are then not
            divided where dividing x is cheaper: `spectral.py`).
        label_nc: channels of the condition.
        use_se: adds a squeeze-and-excitation layer on the residual branch.
        dilation: of conv_0 and conv_1.
        nhidden: hidden channels of each SPADE.
        spatial_dims: 1, 2 or 3.
    """

    def __init__(
        self, fin, fout, norm_G, label_nc, use_se=False, dilation=1, *, nhidden=128, spatial_dims=2
    ):
        super().__init__()
        config = parse_config(norm_G, "norm_G")
        if spatial_dims not in CONVOLUTIONS:
            raise ValueError(f"spatial_dims is {spatial_dims!r}, it should be 1, 2 or 3")
        fmiddle = min(fin, fout)

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
    """The block by its shorter name: instance norm, 3×3 convolutions, no spectral norm."""

    def __init__(self, fin, fout, label_nc):
        super().__init__(fin, fout, "spadeinstance3x3", label_nc)


class SqueezeExcitation(nn.Module):
    """x · sigmoid(W_2 relu(W_1 mean(x))) with the mean over space and a sixteenth of the channels
    between (Hu et al. 2018).
    """

    def __init__(self, channels):
        super().__init__()
        squeezed = max(channels // 16, 1)
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels), nn.Sigmoid()
        )

    def forward(self, x):
        scale = self.fc(x.flatten(2).mean(-1))
        return x * scale.reshape(*scale.shape, *[1] * (x.dim() - 2))
