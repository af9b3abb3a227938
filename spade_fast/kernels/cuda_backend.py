"""The kernels compiled for CUDA GPUs (csrc/cuda), reached as operators. What their arguments are:
`contract.py`.
"""

from dataclasses import replace
from pathlib import Path

import torch

from . import contract, operators, torch_backend, triton_backend

CAPABILITY = 8  # copies to shared memory that go on beside the computation
MOST_TAPS = 343  # of a convolution at windows: which rows a window sees is kept at hand


def _beside(name):
    """An operation of what has kernels for what this library has none for: Triton, else plain
    PyTorch.
    """

    def run(*operands):
        backend = triton_backend if triton_backend.why_not() is None else torch_backend
        return getattr(backend.BACKEND, name)(*operands)

    return run


def _load():
    """Loads the library, which registers its kernels; why it cannot be, or None."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    found = sorted(Path(__file__).parent.parent.glob("_cuda.*"))
    if not found:
        return operators.not_built("spade_fast._cuda", "nvcc of CUDA's toolkit")
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return operators.not_loaded("spade_fast._cuda", error)
    missing = operators.without_kernel(contract.MODULATION | contract.GATHERING, "CUDA")
    return f"not compiled for CUDA: {', '.join(missing)}" if missing else None


failure = _load()


def why_not(x=None, gamma=None):
    """Why these kernels cannot run (on x and γ), or None."""
    if failure is not None:
        return failure
    if not torch.cuda.is_available():
        return "there is no CUDA GPU here"
    if x is not None and x.device.type != "cuda":
        return f"x is on {x.device}, these kernels run on CUDA GPUs"
    properties = torch.cuda.get_device_properties(None if x is None else x.device)
    if properties.major < CAPABILITY:
        return (
            f"the GPU has compute capability {properties.major}.{properties.minor}, these kernels"
            f" need {CAPABILITY}.0"
        )
    if x is not None and torch.float64 in (x.dtype, None if gamma is None else gamma.dtype):
        return "x or gamma is float64, these kernels compute in float32"
    return None


def dtype_at_windows(dtype):
    return dtype


def convolve_windows(rows, weight, bias, offsets, listed):
    """On tensor cores in half precision; in float32, where they would round, in plain PyTorch."""
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return torch_backend.convolve_windows(rows, weight, bias, offsets, listed)
    compiled = weight.shape[2:].numel() <= MOST_TAPS
    kernels = torch.ops.spade_fast if compiled else torch_backend
    packed = kernels.pack_convolution([weight], [bias])
    return kernels.convolve_packed(rows, packed, offsets, listed)


def convolve_windows_gradients(gradient, rows, weight, back_offsets, back_listed, *wanted):
    def sum_lists(part):
        return torch.ops.spade_fast.sum_lists(part, back_offsets, back_listed)

    return torch_backend.gradients_of_sums(sum_lists, gradient, rows, weight, back_offsets, *wanted)


# For matrix products and the sorts of numbering PyTorch has kernels.
BACKEND = replace(
    torch_backend.BACKEND,
    name="cuda",
    why_not=why_not,
    **operators.declared("spade_fast", contract.MODULATION),
    convolve_windows=convolve_windows,
    convolve_windows_gradients=convolve_windows_gradients,
    dtype_at_windows=dtype_at_windows,
    find_codes=_beside("find_codes"),
)
