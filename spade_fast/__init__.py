"""SPADE (spatially-adaptive normalisation, Park et al. 2019), fast: the same parameters, the same
numbers.

`SPADE` and `SPADEResnetBlock` replace the published layers, `SPADEGenerator`, `ConvEncoder` and
`MultiscaleDiscriminator` the networks, `convert` the SPADEs of other models. `spade_modulate` is
the fused operation beneath them, `Service` one generator for many threads, and `backends()` says
which kernels run here and why not the others. `spade_fast.reference` is the plain PyTorch of it
all.
"""

from . import checkpoint
from .convert import convert, revert
from .graphs import Graphed
from .kernels import BackendStatus, backends, use_backend
from .layout import SemanticLayout
from .nn import (
    SPADE,
    ConvEncoder,
    MultiscaleDiscriminator,
    SPADEGenerator,
    SPADEResBlk,
    SPADEResnetBlock,
    fold_spectral_norm,
    frozen,
    initialise,
    reparameterize,
    window_mode,
)
from .ops import plane_moments, spade_modulate
from .service import Service

__version__ = "0.1.0"
__all__ = [
    "SPADE",
    "ConvEncoder",
    "Graphed",
    "MultiscaleDiscriminator",
    "SPADEGenerator",
    "SPADEResBlk",
    "SPADEResnetBlock",
    "SemanticLayout",
    "Service",
    "BackendStatus",
    "backends",
    "checkpoint",
    "convert",
    "fold_spectral_norm",
    "frozen",
    "initialise",
    "plane_moments",
    "reparameterize",
    "revert",
    "spade_modulate",
    "use_backend",
    "window_mode",
]
