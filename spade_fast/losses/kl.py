"""The encoder's loss: the divergence of its distribution of z from the standard normal one."""

import torch

from ..kernels.contract import sum_dtype


def kl_divergence(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """−½ Σ (1 + logvar − μ² − exp(logvar)), a scalar: the Kullback-Leibler divergence of normal
    distributions from the standard one (Kingma and Welling 2014, appendix B). It is the sum over
    z's components and over images, as in the published code: it doubles with the batch.

    The published weight of 0.05 is not included. float16 and bfloat16 are summed in float32.

    Args:
        mu, logvar: [N, z_dim], as ConvEncoder returns them.

    Raises:
        ValueError, TypeError: they are not floating-point tensors of one shape.
    """
    for name, tensor in {"mu": mu, "logvar": logvar}.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name} is {kind}; it should be a floating-point tensor")
    if mu.shape != logvar.shape:
        raise ValueError(
            f"logvar has shape {list(logvar.shape)}; it should be that of mu, {list(mu.shape)}"
        )
    mu, logvar = (tensor.to(sum_dtype(tensor.dtype)) for tensor in (mu, logvar))
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
