"""The networks of a run, made by its settings."""

import math

import torch

from ..losses import Perceptual
from ..nn import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator
from ..nn.config import parse_config
from ..nn.initialise import initialise
from ..settings import Config
from .step import Networks

IMAGE_CHANNELS = 3


def label_channels(config: Config) -> int:
    """The condition's channels: classes, don't care, instance edges. Errors: ValueError where the
    number of classes is not known.
    """
    if config.num_classes is None:
        raise ValueError(
            "num_classes is not given: it should be the number of classes, which `spade-fast"
            " check-data` suggests"
        )
    return config.num_classes + (config.dont_care is not None) + (config.instances is not None)


def check_norms(config: Config, images: int, processes: int) -> None:
    """Raises ValueError where the generator's first map has but one number for a norm's mean and
    deviation.

    images: of a batch, in each of the processes.
    """
    norm = parse_config(config.norm_G, "norm_G").norm
    maps = {"instance": 1, "batch": images, "syncbatch": images * processes}
    pixels = math.prod(config.generator_arguments(1)["start"])
    if pixels * maps.get(norm, 2) == 1:
        raise ValueError(
            f"crop_size is {config.crop_size}, it should be larger: the first map has 1 × 1 pixels,"
            f" and norm_G {config.norm_G!r} needs more than one for a mean and a deviation"
        )


def make_networks(config: Config, label_nc: int) -> Networks:
    """New networks with the initialisation that the settings say, the same for the same seed.

    Errors: FileNotFoundError where VGG19's weights are wanted and not there.
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
