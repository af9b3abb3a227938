"""Numbering by kernels compiled for CUDA GPUs, csrc/cuda/numbering.cpp: all sizes of a layout
together, with one wait. The numbers are the same as those of `numbering.py`, which takes over when
a layout is too large for the kernels' counters.

hash_mask: the bits of the hashes that are used, so that a test can make hashes collide.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import numbering
from .contract import Lists

COUNTED = 2**30  # the kernels count in 30 bits; two more say what a count means
ALL_BITS = 2**32 - 1
CHUNK = 256  # places; those of each size are padded to whole chunks


def of(namespace: str) -> dict[str, Callable[..., Any]]:
    """These functions as fields of a `Backend` whose operators are in this namespace."""
    operators = getattr(torch.ops, namespace)
    functions: dict[str, Callable[..., Any]] = {
        "find_codes": find_codes,
        "find_windows": find_windows,
        "find_patches": find_patches,
    }
    return {name: functools.partial(function, operators) for name, function in functions.items()}


def find_codes(
    operators: Any, segmap: Tensor, hash_mask: int = ALL_BITS
) -> tuple[Tensor, Tensor] | None:
    if len(segmap) * segmap.shape[2:].numel() >= COUNTED:
        return numbering.find_codes(segmap)
    return tuple(operators.find_codes(segmap, hash_mask)) or None


def find_windows(
    operators: Any,
    codes: Tensor,
    sizes: Sequence[Sequence[int]],
    kernel_size: int,
    num_codes: int,
    dtype: torch.dtype = torch.float32,
    hash_mask: int = ALL_BITS,
) -> list[tuple[Lists, Lists, Tensor, Tensor]]:
    if not _can_be_counted(codes, sizes, kernel_size, num_codes):
        if len(sizes) == 1:
            return numbering.find_windows(codes, sizes, kernel_size, num_codes, dtype)
        return [
            find_windows(operators, codes, [size], kernel_size, num_codes, dtype)[0]
            for size in sizes
        ]
    found = operators.find_windows(
        codes,
        _nearest(tuple(codes.shape[1:]), tuple(sizes), numbering.reckoned(codes, dtype)),
        [length for size in sizes for length in size],
        kernel_size,
        num_codes,
        hash_mask,
    )
    _require_rows(found, num_codes)
    return [
        (tuple(found[at : at + 4]), tuple(found[at + 4 : at + 8]), *found[at + 8 : at + 10])
        for at in range(0, len(found), 10)
    ]


def find_patches(
    operators: Any,
    codes: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    num_codes: int,
    hash_mask: int = ALL_BITS,
) -> tuple[Tensor, Lists, Tensor, Tensor]:
    size = [(length + 2 * padding - kernel_size) // stride + 1 for length in codes.shape[1:]]
    if (
        max(kernel_size, stride, padding) >= COUNTED
        or not _can_be_counted(codes, [size], kernel_size, num_codes)
        or not _can_be_counted(codes, [codes.shape[1:]], 1, num_codes)
    ):
        return numbering.find_patches(codes, kernel_size, stride, padding, num_codes)
    found = operators.find_patches(codes, kernel_size, stride, padding, num_codes, hash_mask)
    _require_rows(found, num_codes)
    *sums, index, order, contents = found
    return contents, tuple(sums), index, order


def _require_rows(found, num_codes):
    if not found:
        raise ValueError(
            f"codes has numbers that are not rows of the palette; they should be 0 to"
            f" {num_codes - 1}"
        )


def _can_be_counted(codes, sizes, kernel_size, num_codes):
    """Whether the lists of these sizes are certain to be shorter than the kernels can count."""
    taps, images = kernel_size ** (codes.dim() - 1), len(codes)
    places = sum(images * math.prod(size) + CHUNK for size in sizes)
    return places * (2 * taps + 1 + images) + len(sizes) * (num_codes * taps + 2) < COUNTED


@functools.lru_cache(1024)
def _nearest(given, sizes, reckoned):
    """The source pixel of each place, for each axis of each size in turn: one int32 tensor."""
    return torch.cat(
        [
            numbering.resize_codes(
                torch.arange(length, dtype=torch.int32, device="cpu")[None], (wanted,), reckoned
            )[0]
            for size in sizes
            for length, wanted in zip(given, size)
        ]
    )
