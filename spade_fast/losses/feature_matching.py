"""Feature matching: fakes should have the same features in the discriminator as reals."""

import torch

from ..kernels.contract import sum_dtype
from .scales import Results, check_alike


def feature_matching(fakes: Results, reals: Results) -> torch.Tensor:
    """1/S · Σ_s Σ_l mean|fake_s,l − real_s,l| over the S scales and all layers but the last of each
    (Wang et al. 2018; the sum over layers and the mean over scales as in the published code of
    SPADE), a scalar. No gradients flow to the reals.

    The published weight of 10 is not included. float16 and bfloat16 are summed in float32.

    Args:
        fakes, reals: for each scale, a list of its layers' results, as `halves` returns them.

    Raises:
        ValueError, TypeError: they are not as described above, or differ in shape.
    """
    check_alike(fakes, reals)
    distances = [
        (fake - real.detach()).abs().mean(dtype=sum_dtype(fake.dtype))
        for fake_scale, real_scale in zip(fakes, reals)
        for fake, real in zip(fake_scale[:-1], real_scale[:-1])
    ]
    if not distances:
        raise ValueError("fakes has one layer in each scale; it should have layers before the last")
    return torch.stack(distances).sum() / len(fakes)
