"""The multi-scale discriminator, which judges how real each patch of an image looks with its
condition, at several scales.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..arguments import whole_number
from ..layout import SemanticLayout
from ..ops.convolve_windows import convolve_windows
from ..ops.modulate import spade_modulate
from ..recording import is_recorded
from .arguments import remember
from .choice import find_layout
from .config import dimensions
from .modules import CONVOLUTIONS, Convolution, check_dtype, first_weight, is_plain, is_watched
from .normalised import NEGATIVE_SLOPE, NormalisedConvolution
from .pixels import FORMATS
from .tables import dtype_of_convolution

POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
HALF: dict[str, Any] = {
    "kernel_size": 3,
    "stride": 2,
    "padding": 1,
    "count_include_pad": False,
}  # the pooling from one scale to the next
WIDEST = 512  # the most channels of a convolution's result


class PatchDiscriminator(nn.Module):
    """n_layers + 1 convolutions with 4 taps per axis. Given a layout, the first one looks up the
    condition's share of its result in a table, which has a row for each distinct window.
    """

    def __init__(
        self, input_nc: int, ndf: int = 64, *, n_layers: int = 4, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        convolution, width = CONVOLUTIONS[spatial_dims], ndf
        self.model0 = nn.Sequential(
            convolution(input_nc, ndf, 4, stride=2, padding=2), nn.LeakyReLU(NEGATIVE_SLOPE)
        )
        for number in range(1, n_layers):
            before, width = width, min(2 * width, WIDEST)
            layer = NormalisedConvolution(
                before,
                width,
                4,
                stride=1 if number == n_layers - 1 else 2,
                padding=2,
                spatial_dims=spatial_dims,
            )
            self.add_module(f"model{number}", nn.Sequential(layer))
        self.add_module(f"model{n_layers}", nn.Sequential(convolution(width, 1, 4, padding=2)))

    def forward(self, x: torch.Tensor, layout: SemanticLayout | None = None) -> list[torch.Tensor]:
        """The results of all layers. The last, [N, 1, *size], says how real each patch looks; the
        others are features.

        x: [N, input_nc, *spatial], condition and image together, or the image alone if there is a
        layout.
        """
        if layout is not None and self._may_look_up(x, layout):
            results = [self._first(x, layout)]
        else:
            results = [self.model0(x if layout is None else together(layout, x))]
        for layer in list(self.children())[1:]:
            results.append(layer(results[-1]))
        return results

    def _may_look_up(self, image, layout):
        """Whether windows suffice for the first layer: a plain convolution, then leaky ReLU."""
        if is_recorded(image) or is_watched(self.model0) or len(self.model0) != 2:
            return False
        convolution, activation = self.model0
        is_known = is_plain(convolution, CONVOLUTIONS.values())
        if not is_known or not isinstance(convolution, Convolution):
            return False
        sizes = (convolution.kernel_size, convolution.stride, convolution.padding)
        channels = layout.label_nc + image.shape[1]
        return (
            is_plain(activation, (nn.LeakyReLU,))
            and convolution.padding_mode == "zeros"
            and convolution.groups == 1
            and set(convolution.dilation) == {1}
            and all(isinstance(size, tuple) and len(set(size)) == 1 for size in sizes)
            and convolution.weight.shape[1:] == (channels, *convolution.kernel_size)
        )

    def _first(self, image: torch.Tensor, layout: SemanticLayout) -> torch.Tensor:
        convolution, activation = self.model0
        assert isinstance(convolution, Convolution) and isinstance(activation, nn.LeakyReLU)
        assert isinstance(convolution.padding, tuple)
        of_condition, of_image = convolution.weight.split([layout.label_nc, image.shape[1]], dim=1)
        x = convolution._conv_forward(image, of_image, convolution.bias)
        patches = layout.patches(
            convolution.kernel_size[0], convolution.stride[0], convolution.padding[0]
        )
        dtype = dtype_of_convolution(image, convolution.weight.dtype)
        table = convolve_windows(layout.palette, of_condition, None, patches.sums, dtype).to(dtype)
        # Adding to x the row of each position's window, then leaky ReLU: this is a modulation
        # without a norm, with γ = 0.
        return spade_modulate(
            x,
            torch.zeros_like(table),
            table,
            index=patches.index,
            order=patches.order,
            norm=None,
            activation="leaky_relu",
            negative_slope=activation.negative_slope,
        )


class MultiscaleDiscriminator(nn.Module):
    """A PatchDiscriminator for each scale, every scale half the size of the previous one (Park et
    al. 2019, figure 13), with the published keys. A new network has PyTorch's default
    initialisation; `initialise(network)` gives it the published one.

    Args:
        input_nc: channels of condition and image together.
        n_scales: the number of scales.
        ndf: channels of the first convolution's result; each further one has twice as many, up to
            512.
        n_layers: layers of each scale before the last one, which has one channel.
        spatial_dims: 1, 2 or 3.
    """

    __call__: Callable[..., list[list[torch.Tensor]]]  # nn.Module's returns Any
    arguments: dict[str, Any]

    def __init__(
        self,
        input_nc: int,
        n_scales: int = 2,
        ndf: int = 64,
        *,
        n_layers: int = 4,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        input_nc, n_scales, ndf, n_layers = (
            whole_number("input_nc", input_nc, least=1),
            whole_number("n_scales", n_scales, least=1),
            whole_number("ndf", ndf, least=1),
            whole_number("n_layers", n_layers, least=1),
        )
        self.input_nc, self.spatial_dims = input_nc, dimensions(spatial_dims)
        for number in range(n_scales):
            self.add_module(
                f"discriminator_{number}",
                PatchDiscriminator(
                    input_nc, ndf, n_layers=n_layers, spatial_dims=self.spatial_dims
                ),
            )
        remember(
            self,
            {
                "input_nc": input_nc,
                "n_scales": n_scales,
                "ndf": ndf,
                "n_layers": n_layers,
                "spatial_dims": self.spatial_dims,
            },
        )

    def forward(
        self, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout | None = None
    ) -> list[list[torch.Tensor]]:
        """For each scale, a list of its layers' results: the last is [M, 1, *size], the others are
        features.

        Args:
            x: [M, input_nc, *spatial], the condition and the image together; with segmap, the image
                alone.
            segmap: the condition, [N, channels, *spatial] or a SemanticLayout, which is looked up
                without building a one-hot map unless hooks, tracers or a replaced first layer need
                one. M is a multiple of N: image i has condition i % N, so fake and real images may
                go through together.

        Raises:
            ValueError, TypeError: if an argument is not as described above; the message names it.
        """
        layout = self._check(x, segmap)
        if layout is None and isinstance(segmap, torch.Tensor):
            times = len(x) // max(1, len(segmap))
            x = torch.cat([segmap.repeat(times, *[1] * (segmap.dim() - 1)), x], dim=1)
        elif layout is not None:
            layout = layout.repeat(len(x) // max(1, len(layout))) if len(x) else layout[:0]
            x = x.contiguous(
                memory_format=FORMATS.get(x.dim(), torch.contiguous_format)
            )  # channels-last suits looking up rows of a table
        results = []
        for number, discriminator in enumerate(self.children()):
            if number > 0:
                x = POOLS[self.spatial_dims](x, **HALF)
                layout = None if layout is None else layout.avg_pool(**HALF)
            if layout is not None and not is_watched(discriminator):
                results.append(discriminator(x, layout))
            else:
                results.append(discriminator(x if layout is None else together(layout, x)))
        return results

    def _check(self, x, segmap):
        """The layout of segmap, or None. Raises ValueError or TypeError, naming the argument."""
        spatial = ", ".join("DHW"[-self.spatial_dims :])
        for name, tensor in {"x": x, "segmap": segmap}.items():
            if name == "segmap" and (tensor is None or isinstance(tensor, SemanticLayout)):
                continue
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise TypeError(f"{name} is {kind}; it should be a floating-point tensor")
            if tensor.dim() != self.spatial_dims + 2:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}; it should be [N, channels, {spatial}]"
                )
        layout, weight = None if segmap is None else find_layout(segmap), first_weight(self)
        check_dtype("x", x, weight)
        if isinstance(segmap, torch.Tensor) and layout is None:
            check_dtype("segmap", segmap, weight)
        of_condition, size = 0, x.shape[2:]
        if segmap is not None:
            of_condition = segmap.shape[1] if layout is None else layout.label_nc
            size = segmap.shape[2:] if layout is None else layout.codes.shape[1:]
            if size != x.shape[2:]:
                raise ValueError(
                    f"segmap has the size {list(size)}; it should be the image's size,"
                    f" {list(x.shape[2:])}"
                )
            if len(segmap) == 0 or len(x) % len(segmap):
                raise ValueError(
                    f"x has a batch of {len(x)}; it should be a multiple of segmap's, {len(segmap)}"
                )
        if x.shape[1] + of_condition != self.input_nc:
            beside = f" and segmap {of_condition}" if of_condition else ""
            raise ValueError(
                f"x has {x.shape[1]} channels{beside}, there should be {self.input_nc} in total"
            )
        return layout


def together(layout: SemanticLayout, image: torch.Tensor) -> torch.Tensor:
    """The condition's channels, then the image's: [N, label_nc + C, *spatial]."""
    return torch.cat([layout.to_segmap(image.dtype), image], dim=1)
