"""The two passes that find a layout in a condition: hashing its pixels' vectors, and comparing
them. Each reads the condition once.

`numbering.py` uses these passes, and has the same in plain PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import numbering
from . import plan


@triton.jit
def hash_kernel(
    bits,
    hashes,
    count,
    channels,
    pixels,
    image_stride,
    channel_stride,
    pixel_stride,
    multiplier,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    vector = bits + (at // pixels * image_stride + at % pixels * pixel_stride)
    found = tl.zeros([BLOCK], tl.int64)
    for _ in range(channels):
        found = found * multiplier + tl.load(vector, at < count, 0)
        vector += channel_stride
    tl.store(hashes + at, found, at < count)


@triton.jit
def differ_kernel(
    bits,
    firsts,
    differ,
    count,
    channels,
    pixels,
    image_stride,
    channel_stride,
    pixel_stride,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(firsts + at, at < count, 0)
    vector = bits + (at // pixels * image_stride + at % pixels * pixel_stride)
    first_vector = bits + (first // pixels * image_stride + first % pixels * pixel_stride)
    found = tl.zeros([BLOCK], tl.int1)
    for _ in range(channels):
        found |= tl.load(vector, at < count, 0) != tl.load(first_vector, at < count, 0)
        vector, first_vector = vector + channel_stride, first_vector + channel_stride
    tl.store(differ + tl.program_id(0), tl.max(found.to(tl.int32), axis=0))


def hash_vectors(bits: Tensor, multiplier: int) -> Tensor:
    images, channels, pixels = bits.shape
    hashes = torch.empty(images, pixels, dtype=torch.int64, device=bits.device)
    grid, settings = plan.blocks(hashes.numel())
    hash_kernel[grid](
        bits, hashes, hashes.numel(), channels, pixels, *bits.stride(), multiplier, **settings
    )
    return hashes


def vectors_differ(bits: Tensor, firsts: Tensor) -> Tensor:
    _, channels, pixels = bits.shape
    grid, settings = plan.blocks(firsts.numel())
    differ = torch.zeros(grid, dtype=torch.int32, device=bits.device)
    differ_kernel[grid](
        bits, firsts, differ, firsts.numel(), channels, pixels, *bits.stride(), **settings
    )
    return differ.any()


def find_codes(segmap: Tensor) -> tuple[Tensor, Tensor] | None:
    return numbering.find_codes_by(segmap, hash_vectors, vectors_differ)
