"""Small versions of SPADE layers as various projects wire them: layers that compute SPADE, and
look-alikes that compute something else.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

CHANNELS, LABELS, HIDDEN = 8, 5, 6


def conv(before, after, size=3, **settings):
    return nn.Conv2d(before, after, size, padding=size // 2, **settings)


def to_size(segmap, x):
    return F.interpolate(segmap, size=x.shape[2:], mode="nearest")


class Layer(nn.Module):
    """SPADE's formula, computed with a family's submodules under their names."""

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
    """A list with a single condition, an affine norm, and 5×5 convolutions."""

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
    """A norm that computes in float32, whatever x's dtype."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class RowsByLabel(nn.Module):
    """γ and β are the rows of a pixel's label (CLADE)."""

    def __init__(self, labels):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.rand(labels, CHANNELS)) for _ in range(2))

    def forward(self, x, segmap, distances=None):
        labels = segmap.argmax(1)
        gamma, beta = (F.embedding(labels, own) for own in (self.weight, self.bias))
        gamma, beta = gamma.movedim(-1, 1), beta.movedim(-1, 1)
        if distances is not None:
            factor = 1 + self.scale(to_size(distances, x))
            gamma, beta = gamma * factor, beta * factor
        return x * gamma + beta


class ClassAdaptive(nn.Module):
    """CLADE's own norm: no convolution at all."""

    def __init__(self, norm=None, labels=LABELS):
        super().__init__()
        self.param_free_norm = norm or nn.InstanceNorm2d(CHANNELS)
        self.class_specified_affine = RowsByLabel(labels)

    def forward(self, x, segmap, distances=None):
        return self.class_specified_affine(self.param_free_norm(x), to_size(segmap, x), distances)


class ClassAdaptiveByDistance(ClassAdaptive):
    """A map of distances scales the rows, pixel by pixel."""

    def __init__(self):
        super().__init__()
        self.class_specified_affine.scale = conv(2, 1, 1)


class ClassAdaptiveWithEdges(ClassAdaptive):
    """A convolution of the condition's last channel follows y (CLADE with instances)."""

    def __init__(self):
        super().__init__(labels=LABELS - 1)
        self.inst_conv = conv(1, 1, 1)

    def forward(self, x, segmap, distances=None):
        edges = self.inst_conv(to_size(segmap[:, -1:], x))
        return torch.cat([super().forward(x, segmap[:, :-1], distances), edges], dim=1)


class OwnRowsByLabel(nn.Module):
    """Rows in the norm itself, 1 + γ, and the condition first."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(4, CHANNELS)
        self.shift, self.scale = (nn.Parameter(torch.zeros(LABELS, CHANNELS)) for _ in range(2))

    def forward(self, segmap, x):
        labels = to_size(segmap, x).argmax(1)
        return torch.addcmul(
            self.rows(self.shift, labels), self.norm(x), 1 + self.rows(self.scale, labels)
        )

    def rows(self, own, labels):
        return own[labels].movedim(-1, 1)


class InstanceAdaptive(nn.Module):
    """Rows by label, which the noise of each instance scales (INADE)."""

    def __init__(self):
        super().__init__()
        self.param_free_norm, self.fc_noise = nn.InstanceNorm2d(CHANNELS), nn.Linear(3, CHANNELS)
        self.weight, self.bias = (nn.Parameter(torch.rand(LABELS, CHANNELS, 2)) for _ in range(2))

    def forward(self, x, segmap, instances=None, noise=None):
        segmap, instances = to_size(segmap, x), to_size(instances, x)
        noise = self.fc_noise(noise)  # [N, instances, 2, CHANNELS]
        noise = torch.einsum("nikc,nihw->knchw", noise, instances)
        weight, bias = (
            torch.einsum("lck,nlhw->knchw", own, segmap) for own in (self.weight, self.bias)
        )
        gamma, beta = weight * noise + bias
        return gamma * self.param_free_norm(x) + beta


class Embeddings(nn.Module):
    """Rows in modules of their own, with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(CHANNELS)
        self.scale, self.shift = (nn.Embedding(LABELS, CHANNELS, sparse=True) for _ in range(2))

    def forward(self, x, segmap):
        labels = to_size(segmap, x).argmax(1)
        scale, shift = (own(labels).movedim(-1, 1) for own in (self.scale, self.shift))
        return self.norm(x) * scale + shift


