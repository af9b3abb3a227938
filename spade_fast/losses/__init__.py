"""The losses of training. Each is a scalar, without its weight in the total."""

from .adversarial import KINDS, check_kind, for_discriminator, for_generator
from .feature_matching import feature_matching
from .kl import kl_divergence
from .perceptual import VGG19, Perceptual
from .scales import halves

__all__ = [
    "KINDS",
    "VGG19",
    "Perceptual",
    "check_kind",
    "feature_matching",
    "for_discriminator",
    "for_generator",
    "halves",
    "kl_divergence",
]
