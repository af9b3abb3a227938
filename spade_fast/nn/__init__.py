"""The layer and the networks that are built from it."""

from .block import SPADEResBlk, SPADEResnetBlock
from .choice import window_mode
from .discriminator import MultiscaleDiscriminator
from .encoder import ConvEncoder, reparameterize
from .generator import SPADEGenerator
from .initialise import initialise
from .spade import SPADE
from .spectral import fold_spectral_norm
from .tables import frozen

__all__ = [
    "SPADE",
    "ConvEncoder",
    "MultiscaleDiscriminator",
    "SPADEGenerator",
    "SPADEResBlk",
    "SPADEResnetBlock",
    "fold_spectral_norm",
    "frozen",
    "initialise",
    "reparameterize",
    "window_mode",
]