class WeightedRows(OwnRowsByLabel):
    """Weights the rows of all labels by the condition's channels."""

    def forward(self, segmap, x):
        shift, scale = (
            torch.einsum("lc,nlhw->nchw", own, to_size(segmap, x))
            for own in (self.shift, self.scale)
        )
        return self.norm(x) * (1 + scale) + shift


class NoResize(Layer):
    """Does not resize its condition, which must have x's size."""

    def forward(self, x, segmap):
        hidden = self.mlp_shared(segmap)
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class HiFaceGAN(Layer):
    """γ instead of 1 + γ."""

    def forward(self, x, segmap):
        hidden = self.mlp_shared(to_size(segmap, x))
        return self.param_free_norm(x) * self.mlp_gamma(hidden) + self.mlp_beta(hidden)


class PSFRGAN(nn.Module):
    """γ instead of 1 + γ, a bicubic condition, and an activation that is not a module."""

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
    """Resizes its condition by bilinear interpolation."""

    def forward(self, x, segmap):
        hidden = self.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="bilinear"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class FADE(nn.Module):
    """Computes γ and β directly from the condition."""

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


class OtherNames(Layer):
    """Names that say nothing of what the parts do, and the summand before the factor."""

    names = ("one", "two", "condition_scale", "condition_shift")

    def __init__(self):
        super().__init__()
        self.condition_scale, self.condition_shift = (
            self._modules.pop(name) for name in ("condition_shift", "condition_scale")
        )

    def forward(self, x, segmap):
        hidden = self.two(to_size(segmap, x))
        summand, factor = self.condition_scale(hidden), self.condition_shift(hidden)
        return summand + (factor + 1) * self.one(x)


