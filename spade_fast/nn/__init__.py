"""The layer and the networks that are built from it."""

from .block import SPADEResBlk, SPADEResnetBlock
from .frozen import frozen
from .spade import SPADE
from .windows import window_mode

__all__ = ["SPADE", "SPADEResBlk", "SPADEResnetBlock", "frozen", "window_mode"]
