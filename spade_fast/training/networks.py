"""Builds the networks of a run from its settings."""

import torch

from ..losses import Perceptual
from ..nn import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator
from ..nn.initialise import initialise
from ..settings import Config
from .step import Networks

IMAGE_CHANNELS = 3


def label_channels(config: Config) -> int:
    """The number of the condition's channels: classes, don't care, instances' edges. Errors:
    ValueError if the number of classes is not given.
    """
    if config.num_classes is None:
        raise ValueError(
            "num_classes is not given; it should be the number of classes: `spade-fast check-data`"
            " suggests it"
        )
    return config.num_classes + (config.dont_care is not None) + (config.instances is not None)


def check_norms(config: Config, images: int, processes: int) -> None:
    """Raises ValueError if the generator's first map has only one number for a norm's mean and
    deviation.

    images: of a batch, in each of the processes.
    """
    start = config.generator_arguments(1)["start"]
    if not config.has_deviation(start, images, processes):
        raise ValueError(
            f"crop_size is {config.crop_size}; it should be larger: the first map has 1 × 1 pixels,"
            f" and norm_G {config.norm_G!r} needs more than one for a mean and a deviation"
        )


def make_networks(config: Config, label_nc: int) -> Networks:
    """New networks, initialised as the settings say: the same seed gives the same weights.

    Errors: FileNotFoundError if the perceptual loss is on and VGG19's weights are missing.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        networks = Networks(
            SPADEGenerator(**config.generator_arguments(label_nc)),
            MultiscaleDiscriminator(
                label_nc + IMAGE_CHANNELS, config.scales, config.ndf, n_layers=config.layers
            ),
            ConvEncoder(config.ndf, config.z_dim) if config.use_vae else None,
            Perceptual(config.vgg_weights) if config.perceptual else None,
        )
        if config.init != "default":
            for network in networks.trained().values():
                initialise(network, config.init, config.init_gain)
    return networks