class JointSlices(nn.Module):
    """One convolution makes β and γ, which are slices of its output, in that order."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.shared = nn.Sequential(conv(LABELS, HIDDEN), nn.ReLU())
        self.affine = conv(HIDDEN, 2 * CHANNELS, bias=False)

    def forward(self, x, segmap):
        both = self.affine(self.shared(to_size(segmap, x)))
        return self.norm(x) * (both[:, CHANNELS:] + 1) + both[:, :CHANNELS]


class SpatialNorm(nn.Module):
    """1×1 convolutions of the condition, and γ instead of 1 + γ (MoVQ)."""

    def __init__(self):
        super().__init__()
        self.norm_layer = nn.GroupNorm(4, CHANNELS, eps=1e-6)
        self.conv_y, self.conv_b = conv(LABELS, CHANNELS, 1), conv(LABELS, CHANNELS, 1)

    def forward(self, f, zq):
        zq = to_size(zq, f)
        return self.norm_layer(f) * self.conv_y(zq) + self.conv_b(zq)


class ConvolvedSpatialNorm(SpatialNorm):
    """A 3×3 convolution after the resize, which does not commute with it (KVAE)."""

    def __init__(self):
        super().__init__()
        self.conv = conv(LABELS, LABELS, padding_mode="replicate")

    def forward(self, f, zq):
        zq = self.conv(to_size(zq, f))
        return self.norm_layer(f) * self.conv_y(zq) + self.conv_b(zq)


class ZeroSFT(nn.Module):
    """The condition comes first, and a convolution of it is added to x before the norm. Other
    features may be given, with which x is concatenated before the norm (SUPIR).
    """

    def __init__(self, concatenated=0):
        super().__init__()
        width = CHANNELS + concatenated
        self.pre_concat = concatenated > 0
        self.param_free_norm = nn.GroupNorm(4, width)
        self.mlp_shared = nn.Sequential(conv(LABELS, HIDDEN), nn.SiLU())
        self.zero_mul, self.zero_add = conv(HIDDEN, width), conv(HIDDEN, width)
        self.zero_conv = conv(LABELS, CHANNELS, 1)

    def forward(self, c, h, h_ori=None, control_scale=1):
        raw = h if h_ori is None or not self.pre_concat else torch.cat([h_ori, h], dim=1)
        h = h + self.zero_conv(c)
        if h_ori is not None and self.pre_concat:
            h = torch.cat([h_ori, h], dim=1)
        hidden = self.mlp_shared(c)
        h = self.param_free_norm(h) * (self.zero_mul(hidden) + 1) + self.zero_add(hidden)
        return h * control_scale + raw * (1 - control_scale)


class Subtracts(SpatialNorm):
    def forward(self, f, zq):
        zq = to_size(zq, f)
        return self.norm_layer(f) * self.conv_y(zq) - self.conv_b(zq)


class WithCache(SpatialNorm):
    """Reads and writes a dictionary that it is given (Kandinsky 6)."""

    def forward(self, f, zq, cache):
        y = super().forward(f, zq) * (1 + cache["is_first"])
        cache["is_first"] = False
        return y


class ALIASNorm(Layer):
    """Adds noise before the norm."""

    names = ("param_free_norm", "conv_shared", "conv_gamma", "conv_beta")

    def __init__(self, norm=None):
        super().__init__(norm)
        self.noise_scale = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, x, segmap):
        return super().forward(
            x + torch.randn_like(x[:, :1]) * self.noise_scale.view(-1, 1, 1), segmap
        )


class InnerOfACE(Layer):
    """Returns γ and β instead of applying them."""

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
    "HiFaceGAN": HiFaceGAN,
    "class-adaptive": ClassAdaptive,
    "class-adaptive, batch": lambda: ClassAdaptive(nn.BatchNorm2d(CHANNELS, affine=False)),
    "FADE": FADE,
    "other names": OtherNames,
    "one convolution for γ and β": lambda: ImaginaireNorm(1, spectral=False),
    "one convolution for β and γ": JointSlices,
    "spatial norm": SpatialNorm,
    "spatial norm after a convolution": ConvolvedSpatialNorm,
}
FUSED = {  # their own forward runs, with the modulation as one operation
    "PSFRGAN": PSFRGAN,
    "bilinear": Bilinear,
    "ALIASNorm": ALIASNorm,
    "ALIASNorm, batch": lambda: ALIASNorm(nn.BatchNorm2d(CHANNELS)),
    "class-adaptive, distances": ClassAdaptiveByDistance,
}
LOOKALIKES = {
    "SEAN": (InnerOfACE, "its own forward does not return n · (1 + a) + b or n · a + b"),
    "sparse gradients": (Embeddings, "the gradient of scale.weight is sparse"),
    "weighted rows": (WeightedRows, "rows of shift and scale by the label of each pixel"),
    "subtracts": (Subtracts, "its own forward does not return n · (1 + a) + b or n · a + b"),
    "a cache": (WithCache, "its own forward fails on x"),
    "fails": (Fails, "its own forward fails on x"),
}


class Block(nn.Module):
    """The published block, with layers of any class."""

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
    """Another activation, which is not a module."""

    def actvn(self, x):
        return F.leaky_relu(x, 0.1)


class CLADE(Layer):
    """Takes a third argument, which its norm uses only if it is given."""

    def forward(self, x, segmap, input_dist=None):
        y = super().forward(x, segmap)
        return y if input_dist is None else y * to_size(input_dist, x)


class CLADEBlock(Block):
    def __init__(self, layer=CLADE, fout=4):
        super().__init__(layer, fout)

    def forward(self, x, seg, input_dist=None):
        shortcut = x
        if self.learned_shortcut:
            shortcut = self.conv_s(self.norm_s(x, seg, input_dist))
        dx = self.conv_0(self.actvn(self.norm_0(x, seg, input_dist)))
        return shortcut + self.conv_1(self.actvn(self.norm_1(dx, seg, input_dist)))


class INADE(Layer):
    """Takes instances, noise and a sketch besides the condition."""

    def forward(self, x, segmap, input_instances=None, noise=None, sketch=None):
        if sketch is not None:
            segmap = segmap * to_size(sketch, segmap)
        y = super().forward(x, segmap)
        if input_instances is not None:
            y = y + to_size(input_instances, x)
        return y if noise is None else y + noise


class INADEBlock(Block):
    """Passes all five arguments to its norms by position."""

    def __init__(self, layer=INADE, fout=CHANNELS):
        super().__init__(layer, fout)

    def forward(self, x, seg, input_instances=None, noise=None, sketch=None):
        more = (seg, input_instances, noise, sketch)
        shortcut = self.conv_s(self.norm_s(x, *more)) if self.learned_shortcut else x
        dx = self.conv_0(self.actvn(self.norm_0(x, *more)))
        return shortcut + self.conv_1(self.actvn(self.norm_1(dx, *more)))


class PaddingBeside(nn.Module):
    """A single padding module, used for the hidden map before γ's and β's bare convolutions."""

    def __init__(self, hidden=HIDDEN, norm=None):
        super().__init__()
        self.param_free_norm = norm or nn.InstanceNorm2d(CHANNELS)
        self.mlp_shared = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(LABELS, hidden, 3), nn.ReLU()
        )
        self.pad = nn.ReflectionPad2d(1)
        self.mlp_gamma, self.mlp_beta = (nn.Conv2d(hidden, CHANNELS, 3) for _ in range(2))

    def forward(self, x, segmap, similarity_map=None):
        hidden = self.pad(self.mlp_shared(self.resize(segmap, x)))
        gamma, beta = self.mlp_gamma(hidden), self.mlp_beta(hidden)
        if similarity_map is not None:
            similarity_map = to_size(similarity_map, x)
            gamma, beta = gamma * similarity_map, beta * similarity_map
        return self.param_free_norm(x) * (1 + gamma) + beta

    def resize(self, segmap, x):
        return to_size(segmap, x)


class NowcastNet(PaddingBeside):
    """Resizes its condition by adaptive average pooling."""

    def __init__(self):
        super().__init__(hidden=4)

    def resize(self, segmap, x):
        return F.adaptive_avg_pool2d(segmap, x.shape[2:])


class Conv2dBlock(nn.Module):
    """A convolution and its activation in a dictionary of modules, called in order."""

    def __init__(self, before, after, size=5, spectral=True, nonlinearity=None):
        super().__init__()
        own = conv(before, after, size)
        self.layers = nn.ModuleDict({"conv": nn.utils.spectral_norm(own) if spectral else own})
        if nonlinearity is not None:
            self.layers["nonlinearity"] = nonlinearity

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


class ImaginaireNorm(nn.Module):
    """Takes any number of conditions, each of which may be None. γ and β come from one convolution,
    or from two.
    """

    def __init__(self, conditions=2, separate_projection=False, spectral=True):
        super().__init__()
        self.separate_projection = separate_projection
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.mlps = nn.ModuleList(
            Conv2dBlock(LABELS, HIDDEN, spectral=spectral, nonlinearity=nn.ReLU(inplace=True))
            for _ in range(conditions)
        )
        width = CHANNELS if separate_projection else 2 * CHANNELS
        self.gammas, self.betas = (
            nn.ModuleList(Conv2dBlock(HIDDEN, width, spectral=spectral) for _ in range(number))
            for number in (conditions, conditions if separate_projection else 0)
        )

    def forward(self, x, *conditions):
        y = self.norm(x)
        for number, condition in enumerate(conditions):
            if condition is None:
                continue
            hidden = self.mlps[number](to_size(condition, x))
            if self.separate_projection:
                gamma, beta = self.gammas[number](hidden), self.betas[number](hidden)
            else:
                gamma, beta = self.gammas[number](hidden).chunk(2, dim=1)
            y = y * (1 + gamma) + beta
        return y


class StableSR(Layer):
    """Conditions, and sometimes features, in dictionaries by width. A condition of fewer images is
    repeated image by image.
    """

    def __init__(self):
        super().__init__(nn.GroupNorm(4, CHANNELS))

    def forward(self, x_or_many, conditions, size=None):
        x = x_or_many if size is None else x_or_many[str(size)]
        condition = conditions[str(x.shape[-1] if size is None else size)]
        hidden = self.mlp_shared(condition)
        gamma, beta = self.mlp_gamma(hidden), self.mlp_beta(hidden)
        times = len(x) // len(condition)
        gamma, beta = (one.repeat_interleave(times, dim=0) for one in (gamma, beta))
        return self.param_free_norm(x) * (1 + gamma) + beta


class ACE(nn.Module):
    """SEAN's norm: adds noise, computes γ and β from each label's style, and blends them with those
    of an inner SPADE, which returns its γ and β.
    """

    def __init__(self):
        super().__init__()
        self.noise_var = nn.Parameter(torch.zeros(CHANNELS))
        self.param_free_norm = nn.BatchNorm2d(CHANNELS, affine=False)
        self.Spade = InnerOfACE()
        self.fc_mu = nn.Linear(3, HIDDEN)
        self.conv_gamma, self.conv_beta = conv(HIDDEN, CHANNELS), conv(HIDDEN, CHANNELS)
        self.blending_gamma, self.blending_beta = (
            nn.Parameter(torch.full((1,), 0.3)) for _ in range(2)
        )

    def forward(self, x, segmap, style_codes=None, obj_dic=None):
        noise = torch.randn_like(x[:, :1]) * self.noise_var.view(-1, 1, 1)
        normalised, segmap = self.param_free_norm(x + noise), to_size(segmap, x)
        gamma, beta = self.Spade(x, segmap)
        if style_codes is not None:  # [N, labels, 3], a style for each label of each image
            styles = F.relu(self.fc_mu(style_codes))
            styles = torch.einsum("nlhw,nlc->nchw", segmap, styles)
            share, other = torch.sigmoid(self.blending_gamma), torch.sigmoid(self.blending_beta)
            gamma = share * self.conv_gamma(styles) + (1 - share) * gamma
            beta = other * self.conv_beta(styles) + (1 - other) * beta
        if obj_dic is not None:
            obj_dic["seen"] = gamma.detach()
        return normalised * (1 + gamma) + beta


class SEANBlock(Block):
    def __init__(self, fout=4):
        super().__init__(ACE, fout)

    def forward(self, x, seg, style_codes, obj_dic=None):
        more = (seg, style_codes, obj_dic)
        dx = self.conv_0(self.actvn(self.norm_0(x, *more)))
        dx = self.conv_1(self.actvn(self.norm_1(dx, *more)))
        return self.conv_s(self.norm_s(x, *more)) + dx


class VITONHD(Layer):
    """Adds noise, whose scale is initially zero, before the norm. A mask chooses between norms."""

    names = ("param_free_norm", "conv_shared", "conv_gamma", "conv_beta")

    def __init__(self):
        super().__init__()
        self.noise_scale = nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, x, seg, misalign_mask=None):
        x = x + torch.randn_like(x[:, :1]) * self.noise_scale.view(-1, 1, 1)
        y = super().forward(x, seg)
        return y if misalign_mask is None else y * (1 - to_size(misalign_mask, x))


class Recompute(torch.autograd.Function):
    """Gradient checkpointing as in guided diffusion: forward without a graph, and again in
    backward.
    """

    @staticmethod
    def forward(ctx, run, number, *tensors):
        ctx.run, ctx.inputs, ctx.parameters = run, tensors[:number], tensors[number:]
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx, dy):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.inputs]
        with torch.enable_grad():
            y = ctx.run(*(tensor.view_as(tensor) for tensor in inputs))
        gradients = torch.autograd.grad(y, (*inputs, *ctx.parameters), dy, allow_unused=True)
        return None, None, *gradients


class SDMBlock(nn.Module):
    """Group norm, SiLU, a time embedding, and a forward that is recomputed in backward."""

    def __init__(self, checkpointed=True):
        super().__init__()
        self.checkpointed = checkpointed
        self.norm_0, self.norm_1 = (
            SPADEGroupNorm(HalfPrecisionNorm(4, CHANNELS, affine=False)) for _ in range(2)
        )
        self.conv_0, self.conv_1 = conv(CHANNELS, CHANNELS), conv(CHANNELS, CHANNELS)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(3, CHANNELS))

    def forward(self, x, cond, emb):
        if not self.checkpointed:
            return self._forward(x, cond, emb)
        return Recompute.apply(self._forward, 3, x, cond, emb, *self.parameters())

    def _forward(self, x, cond, emb):
        hidden = self.conv_0(F.silu(self.norm_0(x, cond)))
        hidden = hidden + self.emb_layers(emb)[..., None, None]
        return x + self.conv_1(F.silu(self.norm_1(hidden, cond)))


class UpBlock(Block):
    """A flag says whether x is upsampled first."""

    def forward(self, x, seg, up=False):
        if up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return super().forward(x, seg)


class ScaleBlock(Block):
    """An argument with the name of one of the package's own block, but another meaning."""

    def forward(self, x, seg, scale=1.0):
        return x + scale * (super().forward(x, seg) - x)


