"""The encoder of the variational generator, which turns an image into the mean and the log variance
of its style, z.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..arguments import whole_number
from .arguments import remember
from .modules import check_dtype, first_weight
from .normalised import NormalisedConvolution
from .pixels import same_size

SIZE = 256  # every image is resized to this first, because the linear layers fit no other size


class ConvEncoder(nn.Module):
    """Six convolutions of stride 2, with spectral and instance norm, then one linear layer for the
    mean and one for the log variance (Park et al. 2019, figure 14), with the state_dict keys of the
    published code. A new network has PyTorch's default initialisation; `initialise(network)` gives
    it the published one.

    Args:
        ndf: channels of the first convolution's result.
        z_dim: length of z.
        input_nc: channels of the image.
    """

    __call__: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # nn.Module's returns Any
    arguments: dict[str, Any]
    layer1: NormalisedConvolution

    def __init__(self, ndf: int = 64, z_dim: int = 256, *, input_nc: int = 3) -> None:
        super().__init__()
        ndf, z_dim, input_nc = (
            whole_number("ndf", ndf, least=1),
            whole_number("z_dim", z_dim, least=1),
            whole_number("input_nc", input_nc, least=1),
        )
        widths = [input_nc, *(ndf * multiple for multiple in (1, 2, 4, 8, 8, 8))]
        for number, (before, width) in enumerate(itertools.pairwise(widths), start=1):
            self.add_module(
                f"layer{number}", NormalisedConvolution(before, width, 3, stride=2, padding=1)
            )
        features = widths[-1] * (SIZE // 2 ** (len(widths) - 1)) ** 2
        self.fc_mu = nn.Linear(features, z_dim)
        self.fc_var = nn.Linear(features, z_dim)
        remember(self, {"ndf": ndf, "z_dim": z_dim, "input_nc": input_nc})

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean and the log variance of z, both [N, z_dim], for images [N, input_nc, H, W]
        between −1 and 1. Errors: ValueError, TypeError if image is anything else.
        """
        channels = self.layer1.convolution.in_channels
        if not isinstance(image, torch.Tensor) or image.dim() != 4 or image.shape[1] != channels:
            shape = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"image is {shape}; it should be a tensor [N, {channels}, H, W]")
        check_dtype("image", image, first_weight(self.layer1))
        x = image
        if not same_size(x.shape[2:], (SIZE, SIZE)):
            x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear")
        for layer in list(self.children())[:-2]:
            x = layer(x)
        x = x.flatten(1)
        return self.fc_mu(x), self.fc_var(x)


def reparameterize(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Draws z from the normal distribution with mean `mu` and log variance `logvar`, differentiable
    in both (Kingma and Welling 2014).
    """
    return mu + torch.randn_like(mu) * (0.5 * logvar).exp()
