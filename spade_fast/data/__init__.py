"""From a folder of label maps and photographs to batches for training: `find_pairs` finds the
files, `Preparation` turns each pair into a layout and a tensor, `Folder` or `Stream` is the data
set, and `loader` yields its batches with their windows numbered.

Nothing here knows about networks: sizes, kernel_size and scales say which windows they need.
"""

from .check import Report, check_data
from .colours import colours, paint
from .dataset import Batch, Example, Folder, Stream, collate
from .files import read_labels, read_palette, read_photograph
from .loader import Sampler, loader
from .pairs import CONVENTIONS, Convention, Pair, find_pairs
from .preparation import MODES, Preparation

__all__ = [
    "CONVENTIONS",
    "MODES",
    "Batch",
    "Convention",
    "Example",
    "Folder",
    "Pair",
    "Preparation",
    "Report",
    "Sampler",
    "Stream",
    "check_data",
    "collate",
    "colours",
    "find_pairs",
    "loader",
    "paint",
    "read_labels",
    "read_palette",
    "read_photograph",
]