class KeywordBlock(Block):
    def forward(self, x, seg, *, strength=1.0):
        return strength * super().forward(x, seg)


class OwnNames(Layer):
    """Arguments with the names of the package's own extra arguments, but other meanings."""

    def forward(self, x, segmap, activation=None, moments=2.0, negative_slope=1.0):
        y = super().forward(x, segmap) * moments / 2
        return negative_slope * (y if activation is None else activation(y))


class Shifted(Layer):
    """Adds a number or a tensor."""

    def forward(self, x, segmap, shift=0.0):
        return super().forward(x, segmap) + shift


class Strict(Layer):
    """Compares a flag by identity, so that 1 is not True."""

    def forward(self, x, segmap, flag=True):
        return super().forward(x, segmap) * (1 if flag is True else 3)


class AnyNamed(Layer):
    def forward(self, x, segmap, **named):
        return super().forward(x, segmap)


class AnyMore(Layer):
    def forward(self, x, segmap, *more):
        y = super().forward(x, segmap)
        for one in more:
            y = y if one is None else y + one
        return y


class ConditionOptional(Layer):
    """Is just its norm if there is no condition."""

    def forward(self, x, segmap=None):
        return self.param_free_norm(x) if segmap is None else super().forward(x, segmap)


class ConditionLast(Layer):
    """Takes another argument between x and the condition."""

    def forward(self, x, factor, segmap):
        return factor * super().forward(x, segmap)


