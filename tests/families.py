"""Layers as the projects that use SPADE wire them, in small: those that compute SPADE, and those
that only look like it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

CHANNELS, LABELS, HIDDEN = 8, 5, 6


def conv(before, after, size=3, **settings):
    return nn.Conv2d(before, after, size, padding=size // 2, **settings)


def to_size(segmap, x):
    return F.interpolate(segmap, size=x.shape[2:], mode="nearest")


class Layer(nn.Module):
    """The formula over the parts that a family has, under its names."""

    names = ("param_free_norm", "mlp_shared", "mlp_gamma", "mlp_beta")

    def __init__(self, norm=None, size=3, hidden_activation=None):
        super().__init__()
        parts = (
            norm or nn.InstanceNorm2d(CHANNELS),
            nn.Sequential(conv(LABELS, HIDDEN, size), hidden_activation or nn.ReLU()),
            conv(HIDDEN, CHANNELS, size),
            conv(HIDDEN, CHANNELS, size),
        )
        for name, part in zip(self.names, parts):
            setattr(self, name, part)

    def forward(self, x, segmap):
        norm, shared, gamma, beta = (getattr(self, name) for name in self.names)
        hidden = shared(to_size(segmap, x))
        return norm(x) * (1 + gamma(hidden)) + beta(hidden)


class OASIS(Layer):
    names = ("first_norm", "mlp_shared", "mlp_gamma", "mlp_beta")


class SPADEGroupNorm(Layer):
    names = ("norm", "mlp_shared", "mlp_gamma", "mlp_beta")


class Seed(Layer):
    names = ("param_free_norm", "shared", "conv_gamma", "conv_beta")


class Imaginaire(nn.Module):
    """A list of conditions, of which there is one; an affine norm and 5×5 convolutions."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.mlps = nn.ModuleList([nn.Sequential(conv(LABELS, HIDDEN, 5), nn.ReLU())])
        self.gammas, self.betas = (nn.ModuleList([conv(HIDDEN, CHANNELS, 5)]) for _ in range(2))

    def forward(self, x, *conditions):
        y = self.norm(x)
        for condition, mlp, gamma, beta in zip(conditions, self.mlps, self.gammas, self.betas):
            hidden = mlp(to_size(condition, x))
            y = y * (1 + gamma(hidden)) + beta(hidden)
        return y


class CoCosNet(Layer):
    """Reflection padding before every convolution."""

    def __init__(self):
        super().__init__()

        def padded(before, after):
            return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(before, after, 3))

        self.mlp_shared = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(LABELS, HIDDEN, 3), nn.ReLU()
        )
        self.mlp_gamma, self.mlp_beta = padded(HIDDEN, CHANNELS), padded(HIDDEN, CHANNELS)


class HalfPrecisionNorm(nn.GroupNorm):
    """A norm that computes in float32 whatever x is."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class NoResize(Layer):
    """Its condition has to have x's size."""

    def forward(self, x, segmap):
        hidden = self.mlp_shared(segmap)
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class HiFaceGAN(Layer):
    """No 1 + γ."""

    def forward(self, x, segmap):
        hidden = self.mlp_shared(to_size(segmap, x))
        return self.param_free_norm(x) * self.mlp_gamma(hidden) + self.mlp_beta(hidden)


class PSFRGAN(nn.Module):
    """No 1 + γ, a bicubic condition, an activation that is no module."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv1 = nn.InstanceNorm2d(CHANNELS), conv(LABELS, HIDDEN)
        self.gamma_conv, self.beta_conv = conv(HIDDEN, CHANNELS), conv(HIDDEN, CHANNELS)

    def forward(self, x, segmap):
        hidden = F.leaky_relu(
            self.conv1(F.interpolate(segmap, size=x.shape[2:], mode="bicubic")), 0.2
        )
        return self.norm(x) * self.gamma_conv(hidden) + self.beta_conv(hidden)


class Bilinear(Layer):
    """Its condition is resized by interpolation."""

    def forward(self, x, segmap):
        hidden = self.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="bilinear"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class FADE(nn.Module):
    """γ and β straight from the condition."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv_gamma, self.conv_beta = (
            nn.InstanceNorm2d(CHANNELS),
            conv(LABELS, CHANNELS),
            conv(LABELS, CHANNELS),
        )

    def forward(self, x, segmap):
        segmap = to_size(segmap, x)
        return self.norm(x) * (1 + self.conv_gamma(segmap)) + self.conv_beta(segmap)


