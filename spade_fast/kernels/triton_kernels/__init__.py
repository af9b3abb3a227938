"""The kernels in Triton, one per file. Importing Triton takes a while, so `triton_backend.py`
imports them only when one is first called.
"""

from .apply import apply, apply_out
from .backward_input import backward_input
from .backward_sums import backward_sums
from .batch_norm import batch_planes, batch_terms
from .convolve_windows import convolve_windows
from .instance import instance_backward, instance_forward
from .plane_moments import plane_moments
from .running_planes import running_planes
from .vectors import find_codes, hash_vectors, vectors_differ

__all__ = [
    "apply",
    "apply_out",
    "backward_input",
    "backward_sums",
    "batch_planes",
    "batch_terms",
    "convolve_windows",
    "find_codes",
    "hash_vectors",
    "instance_backward",
    "instance_forward",
    "plane_moments",
    "running_planes",
    "vectors_differ",
]
