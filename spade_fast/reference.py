"""SPADE, its networks and one step of their training in plain PyTorch: short, obvious, in any
dtype.

In float64 this file is the truth that every test compares with, and it is the eager side of every
benchmark. It imports nothing from the project, and only tests and benchmarks import it. Names,
shapes and wiring are those of the published networks (Park et al., "Semantic Image Synthesis with
Spatially-Adaptive Normalization", CVPR 2019).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["instance", "batch", "syncbatch", "group"]
Activation = Literal["relu", "leaky_relu", "silu"]
Doublings = Literal["normal", "more", "most"]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def spade_modulate(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    norm: Norm | None = "instance",
    num_groups: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation | None = None,
    negative_slope: float = 0.2,
    plus_one: bool = True,
) -> Tensor:
    """y = activation(normalised(x) · (1 + γ) + β): equation 1 of the paper and the activation that
    follows it. With plus_one=False the factor is γ itself.
    """
    if norm == "instance":
        normalised = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    elif norm in ("batch", "syncbatch"):
        normalised = F.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps
        )
    elif norm == "group":
        assert num_groups is not None
        normalised = F.group_norm(x, num_groups, weight, bias, eps)
    else:
        normalised = x
    y = normalised * (1 + gamma if plus_one else gamma) + beta
    if activation == "relu":
        return F.relu(y)
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    if activation == "silu":
        return F.silu(y)
    return y


class SPADE(nn.Module):
    """The layer, which maps x [N, norm_nc, *spatial] and segmap [N, label_nc, *any] to y, which has
    x's shape.
    """

    def __init__(
        self,
        norm_nc: int,
        label_nc: int,
        nhidden: int = 128,
        kernel_size: int = 3,
        norm: Norm | nn.Module = "instance",
        *,
        num_groups: int = 32,
        affine: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        conv = CONVOLUTIONS[spatial_dims]
        self.param_free_norm: nn.Module
        if norm == "instance":
            self.param_free_norm = INSTANCE_NORMS[spatial_dims](norm_nc, eps=eps, affine=affine)
        elif norm == "batch":
            self.param_free_norm = BATCH_NORMS[spatial_dims](
                norm_nc, eps=eps, momentum=momentum, affine=affine
            )
        elif norm == "syncbatch":
            self.param_free_norm = nn.SyncBatchNorm(
                norm_nc, eps=eps, momentum=momentum, affine=affine
            )
        elif norm == "group":
            self.param_free_norm = nn.GroupNorm(num_groups, norm_nc, eps=eps, affine=affine)
        else:
            self.param_free_norm = norm
        padding = kernel_size // 2
        self.mlp_shared = nn.Sequential(
            conv(label_nc, nhidden, kernel_size, padding=padding), nn.ReLU()
        )
        self.mlp_gamma = conv(nhidden, norm_nc, kernel_size, padding=padding)
        self.mlp_beta = conv(nhidden, norm_nc, kernel_size, padding=padding)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        hidden = self.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="nearest"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class SqueezeExcitation(nn.Module):
    """x · sigmoid(W_2 relu(W_1 mean(x))), with the mean over space and a reduction of 16 (Hu et
    al., CVPR 2018).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(channels // 16, 1)
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc(x.flatten(2).mean(-1))
        return x * scale.reshape(*scale.shape, *[1] * (x.dim() - 2))


class SPADEResnetBlock(nn.Module):
    """Two SPADEs, each followed by a convolution with 3 taps per axis, beside a shortcut. Where
    fin ≠ fout, the shortcut has a SPADE and a convolution with 1 tap.
    """

    def __init__(
        self,
        fin: int,
        fout: int,
        norm_G: str,
        label_nc: int,
        use_se: bool = False,
        dilation: int = 1,
        *,
        nhidden: int = 128,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        conv = CONVOLUTIONS[spatial_dims]
        fmiddle = min(fin, fout)
        self.learned_shortcut = fin != fout
        self.conv_0 = conv(fin, fmiddle, 3, padding=dilation, dilation=dilation)
        self.conv_1 = conv(fmiddle, fout, 3, padding=dilation, dilation=dilation)
        if self.learned_shortcut:
            self.conv_s = conv(fin, fout, 1, bias=False)
        if "spectral" in norm_G:
            for name, module in list(self.named_children()):
                setattr(self, name, nn.utils.spectral_norm(module))
        norms: tuple[Norm, ...] = ("instance", "syncbatch", "batch", "group")
        norm = next((name for name in norms if name in norm_G), norms[0])
        kernel_size = int((re.search(r"\d+", norm_G) or "3")[0])

        def spade(channels: int) -> SPADE:
            return SPADE(channels, label_nc, nhidden, kernel_size, norm, spatial_dims=spatial_dims)

        self.norm_0, self.norm_1 = spade(fin), spade(fmiddle)
        if self.learned_shortcut:
            self.norm_s = spade(fin)
        self.se = SqueezeExcitation(fout) if use_se else nn.Identity()

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        shortcut = self.conv_s(self.norm_s(x, segmap)) if self.learned_shortcut else x
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, segmap), 0.2))
        dx = self.conv_1(F.leaky_relu(self.norm_1(dx, segmap), 0.2))
        return shortcut + self.se(dx)


