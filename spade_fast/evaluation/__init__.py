"""Scores of generated images: FID against photographs, and mean IoU and pixel accuracy of a
segmentation network's predictions for the images against their label maps. Every score comes with
the protocol by which it was measured, and `differences` says whether two can be compared.

The metrics are those of torchmetrics. Networks are torch-fidelity's, transformers', or the user's.
"""

from .evaluate import evaluate
from .features import FrechetDistance, load_features
from .networks import Network, sha256_of
from .protocol import SCORES, check_writable, differences, read, write
from .segmentation import Overlap, load_segmentation, read_classes

__all__ = [
    "SCORES",
    "FrechetDistance",
    "Network",
    "Overlap",
    "check_writable",
    "differences",
    "evaluate",
    "load_features",
    "load_segmentation",
    "read",
    "read_classes",
    "sha256_of",
    "write",
]
