"""From what the splits of planes have found to numbers of each plane."""

import triton
import triton.language as tl

BLOCK = 128  # planes of a program


@triton.jit
def combine_moments_kernel(
    parts, moments, planes, eps, images_channels, pixels, splits, split_pixels, BLOCK: tl.constexpr
):
    """Mean and squared deviations of parts [splits, 3, N·C] together (Chan et al. 1979); for
    instance norm, its planes.
    """
    plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = plane < images_channels
    pivot = tl.load(parts + plane, inside, 0.0)  # as in plane_moments.py
    distance, squares, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), 0.0
    for split in range(splits):
        part = parts + 3 * split * images_channels + plane
        added = tl.maximum(0, tl.minimum(split_pixels, pixels - split * split_pixels)).to(
            tl.float32
        )
        total = tl.maximum(count + added, 1.0)
        difference = (
            (tl.load(part, inside, 0.0) - pivot)
            + tl.load(part + images_channels, inside, 0.0)
            - distance
        )
        distance += difference * (added / total)
        squares += tl.load(part + 2 * images_channels, inside, 0.0) + difference * difference * (
            count * added / total
        )
        count += added
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
        tl.store(planes + 2 * images_channels + plane, tl.zeros([BLOCK], tl.float32), inside)


@triton.jit
def combine_sums_kernel(
    parts, sums, planes, terms, images_channels, pixels, splits, BLOCK: tl.constexpr
):
    """Sums of parts [splits, 2, N·C]; for instance norm, with its planes, the terms of dx."""
    plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = plane < images_channels
    q, q_deviation = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        part = parts + 2 * split * images_channels + plane
        q += tl.load(part, inside, 0.0)
        q_deviation += tl.load(part + images_channels, inside, 0.0)
    if terms is None:
        tl.store(sums + plane, q, inside)
        tl.store(sums + images_channels + plane, q_deviation, inside)
    else:
        scale = tl.load(planes + images_channels + plane, inside, 0.0)
        mean_scale = scale / -tl.maximum(pixels, 1).to(tl.float32)
        tl.store(terms + plane, q * mean_scale, inside)
        tl.store(terms + images_channels + plane, q_deviation * mean_scale * scale * scale, inside)


def combine_moments(parts, split_pixels, x, eps=None):
    """Moments [2, N, C] from parts [splits, 3, N, C]; for instance norm, which gives its eps,
    planes [3, N, C].
    """
    splits, _, images, channels = parts.shape
    result = parts.new_empty(2 if eps is None else 3, images, channels)
    moments, planes = (result, None) if eps is None else (None, result)
    combine_moments_kernel[(triton.cdiv(images * channels, BLOCK),)](
        parts,
        moments,
        planes,
        0.0 if eps is None else eps,
        images * channels,
        x.shape[2:].numel(),
        splits,
        split_pixels,
        BLOCK=BLOCK,
    )
    return result


def combine_sums(parts, x, planes=None):
    """Sums [2, N, C] from parts [splits, 2, N, C]; for instance norm, which gives its planes, terms
    [2, N, C].
    """
    splits, _, images, channels = parts.shape
    result = parts.new_empty(2, images, channels)
    sums, terms = (result, None) if planes is None else (None, result)
    combine_sums_kernel[(triton.cdiv(images * channels, BLOCK),)](
        parts, sums, planes, terms, images * channels, x.shape[2:].numel(), splits, BLOCK=BLOCK
    )
    return result