class ALIASNorm(Layer):
    """Noise before the norm."""

    names = ("param_free_norm", "conv_shared", "conv_gamma", "conv_beta")

    def __init__(self):
        super().__init__()
        self.noise_scale = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, x, segmap):
        return super().forward(
            x + torch.randn_like(x[:, :1]) * self.noise_scale.view(-1, 1, 1), segmap
        )


class InnerOfACE(Layer):
    """Returns γ and β themselves."""

    def forward(self, x, segmap):
        hidden = self.mlp_shared(to_size(segmap, x))
        return self.mlp_gamma(hidden), self.mlp_beta(hidden)


class Fails(Layer):
    def forward(self, x, segmap):
        raise KeyError("opt")


SPADES = {
    "official, instance": Layer,
    "official, batch": lambda: Layer(nn.BatchNorm2d(CHANNELS, affine=False)),
    "official, sync batch": lambda: Layer(nn.SyncBatchNorm(CHANNELS, affine=False)),
    "another eps": lambda: Layer(nn.InstanceNorm2d(CHANNELS, eps=0.1)),
    "OASIS": lambda: OASIS(nn.BatchNorm2d(CHANNELS, affine=False)),
    "SDM": lambda: SPADEGroupNorm(nn.GroupNorm(4, CHANNELS, affine=False)),
    "SDM, a norm of its own": lambda: SPADEGroupNorm(HalfPrecisionNorm(4, CHANNELS, affine=False)),
    "affine group norm": lambda: Layer(nn.GroupNorm(2, CHANNELS, eps=1e-6)),
    "5 × 5": lambda: Layer(size=5),
    "leaky hidden": lambda: Layer(hidden_activation=nn.LeakyReLU(0.01)),
    "seed": Seed,
    "imaginaire": Imaginaire,
    "CoCosNet": CoCosNet,
}
LOOKALIKES = {
    "HiFaceGAN": (HiFaceGAN, "computes something else than its parts say: y is"),
    "PSFRGAN": (PSFRGAN, "computes something else than its parts say: y is"),
    "bilinear": (Bilinear, "computes something else than its parts say: y is"),
    "FADE": (FADE, "it has nothing for the convolution before gamma and beta"),
    "ALIASNorm": (ALIASNorm, "it has parameters that a SPADE has not: noise_scale"),
    "SEAN": (InnerOfACE, "its own forward returns a tuple, a SPADE returns a tensor"),
    "fails": (Fails, "its own forward fails on x"),
}


class Block(nn.Module):
    """The published block, with any layers."""

    def __init__(self, layer, fout=CHANNELS, spectral=True):
        super().__init__()
        self.learned_shortcut = fout != CHANNELS
        wrap = nn.utils.spectral_norm if spectral else lambda module: module
        self.conv_0, self.conv_1 = wrap(conv(CHANNELS, CHANNELS)), wrap(conv(CHANNELS, fout))
        self.norm_0, self.norm_1 = layer(), layer()
        if self.learned_shortcut:
            self.conv_s, self.norm_s = wrap(nn.Conv2d(CHANNELS, fout, 1, bias=False)), layer()

    def forward(self, x, seg):
        shortcut = self.conv_s(self.norm_s(x, seg)) if self.learned_shortcut else x
        dx = self.conv_0(self.actvn(self.norm_0(x, seg)))
        return shortcut + self.conv_1(self.actvn(self.norm_1(dx, seg)))

    def actvn(self, x):
        return F.leaky_relu(x, 2e-1)


class OtherBlock(Block):
    """Another activation, which is no module."""

    def actvn(self, x):
        return F.leaky_relu(x, 0.1)
