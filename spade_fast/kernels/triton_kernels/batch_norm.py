"""What batch norm does between the kernels that pass over x, as arithmetic on the numbers of the
planes. A program has some channels, and pools their planes over the batch. Plain PyTorch needs a
dozen launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = tl.constexpr(128)  # channels per program


@triton.jit
def batch_planes_kernel(
    moments, weight, bias, planes, statistics, eps, pixels, parts, images, channels
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside, all = channel < channels, images * channels
    mean, squares = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for image in range(images):
        mean += tl.load(moments + image * channels + channel, inside, 0.0)
    mean, total = tl.div_rn(mean, parts), pixels * parts
    for image in range(images):
        plane = moments + image * channels + channel
        deviation = tl.load(plane, inside, 0.0) - mean
        squares += tl.load(plane + all, inside, 0.0) + pixels * deviation * deviation
    inverse = 1 / tl.sqrt_rn(tl.div_rn(squares, tl.maximum(total, 1.0)) + eps)
    tl.store(statistics + channel, mean, inside)
    tl.store(statistics + channels + channel, inverse, inside)
    tl.store(statistics + 2 * channels + channel, tl.div_rn(squares, total - 1), inside)
    offset = tl.zeros([CHANNELS], tl.float32)
    if weight is not None:
        inverse *= tl.load(weight + channel, inside, 0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    for image in range(images):
        plane = planes + image * channels + channel
        tl.store(plane, mean, inside)
        tl.store(plane + all, inverse, inside)
        tl.store(plane + 2 * all, offset, inside)


@triton.jit
def batch_terms_kernel(sums, inverse_deviation, weight, terms, pixels, parts, images, channels):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside, all = channel < channels, images * channels
    q, q_deviation = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for image in range(images):
        plane = sums + image * channels + channel
        q += tl.load(plane, inside, 0.0)
        q_deviation += tl.load(plane + all, inside, 0.0)
    inverse = tl.load(inverse_deviation + channel, inside, 0.0)
    share = tl.div_rn(inverse, -tl.maximum(pixels * parts, 1.0))
    if weight is not None:
        share *= tl.load(weight + channel, inside, 0.0).to(tl.float32)
    for image in range(images):
        plane = terms + image * channels + channel
        tl.store(plane, q * share, inside)
        tl.store(plane + all, q_deviation * share * inverse * inverse, inside)


def batch_planes(
    x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    images, channels = x.shape[:2]
    planes = x.new_empty(3, images, channels, dtype=torch.float32)
    statistics = x.new_empty(3, channels, dtype=torch.float32)
    given = [None if one is None else one.contiguous() for one in (moments, weight, bias)]
    grid = (triton.cdiv(channels, CHANNELS.value),)
    batch_planes_kernel[grid](*given, planes, statistics, eps, *sizes_of(x))
    return planes, statistics


def batch_terms(
    x: Tensor, sums: Tensor, inverse_deviation: Tensor, weight: Tensor | None
) -> Tensor:
    images, channels = x.shape[:2]
    terms = x.new_empty(2, images, channels, dtype=torch.float32)
    given = [None if one is None else one.contiguous() for one in (sums, inverse_deviation, weight)]
    grid = (triton.cdiv(channels, CHANNELS.value),)
    batch_terms_kernel[grid](*given, terms, *sizes_of(x))
    return terms


def sizes_of(x: Tensor) -> tuple[float, float, int, int]:
    """The pixels of a plane and the planes of a channel, at least one, as numbers to compute with
    (a whole number that is 1 would be a constant of the kernel); and both dimensions to count with.
    """
    images, channels = x.shape[:2]
    return float(x.shape[2:].numel()), float(max(images, 1)), images, channels
