"""The layer and the networks that are built from it."""

from .block import SPADEResBlk, SPADEResnetBlock
from .discriminator import MultiscaleDiscriminator
from .encoder import ConvEncoder, reparameterize
from .frozen import frozen
from .generator import SPADEGenerator
from .spade import SPADE
from .windows import window_mode

__all__ = [
    "SPADE",
    "ConvEncoder",
    "MultiscaleDiscriminator",
    "SPADEGenerator",
    "SPADEResBlk",
    "SPADEResnetBlock",
    "frozen",
    "reparameterize",
    "window_mode",
]
