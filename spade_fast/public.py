"""The public names of the package."""

from . import checkpoint
from .convert import convert, revert
from .export import export
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

__all__ = [
    "SPADE",
    "BackendStatus",
    "ConvEncoder",
    "Graphed",
    "MultiscaleDiscriminator",
    "SPADEGenerator",
    "SPADEResBlk",
    "SPADEResnetBlock",
    "SemanticLayout",
    "Service",
    "backends",
    "checkpoint",
    "convert",
    "export",
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
