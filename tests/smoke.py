"""Checks that an installed spade_fast, with its kernels for the CPU, computes the same as plain
PyTorch. Runs as a script, to try wheels without pytest.
"""

import torch
from agree import assert_agree

import spade_fast
import spade_fast.reference

x = torch.randn(2, 3, 4, 4)
with spade_fast.use_backend("cpu"):
    ours = spade_fast.spade_modulate(x, x, x, activation="relu")
theirs = spade_fast.reference.spade_modulate(x, x, x, activation="relu")
assert_agree(ours, theirs)
print(f"{spade_fast.__file__} computes what plain PyTorch does")
