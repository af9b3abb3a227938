"""A fast SPADE (spatially-adaptive normalisation, Park et al. 2019), with the same parameters and
the same results.

`SPADE` and `SPADEResnetBlock` replace the published layers; `SPADEGenerator`, `ConvEncoder` and
`MultiscaleDiscriminator` replace the networks; `convert` replaces the SPADEs of other models.
`spade_modulate` is the fused operation beneath them, `Service` shares one generator between many
threads, and `backends()` says which kernels run here and why the others do not.
`spade_fast.reference` is all of it in plain PyTorch.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _is_command():
    """Whether this process runs `spade-fast` or `python -m spade_fast`."""
    words = sys.orig_argv[1:3]
    return words == ["-m", "spade_fast"] or PurePath(*words[:1]).stem == "spade-fast"


def import_public() -> None:
    """Imports the public names into the package, unless it has them: the command starts without."""
    if "__all__" in globals():
        return
    public = importlib.import_module(".public", __name__)
    globals().update({name: getattr(public, name) for name in ("__all__", *public.__all__)})


if TYPE_CHECKING or not _is_command():
    from .public import *
    from .public import __all__ as __all__
else:  # importing PyTorch takes seconds, and the command's help and version do not need it

    def __getattr__(name):
        import_public()
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]
