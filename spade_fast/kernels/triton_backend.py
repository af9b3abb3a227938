"""The kernels in Triton (triton_kernels/), called as PyTorch operators in a namespace of their own.
`contract.py` describes their arguments.

They run on CUDA GPUs. For tests they run, slowly, on a CPU in Triton's interpreter, if
TRITON_INTERPRET=1 is set.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import contract, operators, torch_backend
from .interpreted import INTERPRETED

INSTALLED = importlib.util.find_spec("triton") is not None
NAMESPACE = "spade_fast_triton"
KERNELS = (*contract.MODULATION, "convolve_windows")


def _kernel(name):
    def run(*arguments):
        from . import triton_kernels

        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
            return getattr(triton_kernels, name)(*arguments)

    return run


operators.declare(NAMESPACE, KERNELS)
for name in KERNELS:
    for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        operators.implement(NAMESPACE, name, key, _kernel(name))


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
    half = rows.dtype in (torch.bfloat16, torch.float16)
    kernels = torch.ops.spade_fast_triton if half else torch_backend
    return kernels.convolve_windows(rows, weights, biases, offsets, listed, relu)


_failures: list[str | None] = []  # once the import was tried: why it failed, or None


def _import_failure():
    """Why the kernels cannot be imported, or None. This is called last, because the import takes a
    while.
    """
    if not _failures:
        try:
            from . import triton_kernels as triton_kernels  # torch.compile can trace this form

            _failures.append(None)
        except Exception as error:  # whatever a broken installation raises
            _failures.append(f"Triton is installed but cannot be imported: {error}")
    return _failures[0]


def why_not(x: Tensor | None = None, gamma: Tensor | None = None) -> str | None:
    """Why these kernels cannot run here, or on x and γ; None if they can."""
    if not INSTALLED:
        return "Triton is not installed"
    devices = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    if x is None:
        runs = INTERPRETED or torch.cuda.is_available()
        return _import_failure() if runs else "there is no CUDA GPU here"
    if x.device.type not in devices:
        return f"x is on {x.device}, these kernels run on {' and '.join(devices)}"
    if torch.float64 in (x.dtype, None if gamma is None else gamma.dtype):
        return "x or gamma is float64, these kernels compute in float32"
    return _import_failure()


# PyTorch has the kernels for matrix products, sums of listed rows, and sorting.
BACKEND = replace(
    torch_backend.BACKEND,
    name="triton",
    why_not=why_not,
    **operators.declared(NAMESPACE, contract.MODULATION),
    convolve_windows=convolve_windows,
    dtype_at_windows=dtype_at_windows,
    gathers_half=True,
    find_codes=_kernel("find_codes"),
)
