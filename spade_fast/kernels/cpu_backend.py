"""The kernels compiled for the CPU (csrc/cpu), called as PyTorch operators. `contract.py` describes
their arguments.
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import contract, numbering, operators, torch_backend
from .contract import Lists

INSTRUCTION_SETS = ("base", "avx2", "avx512", "avx512_bf16")


def _load():
    """The library, which registers its kernels; or None and why it cannot be loaded."""
    try:
        return importlib.import_module(".._cpu", __package__), None
    except ModuleNotFoundError:
        return None, operators.not_built("spade_fast._cpu", "a C++ compiler such as g++")
    except ImportError as error:
        return None, operators.not_loaded("spade_fast._cpu", error)


def _use_instruction_set(name, library):
    """Makes the kernels use the instruction set that the variable SPADE_FAST_ISA names."""
    if name not in INSTRUCTION_SETS:
        raise ValueError(
            f"SPADE_FAST_ISA is {name}; it should be base, avx2, avx512 or avx512_bf16"
        )
    if library is None:
        return
    if name not in library.instruction_sets():
        raise ValueError(
            f"SPADE_FAST_ISA is {name}, which this processor does not have; it should be one of"
            f" {', '.join(library.instruction_sets())}"
        )
    library.use_instruction_set(name)


library, failure = _load()
if os.environ.get("SPADE_FAST_ISA"):
    _use_instruction_set(os.environ["SPADE_FAST_ISA"], library)

COMPILED = contract.MODULATION | contract.CONVOLUTION
if failure is None and (missing := operators.without_kernel("CPU", COMPILED)):
    failure = f"not compiled for the CPU yet: {', '.join(missing)}"


def why_not(x: Tensor | None = None, gamma: Tensor | None = None) -> str | None:
    """Why these kernels cannot run here, or on x and γ; None if they can."""
    if failure is not None:
        return failure
    if x is not None and x.device.type != "cpu":
        return f"x is on {x.device}, these kernels run on the CPU"
    return None


def convolve_windows_gradients(
    gradients: Sequence[Tensor],
    rows: Tensor | None,
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
    wants_rows: bool = True,
    wants_weights: bool = True,
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    ops, back = torch.ops.spade_fast, (back_offsets, back_listed)
    of_rows = ops.convolve_windows_rows(gradients, weights, *back) if wants_rows else None
    if not wants_weights:
        return of_rows, [None] * len(weights)
    return of_rows, ops.convolve_windows_weights(gradients, rows, weights, *back)


def dtype_at_windows(dtype: torch.dtype) -> torch.dtype:
    """Half precision as it is: the kernels sum in float32 and convert what they read, where
    converted weights would be written to memory and read again.
    """
    return dtype


def find_codes(segmap: Tensor) -> tuple[Tensor, Tensor] | None:
    bits = segmap.contiguous().view(
        {8: torch.int64, 4: torch.int32, 2: torch.int16}[segmap.element_size()]
    )
    found = library.find_codes(bits.numpy())
    if found is None:
        return None
    codes, places = map(torch.from_numpy, found)
    return codes, places


def number_windows(codes: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    found = library.number_windows(codes.numpy(), kernel_size)
    numbers, contents = map(torch.from_numpy, found)
    return numbers, contents


def find_windows(
    codes: Tensor,
    sizes: Sequence[Sequence[int]],
    kernel_size: int,
    num_codes: int,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Lists, Lists, Tensor, Tensor]]:
    maps = [numbering.resize_codes(codes, size, dtype).numpy() for size in sizes]
    found: list[Any] = []
    for arrays in library.find_windows(maps, kernel_size, num_codes):
        tensors = [*map(torch.from_numpy, arrays)]
        found.append((tuple(tensors[:4]), tuple(tensors[4:8]), *tensors[8:]))
    return found


def find_patches(
    codes: Tensor, kernel_size: int, stride: int, padding: int, num_codes: int
) -> tuple[Tensor, Lists, Tensor, Tensor]:
    return numbering.find_patches_by(
        codes, kernel_size, stride, padding, num_codes, number_windows, window_sums, sort_pixels
    )


def window_sums(contents: Tensor, rows: int) -> Lists:
    found = library.window_sums(contents.numpy(), rows)
    offsets, listed, back_offsets, back_listed = map(torch.from_numpy, found)
    return offsets, listed, back_offsets, back_listed


def sort_pixels(index: Tensor) -> Tensor:
    bound = int(index.max()) + 1 if index.numel() else 0
    return torch.from_numpy(library.sort_pixels(index.flatten(1).numpy(), bound))


BACKEND = replace(
    torch_backend.BACKEND,
    name="cpu",
    why_not=why_not,
    **operators.declared("spade_fast", (*contract.MODULATION, "convolve_windows")),
    convolve_windows_gradients=convolve_windows_gradients,
    dtype_at_windows=dtype_at_windows,
    # Zeros behind the ReLU and in one-hot rows are left out. On two cores with AVX2, with these
    # costs the dearer one of windows and pixels was chosen, by more than 3%, in 9 of 314 layers
    # with random layouts: in 8 of these with backward, 1024 channels and at most 256 pixels.
    costs_at_windows=contract.Costs(0.75, 12),
    find_codes=find_codes,
    find_windows=find_windows,
    find_patches=find_patches,
    number_windows=number_windows,
    window_sums=window_sums,
    sort_pixels=sort_pixels,
)