class Dropout(Layer):
    """Its forward checks the mode itself."""

    def forward(self, x, segmap):
        hidden = F.dropout(self.mlp_shared(to_size(segmap, x)), 0.5, self.training)
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class NoiseInTraining(Layer):
    def forward(self, x, segmap):
        return super().forward(x + torch.randn_like(x) if self.training else x, segmap)


class OnlyInEval(Layer):
    def forward(self, x, segmap):
        y = super().forward(x, segmap)
        return y if self.training else y.clamp(-0.5, 0.5)


class Strength(Layer):
    """An attribute, a buffer, or an object's option scales the result. All are initially zero."""

    def __init__(self):
        super().__init__()
        self.strength, self.opt = 0.0, SimpleNamespace(strength=0.0)
        self.register_buffer("share", torch.zeros(()))

    def forward(self, x, segmap):
        more = self.strength + self.opt.strength + self.share
        return super().forward(x, segmap) + more * x


class AsksAutocast(Layer):
    def forward(self, x, segmap):
        y = super().forward(x, segmap)
        return 2 * y if torch.is_autocast_enabled("cpu") else y


class AsksForGradients(Layer):
    def forward(self, x, segmap):
        y = super().forward(x, segmap)
        return y if torch.is_grad_enabled() else 2 * y


class BilinearWhereSmaller(Layer):
    """Resizes a condition that is larger than x by nearest neighbour, and a smaller condition
    bilinearly.
    """

    def forward(self, x, segmap):
        if segmap.shape[-1] < x.shape[-1]:
            segmap = F.interpolate(segmap, size=x.shape[2:], mode="bilinear")
        return super().forward(x, segmap)


class DropoutBlock(Block):
    def forward(self, x, seg):
        return F.dropout(super().forward(x, seg), 0.5, self.training)
