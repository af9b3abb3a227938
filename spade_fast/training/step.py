"""The computations of one training step: generated images, and the losses of both networks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import losses
from ..layout import SemanticLayout
from .config import Config
from .judge import judge

Losses = dict[str, torch.Tensor]  # weighted scalars by name; their sum is minimised


@dataclass
class Networks:
    """The networks that are trained, and the perceptual loss, if there is one.

    generator(layout, z) returns images, or generator(layout) if it has no z_dim;
    discriminator(images, layout) judges them; encoder(images) returns the mean and the logarithm of
    the variance of their z; perceptual(fakes, reals) is a loss.
    """

    generator: nn.Module
    discriminator: nn.Module
    encoder: nn.Module | None = None
    perceptual: nn.Module | None = None

    def trained(self) -> dict[str, nn.Module]:
        """The networks that are trained, by name."""
        found = dict(
            generator=self.generator, discriminator=self.discriminator, encoder=self.encoder
        )
        return {name: network for name, network in found.items() if network is not None}


def generate(
    networks: Networks,
    layout: SemanticLayout,
    reals: torch.Tensor,
    noise: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, Losses]:
    """The generator's images [N, 3, H, W] of a layout. With an encoder also the KL divergence of
    the z that it computes from the photographs, unweighted.

    noise: returns standard normal numbers with the shape, dtype and device of its argument.
    """
    if networks.encoder is not None:
        mu, logvar = networks.encoder(reals)
        z = mu + noise(mu) * (0.5 * logvar).exp()
        return networks.generator(layout, z), {"kl": losses.kl_divergence(mu, logvar)}
    z_dim = getattr(inner(networks.generator), "z_dim", None)
    if z_dim is None:
        return networks.generator(layout), {}
    z = noise(reals.new_empty(len(reals), z_dim))
    return networks.generator(layout, z), {}


def generator_losses(
    networks: Networks,
    config: Config,
    layout: SemanticLayout,
    fakes: torch.Tensor,
    reals: torch.Tensor,
) -> Losses:
    """The generator's weighted losses: adversarial, feature matching and perceptual (Park et al.
    2019, appendix A).
    """
    of_fakes, of_reals = judge(inner(networks.discriminator), fakes, reals, layout)
    found = {
        "adversarial": config.weight_adversarial
        * losses.for_generator(of_fakes, config.adversarial),
        "feature_matching": config.weight_feature_matching
        * losses.feature_matching(of_fakes, of_reals),
    }
    if networks.perceptual is not None:
        found["perceptual"] = config.weight_perceptual * networks.perceptual(fakes, reals)
    return found


def discriminator_losses(
    networks: Networks,
    config: Config,
    layout: SemanticLayout,
    fakes: torch.Tensor,
    reals: torch.Tensor,
) -> Losses:
    """The discriminator's adversarial losses for fakes and photographs, judged in one batch."""
    results = networks.discriminator(torch.cat([fakes.detach(), reals]), layout)
    fake, real = losses.for_discriminator(*losses.halves(results), config.adversarial)
    return {"fake": fake, "real": real}


def inner(network: nn.Module) -> nn.Module:
    """The network itself, without a wrapping DistributedDataParallel."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.module
    return network
