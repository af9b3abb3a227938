"""The kernels in Triton (triton_kernels/), reached as operators of their own. What their arguments
are: `contract.py`.

They run on CUDA GPUs; on a CPU, slowly, in Triton's interpreter: that is for tests, and
TRITON_INTERPRET=1 asks for it.
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
    rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, listed: Tensor
) -> Tensor:
    """On tensor cores in half precision; in float32, where they would round, in plain PyTorch."""
    half = rows.dtype in (torch.bfloat16, torch.float16)
    return (torch.ops.spade_fast_triton if half else torch_backend).convolve_windows(
        rows, weight, bias, offsets, listed
    )


def convolve_gathered(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Tensor,
    listed: Tensor,
) -> Tensor:
    """As one convolution: what joins them costs less than a second launch."""
    weight, bias = torch_backend.joined(weights, biases)
    return convolve_windows(rows, weight, bias, offsets, listed)


_failures: list[str | None] = []  # of the import, once it was tried: why it failed, or None


def _import_failure():
    """Why Triton cannot be imported, or None. Asked only where nothing else is in the way, for the
    import takes a while.
    """
    if not _failures:
        try:
            from . import triton_kernels as triton_kernels  # which torch.compile can trace

            _failures.append(None)
        except Exception as error:  # whatever a broken installation raises
            _failures.append(f"Triton is installed but cannot be imported: {error}")
    return _failures[0]


def why_not(x: Tensor | None = None, gamma: Tensor | None = None) -> str | None:
    """Why these kernels cannot run (on x and γ), or None."""
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


# For matrix products, sums of listed rows, and the sorts of numbering PyTorch has kernels.
BACKEND = replace(
    torch_backend.BACKEND,
    name="triton",
    why_not=why_not,
    **operators.declared(NAMESPACE, contract.MODULATION),
    convolve_windows=convolve_windows,
    convolve_gathered=convolve_gathered,
    dtype_at_windows=dtype_at_windows,
    find_codes=_kernel("find_codes"),
)
