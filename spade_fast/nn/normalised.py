"""The layer of the encoder and the discriminator: a convolution under spectral norm, instance norm,
leaky ReLU.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..recording import may_overwrite
from .modules import CONVOLUTIONS, INSTANCE_NORMS, Convolution, is_plain
from .spectral import convolve

NEGATIVE_SLOPE = 0.2


class NormalisedConvolution(nn.Sequential):
    """leaky_relu(instance_norm(convolution(x))), with the state_dict of a Sequential of convolution
    and norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        spatial_dims: int = 2,
        **settings: Any,
    ) -> None:
        convolution = CONVOLUTIONS[spatial_dims](
            in_channels, out_channels, kernel_size, bias=False, **settings
        )
        super().__init__(
            nn.utils.spectral_norm(convolution), INSTANCE_NORMS[spatial_dims](out_channels)
        )

    @property
    def convolution(self) -> Convolution:
        convolution = self[0]
        assert isinstance(convolution, Convolution)
        return convolution

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self[1](convolve(self.convolution, x))
        own = is_plain(self[1], INSTANCE_NORMS.values()) and may_overwrite()
        return (F.leaky_relu_ if own else F.leaky_relu)(x, NEGATIVE_SLOPE)
