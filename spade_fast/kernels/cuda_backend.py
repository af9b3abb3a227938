"""The kernels compiled for CUDA GPUs (csrc/cuda), reached as operators. What their arguments are:
`torch_backend.py`.
"""

from pathlib import Path

import torch

from . import numbering, operators, torch_backend, triton_backend

NAME = "cuda"
KERNELS = (
    "plane_moments",
    "apply",
    "apply_out",
    "backward_sums",
    "backward_input",
    "instance_forward",
    "instance_backward",
)
CAPABILITY = 8  # copies to shared memory that go on beside the computation

plane_moments = torch.ops.spade_fast.plane_moments.default
apply = torch.ops.spade_fast.apply.default
apply_out = torch.ops.spade_fast.apply_out.default
backward_sums = torch.ops.spade_fast.backward_sums.default
backward_input = torch.ops.spade_fast.backward_input.default
instance_forward = torch.ops.spade_fast.instance_forward.default
instance_backward = torch.ops.spade_fast.instance_backward.default
# Matrix products and sums of listed rows, for which PyTorch has kernels; numbering, which sorts.
convolve_windows_gradients = torch_backend.convolve_windows_gradients
find_windows, number_windows = numbering.find_windows, numbering.number_windows
window_sums, sort_pixels = numbering.window_sums, numbering.sort_pixels


def _beside():
    """What has kernels for what this library has none for: Triton, else plain PyTorch."""
    return triton_backend if triton_backend.why_not() is None else torch_backend


def find_codes(segmap):
    return _beside().find_codes(segmap)


def dtype_at_windows(dtype):
    return _beside().dtype_at_windows(dtype)


def convolve_windows(rows, weight, bias, offsets, listed):
    return _beside().convolve_windows(rows, weight, bias, offsets, listed)


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
    missing = set(KERNELS) & set(operators.without_kernel("CUDA"))
    return f"not compiled for CUDA: {', '.join(sorted(missing))}" if missing else None


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