class SPADEGenerator(nn.Module):
    """The published generator's wiring; `block(fin, fout, norm_G, label_nc)` builds its residual
    blocks.

    It maps segmap [N, label_nc, H, W] and, with use_vae only, z [N, z_dim] to an image [N, 3,
    crop_size / aspect_ratio, crop_size].
    """

    def __init__(
        self,
        label_nc: int,
        ngf: int = 64,
        *,
        crop_size: int = 256,
        aspect_ratio: float = 1.0,
        num_upsampling_layers: Doublings = "normal",
        use_vae: bool = False,
        z_dim: int = 256,
        norm_G: str = "spectralspadesyncbatch3x3",
        block: Callable[[int, int, str, int], nn.Module] = SPADEResnetBlock,
    ) -> None:
        super().__init__()
        self.doublings = {"normal": 5, "more": 6, "most": 7}[num_upsampling_layers]
        width = crop_size // 2**self.doublings
        self.start = (round(width / aspect_ratio), width)
        self.use_vae = use_vae
        self.fc: nn.Module
        if use_vae:
            self.fc = nn.Linear(z_dim, 16 * ngf * self.start[0] * self.start[1])
        else:
            self.fc = nn.Conv2d(label_nc, 16 * ngf, 3, padding=1)
        self.head_0 = block(16 * ngf, 16 * ngf, norm_G, label_nc)
        self.G_middle_0 = block(16 * ngf, 16 * ngf, norm_G, label_nc)
        self.G_middle_1 = block(16 * ngf, 16 * ngf, norm_G, label_nc)
        self.up_0 = block(16 * ngf, 8 * ngf, norm_G, label_nc)
        self.up_1 = block(8 * ngf, 4 * ngf, norm_G, label_nc)
        self.up_2 = block(4 * ngf, 2 * ngf, norm_G, label_nc)
        self.up_3 = block(2 * ngf, ngf, norm_G, label_nc)
        if self.doublings == 7:
            self.up_4 = block(ngf, ngf // 2, norm_G, label_nc)
        self.conv_img = nn.Conv2d(ngf // 2 if self.doublings == 7 else ngf, 3, 3, padding=1)

    def forward(self, segmap: Tensor, z: Tensor | None = None) -> Tensor:
        def up(x):
            return F.interpolate(x, scale_factor=2, mode="nearest")

        if self.use_vae:
            x = self.fc(z).reshape(segmap.shape[0], -1, *self.start)
        else:
            x = self.fc(F.interpolate(segmap, size=self.start, mode="nearest"))
        x = up(self.head_0(x, segmap))
        x = self.G_middle_0(x, segmap)
        if self.doublings > 5:
            x = up(x)
        x = self.G_middle_1(x, segmap)
        for up_block in (self.up_0, self.up_1, self.up_2, self.up_3):
            x = up_block(up(x), segmap)
        if self.doublings == 7:
            x = self.up_4(up(x), segmap)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


class SPADEGeneratorFromNoise(nn.Module):
    """The generator of the paper's sketch: noise [N, z_dim] becomes a 4×4 map, and six blocks, each
    followed by a doubling, turn that map into a 256×256 image.
    """

    def __init__(
        self,
        label_nc: int,
        z_dim: int = 256,
        ngf: int = 64,
        *,
        norm_G: str = "spadeinstance3x3",
        block: Callable[[int, int, str, int], nn.Module] = SPADEResnetBlock,
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(z_dim, 16 * ngf * 4 * 4)
        widths = [16, 16, 16, 8, 4, 2, 1]
        for name, fin, fout in zip(
            ("head", "up_1", "up_2", "up_3", "up_4", "up_5"), widths, widths[1:]
        ):
            self.add_module(name, block(fin * ngf, fout * ngf, norm_G, label_nc))
        self.conv_img = nn.Conv2d(ngf, 3, 3, padding=1)

    def forward(self, segmap: Tensor, z: Tensor) -> Tensor:
        x = self.fc(z).view(len(z), -1, 4, 4)
        for block in list(self.children())[1:-1]:
            x = F.interpolate(block(x, segmap), scale_factor=2, mode="nearest")
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


def normalised(convolution: nn.Conv2d) -> nn.Sequential:
    """A convolution under spectral norm, followed by instance norm."""
    return nn.Sequential(
        nn.utils.spectral_norm(convolution), nn.InstanceNorm2d(convolution.out_channels)
    )


class ConvEncoder(nn.Module):
    """Maps an image [N, 3, *any] to the mean and the log variance of its z, both [N, z_dim]."""

    def __init__(self, ndf: int = 64, z_dim: int = 256) -> None:
        super().__init__()
        widths = [3, ndf, 2 * ndf, 4 * ndf, 8 * ndf, 8 * ndf, 8 * ndf]
        for number in range(1, 7):
            conv = nn.Conv2d(widths[number - 1], widths[number], 3, stride=2, padding=1, bias=False)
            self.add_module(f"layer{number}", normalised(conv))
        self.fc_mu = nn.Linear(8 * ndf * 4 * 4, z_dim)
        self.fc_var = nn.Linear(8 * ndf * 4 * 4, z_dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(image, size=(256, 256), mode="bilinear")
        for layer in list(self.children())[:-2]:
            x = F.leaky_relu(layer(x), 0.2)
        return self.fc_mu(x.flatten(1)), self.fc_var(x.flatten(1))


class PatchDiscriminator(nn.Module):
    """Maps x [N, input_nc, H, W] to the results of its n_layers + 1 layers. The last layer has one
    channel, which says how real each patch looks. Every other layer has twice the channels of the
    previous one, up to 512.
    """

    def __init__(self, input_nc: int, ndf: int = 64, *, n_layers: int = 4) -> None:
        super().__init__()
        self.model0 = nn.Sequential(
            nn.Conv2d(input_nc, ndf, 4, stride=2, padding=2), nn.LeakyReLU(0.2)
        )
        width = ndf
        for number in range(1, n_layers):
            before, width = width, min(2 * width, 512)
            stride = 1 if number == n_layers - 1 else 2
            conv = nn.Conv2d(before, width, 4, stride=stride, padding=2, bias=False)
            self.add_module(f"model{number}", nn.Sequential(normalised(conv), nn.LeakyReLU(0.2)))
        self.add_module(f"model{n_layers}", nn.Sequential(nn.Conv2d(width, 1, 4, padding=2)))

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for layer in self.children():
            x = layer(x)
            results.append(x)
        return results


class MultiscaleDiscriminator(nn.Module):
    """Maps condition and image together, [N, input_nc, H, W], to the results of each scale. Every
    scale is half the size of the previous one.
    """

    def __init__(
        self, input_nc: int, n_scales: int = 2, ndf: int = 64, *, n_layers: int = 4
    ) -> None:
        super().__init__()
        for number in range(n_scales):
            self.add_module(
                f"discriminator_{number}", PatchDiscriminator(input_nc, ndf, n_layers=n_layers)
            )

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        results = []
        for discriminator in self.children():
            results.append(discriminator(x))
            x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        return results


class Perceptual(nn.Module):
    """Maps two images [N, 3, H, W] to Σ w · mean|difference| of VGG19's features at relu1_1 to
    relu5_1. Keys are torchvision's. The weights are random until others are loaded.
    """

    WEIGHTS = {1: 1 / 32, 6: 1 / 16, 11: 1 / 8, 20: 1 / 4, 29: 1.0}  # by layer number

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512):
            if width == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
        self.features = nn.Sequential(*layers).requires_grad_(False)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        loss = fake.new_zeros(())
        for number, layer in enumerate(self.features):
            fake, real = layer(fake), layer(real)
            if number in self.WEIGHTS:
                loss = loss + self.WEIGHTS[number] * (fake - real.detach()).abs().mean()
        return loss


class PublishedTrainer:
    """The published training, one step at a time: the generator (with the encoder) is updated
    first, then the discriminator, on a fake from the updated generator.

    perceptual: maps (fake, real) to a scalar; None leaves this loss out. weights: the weight of
    each of the generator's losses in their sum.
    """

    WEIGHTS = {"adversarial": 1.0, "feature_matching": 10.0, "perceptual": 10.0, "kl": 0.05}

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        encoder: nn.Module | None = None,
        perceptual: nn.Module | None = None,
        lr_g: float = 1e-4,
        lr_d: float = 4e-4,
        betas: tuple[float, float] = (0.0, 0.9),
        weights: Mapping[str, float] = WEIGHTS,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.encoder, self.perceptual, self.weights = encoder, perceptual, weights
        trained = [*generator.parameters(), *(encoder.parameters() if encoder else [])]
        self.optimizer_g = torch.optim.Adam(trained, lr_g, betas)
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), lr_d, betas)

    def step(
        self, segmap: Tensor, image: Tensor, noise: Iterator[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Runs one step and returns its unweighted losses by name: those of the generator, and
        "fake" and "real" of the discriminator. The gradients of both updates are left in place.

        noise: an iterator over standard normal tensors [N, z_dim]. Each of the two fakes takes one,
        as the noise in the encoder's z (drawn if None), or as z itself if there is no encoder.
        """
        for network in (self.generator, self.discriminator, self.encoder):
            if network is not None:
                network.train()

        fake, losses = self._fake(segmap, image, noise)
        fakes, reals = self._judge(segmap, fake, image)
        losses["adversarial"] = sum(-scale[-1].mean() for scale in fakes) / len(fakes)
        losses["feature_matching"] = sum(
            (one - other.detach()).abs().mean()
            for fake_scale, real_scale in zip(fakes, reals)
            for one, other in zip(fake_scale[:-1], real_scale[:-1])
        ) / len(fakes)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(fake, image)
        self.optimizer_g.zero_grad()
        sum(self.weights[name] * loss for name, loss in losses.items()).backward()
        self.optimizer_g.step()

        with torch.no_grad():
            fake, _ = self._fake(segmap, image, noise)
        fakes, reals = self._judge(segmap, fake, image)
        losses["fake"] = sum(F.relu(1 + scale[-1]).mean() for scale in fakes) / len(fakes)
        losses["real"] = sum(F.relu(1 - scale[-1]).mean() for scale in reals) / len(reals)
        self.optimizer_d.zero_grad()
        (losses["fake"] + losses["real"]).backward()
        self.optimizer_d.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def _fake(self, segmap, image, noise):
        """A fake, and the encoder's loss by name, if there is an encoder."""
        if self.encoder is None:
            return self.generator(segmap, *([] if noise is None else [next(noise)])), {}
        mu, logvar = self.encoder(image)
        z = mu + (0.5 * logvar).exp() * (torch.randn_like(mu) if noise is None else next(noise))
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
        return self.generator(segmap, z), {"kl": kl}

    def _judge(self, segmap, fake, real):
        """The discriminator's results for fakes and for reals, which it gets as one batch."""
        together = torch.cat([torch.cat([segmap, fake], 1), torch.cat([segmap, real], 1)])
        results = self.discriminator(together)
        return tuple(
            [[layer.chunk(2)[half] for layer in scale] for scale in results] for half in range(2)
        )
