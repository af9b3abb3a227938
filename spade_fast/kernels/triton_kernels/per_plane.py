"""Combines the results of a plane's splits into the numbers of each plane."""

import triton
import triton.language as tl
from torch import Tensor

PLANES = tl.constexpr(8)  # per program: one memory access reads as many
SPLITS = tl.constexpr(256)  # of these planes that a program combines at once
WARPS = 8


@triton.jit
def moments_together(distance, squares, count, AXIS: tl.constexpr):
    """Combines the moments of parts along an axis (Chan et al. 1979).

    distance: of each part's mean from a common pivot; squares: its sum of squared deviations;
    count: its number of pixels. Returns distance and squares of all parts together.
    """
    total = tl.maximum(tl.sum(count, axis=AXIS, keep_dims=True), 1.0)
    mean = tl.sum(count * distance, axis=AXIS, keep_dims=True) / total
    rest = distance - mean
    return mean, tl.sum(squares + count * rest * rest, axis=AXIS, keep_dims=True)


@triton.jit
def combine_moments_kernel(parts, moments, planes, eps, images_channels, pixels, splits):
    """The moments of each plane from parts [splits, 4, N·C]; for instance norm, the numbers in
    `planes`. Each element of a tile first combines its own splits, then all elements are combined.
    """
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[None, :]
    pivot = tl.load(parts + plane, plane < images_channels, 0.0)  # from plane_moments.py
    distance, squares, count = (
        tl.zeros([SPLITS, PLANES], tl.float32),
        tl.zeros([SPLITS, PLANES], tl.float32),
        tl.zeros([SPLITS, PLANES], tl.float32),
    )
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[:, None]
        inside = (split < splits) & (plane < images_channels)
        part = parts + 4 * split.to(tl.int64) * images_channels + plane
        difference = tl.load(part, inside, 0.0) - pivot
        difference += tl.load(part + images_channels, inside, 0.0) - distance
        added = tl.load(part + 3 * images_channels, inside, 0.0)
        total = tl.maximum(count + added, 1.0)
        distance += difference * (added / total)
        squares += tl.load(part + 2 * images_channels, inside, 0.0)
        squares += difference * difference * (count * added / total)
        count += added
    distance, squares = moments_together(distance, squares, count, 0)
    inside = plane < images_channels
    mean = pivot + distance
    if planes is None:
        tl.store(moments + plane, mean, inside)
        tl.store(moments + images_channels + plane, squares, inside)
    else:
        tl.store(planes + plane, mean, inside)
        tl.store(
            planes + images_channels + plane,
            1 / tl.sqrt_rn(squares / tl.maximum(pixels, 1).to(tl.float32) + eps),
            inside,
        )
        tl.store(planes + 2 * images_channels + plane, tl.zeros([1, PLANES], tl.float32), inside)


@triton.jit
def combine_sums_kernel(parts, sums, planes, terms, images_channels, pixels, splits):
    """The sums of each plane from parts [splits, 2, N·C]; for instance norm, which passes `planes`,
    the terms of dx.
    """
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[None, :]
    q, q_deviation = (
        tl.zeros([SPLITS, PLANES], tl.float32),
        tl.zeros([SPLITS, PLANES], tl.float32),
    )
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[:, None]
        inside = (split < splits) & (plane < images_channels)
        part = parts + 2 * split.to(tl.int64) * images_channels + plane
        q += tl.load(part, inside, 0.0)
        q_deviation += tl.load(part + images_channels, inside, 0.0)
    q, q_deviation = (
        tl.sum(q, axis=0, keep_dims=True),
        tl.sum(q_deviation, axis=0, keep_dims=True),
    )
    inside = plane < images_channels
    if terms is None:
        tl.store(sums + plane, q, inside)
        tl.store(sums + images_channels + plane, q_deviation, inside)
    else:
        scale = tl.load(planes + images_channels + plane, inside, 0.0)
        mean_scale = scale / -tl.maximum(pixels, 1).to(tl.float32)
        tl.store(terms + plane, q * mean_scale, inside)
        tl.store(terms + images_channels + plane, q_deviation * mean_scale * scale * scale, inside)


def combine_moments(parts: Tensor, x: Tensor, eps: float | None = None) -> Tensor:
    """Moments [2, N, C] from parts [splits, 4, N, C]; for instance norm, which passes eps, planes
    [3, N, C].
    """
    splits, _, images, channels = parts.shape
    result = parts.new_empty(2 if eps is None else 3, images, channels)
    moments, planes = (result, None) if eps is None else (None, result)
    combine_moments_kernel[(triton.cdiv(images * channels, PLANES.value),)](
        parts,
        moments,
        planes,
        0.0 if eps is None else eps,
        images * channels,
        x.shape[2:].numel(),
        splits,
        num_warps=WARPS,
    )
    return result


def combine_sums(parts: Tensor, x: Tensor, planes: Tensor | None = None) -> Tensor:
    """Sums [2, N, C] from parts [splits, 2, N, C]; for instance norm, which passes planes, terms
    [2, N, C].
    """
    splits, _, images, channels = parts.shape
    result = parts.new_empty(2, images, channels)
    sums, terms = (result, None) if planes is None else (None, result)
    combine_sums_kernel[(triton.cdiv(images * channels, PLANES.value),)](
        parts, sums, planes, terms, images * channels, x.shape[2:].numel(), splits, num_warps=WARPS
    )
    return result
