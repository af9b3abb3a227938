"""The kernels compiled for CUDA GPUs (csrc/cuda), called as PyTorch operators. `contract.py`
describes their arguments.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import contract, cuda_numbering, operators, torch_backend

CAPABILITY = 8  # the kernels copy to shared memory asynchronously
HALF = (torch.bfloat16, torch.float16)
MOST_TAPS = 343  # of a convolution at windows, whose row numbers a kernel holds in shared memory


def _load():
    """Loads the library, which registers its kernels. Returns why it cannot be loaded, or None."""
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA; these kernels are then built only if FORCE_CUDA=1 is set"
    found = sorted(Path(__file__).parent.parent.glob("_cuda.*"))
    if not found:
        return operators.not_built(
            "spade_fast._cuda", "nvcc from the CUDA toolkit and a PyTorch with CUDA"
        )
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return operators.not_loaded("spade_fast._cuda", error)
    compiled = (*contract.MODULATION, *contract.GATHERING, *contract.NUMBERING)
    missing = operators.without_kernel("CUDA", compiled)
    return f"not compiled for CUDA: {', '.join(missing)}" if missing else None


failure = _load()


def _capability(index):
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor


_capability_of = functools.cache(_capability)  # it is constant, and each call needs it


def why_not(x: Tensor | None = None, gamma: Tensor | None = None) -> str | None:
    """Why these kernels cannot run here, or on x and γ; None if they can."""
    if failure is not None:
        return failure
    if x is None or not x.is_cuda:
        if not torch.cuda.is_available():
            return "there is no CUDA GPU here"
        if x is not None:
            return f"x is on {x.device}, these kernels run on CUDA GPUs"
    major, minor = _capability(None) if x is None else _capability_of(x.get_device())
    if major < CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}, these kernels need {CAPABILITY}.0"
    if x is not None and torch.float64 in (x.dtype, None if gamma is None else gamma.dtype):
        return "x or gamma is float64, these kernels compute in float32"
    return None


def dtype_at_windows(dtype: torch.dtype) -> torch.dtype:
    return dtype


def convolve_windows(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Tensor,
    listed: Tensor,
    relu: bool = False,
) -> Tensor:
    """On tensor cores in half precision; in plain PyTorch in float32, which they would round."""
    compiled = rows.dtype in HALF and weights[0].shape[2:].numel() <= MOST_TAPS
    kernels = torch.ops.spade_fast if compiled else torch_backend
    return kernels.convolve_windows(rows, weights, biases, offsets, listed, relu)


def convolve_windows_gradients(
    gradients: Sequence[Tensor],
    rows: Tensor | None,
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
    *wanted: bool,
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    def sum_lists(part):
        return torch.ops.spade_fast.sum_lists(part, back_offsets, back_listed)

    return torch_backend.gradients_of_sums(
        sum_lists, gradients, rows, weights, back_offsets, *wanted
    )


# PyTorch has the kernels for matrix products.
BACKEND = replace(
    torch_backend.BACKEND,
    name="cuda",
    why_not=why_not,
    **operators.declared("spade_fast", contract.MODULATION),
    **cuda_numbering.of("spade_fast"),
    convolve_windows=convolve_windows,
    convolve_windows_gradients=convolve_windows_gradients,
    dtype_at_windows=dtype_at_windows,
    gathers_half=True,
)
