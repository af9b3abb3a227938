"""The layer and the networks that are built from it."""

from .block import SPADEResBlk, SPADEResnetBlock
from .spade import SPADE

__all__ = ["SPADE", "SPADEResBlk", "SPADEResnetBlock"]
