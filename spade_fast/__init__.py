"""SPADE (spatially-adaptive normalisation, Park et al. 2019), fast: the same parameters, the same numbers.

`SPADE` and `SPADEResnetBlock` replace the published layers, `spade_modulate` is the fused operation beneath them, and
`backends()` says which kernels run here and why not the others. `spade_fast.reference` is the plain PyTorch of it all.
"""

from .convert import convert, revert
from .kernels import BackendStatus, backends, use_backend
from .layout import SemanticLayout
from .nn import SPADE, SPADEResBlk, SPADEResnetBlock, frozen, window_mode
from .ops import plane_moments, spade_modulate

__version__ = "0.1.0"
__all__ = [
    "SPADE",
    "SPADEResBlk",
    "SPADEResnetBlock",
    "SemanticLayout",
    "BackendStatus",
    "backends",
    "convert",
    "frozen",
    "plane_moments",
    "revert",
    "spade_modulate",
    "use_backend",
    "window_mode",
]
