"""Numbering by kernels compiled for CUDA GPUs, csrc/cuda/numbering.cpp: up to MOST_SIZES sizes of a
layout together, with one wait. The numbers are the same as those of `numbering.py`, which takes
over when a layout is too large for the kernels' counters.

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
MOST_SIZES = 16  # what a kernel must know of all sizes has to fit among its parameters
MOST_PIXELS = 2**24  # along an axis: positions are computed in float32


def of(namespace: str) -> dict[str, Any]:
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
    """More than MOST_SIZES sizes take a wait for each MOST_SIZES of them, and sizes that are too
    large for one call take one each.
    """
    can_be_counted = _can_be_counted(codes, sizes, kernel_size, num_codes)
    if len(sizes) == 1 and not can_be_counted:
        return numbering.find_windows(codes, sizes, kernel_size, num_codes, dtype)
    if len(sizes) > MOST_SIZES or not can_be_counted:
        step = MOST_SIZES if can_be_counted else 1
        groups = [sizes[first : first + step] for first in range(0, len(sizes), step)]
        rest = (kernel_size, num_codes, dtype, hash_mask)
        return [found for group in groups for found in find_windows(operators, codes, group, *rest)]
    lengths = [length for size in sizes for length in size]
    found = operators.find_windows(codes, lengths, kernel_size, num_codes, hash_mask)
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
    if max(kernel_size, stride, padding) >= COUNTED or not _can_be_counted(
        codes, [size], kernel_size, num_codes
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
    """Whether the kernels can count the pixels of codes, and are certain to be able to count the
    entries of these sizes' lists.
    """
    taps, images = kernel_size ** (codes.dim() - 1), len(codes)
    places = sum(images * math.prod(size) + CHUNK for size in sizes)
    entries = places * (2 * taps + 1 + images) + len(sizes) * (num_codes * taps + 2)
    return entries < COUNTED and max(codes.shape[1:]) <= MOST_PIXELS
