"""The planes of a batch norm in eval mode, from its running statistics and its own parameters:
shift = mean, scale = weight / sqrt(variance + eps), offset = bias.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PLANES = tl.constexpr(256)  # planes per program


@triton.jit
def running_planes_kernel(mean, variance, weight, bias, planes, eps, channels, images_channels):
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)
    channel, inside = plane % channels, plane < images_channels
    scale = 1 / tl.sqrt_rn(tl.load(variance + channel, inside, 1.0).to(tl.float32) + eps)
    offset = tl.zeros([PLANES], tl.float32)
    if weight is not None:
        scale *= tl.load(weight + channel, inside, 0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    tl.store(planes + plane, tl.load(mean + channel, inside, 0.0).to(tl.float32), inside)
    tl.store(planes + images_channels + plane, scale, inside)
    tl.store(planes + 2 * images_channels + plane, offset, inside)


def running_planes(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    images, channels = x.shape[:2]
    planes = x.new_empty(3, images, channels, dtype=torch.float32)
    given = [None if one is None else one.contiguous() for one in (mean, variance, weight, bias)]
    grid = (triton.cdiv(images * channels, PLANES.value),)
    running_planes_kernel[grid](*given, planes, eps, channels, images * channels)
    return planes
