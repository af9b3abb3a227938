"""The generator: noise or the condition becomes a small first map, and residual blocks turn that
map into an image, one size after another.
"""

import inspect
import itertools
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..arguments import whole_number
from ..layout import SemanticLayout
from ..recording import is_recorded, of_their_class
from .arguments import remember
from .block import ResidualBlock, SPADEResnetBlock
from .choice import current_mode, find_layout
from .config import dimensions, parse_config
from .modules import (
    CONVOLUTIONS,
    check_dtype,
    dtype_of_weights,
    is_plain,
    keeps_size,
    taps_of,
    weight_met_on,
)
from .pixels import dense, resize
from .recompute import recomputed
from .spade import SpatiallyAdaptive, batch_of
from .spectral import fold_spectral_norm
from .upsampled import convolve_repeated, may_sum_weights, repeat_pixels, repeats_exactly

if TYPE_CHECKING:
    from typing_extensions import Self


class Stage(NamedTuple):
    """One residual block of a generator."""

    name: str
    width: float  # channels of its result, in multiples of ngf
    scale: int  # the factor by which it enlarges its x first, by nearest neighbour


FROM_NOISE = (
    Stage("head", 16, 1),
    *(Stage(f"up_{number}", width, 2) for number, width in enumerate((16, 8, 4, 2, 1), start=1)),
)
NORM_G = "spectralspadesyncbatch3x3"


Dataset = Literal["coco", "ade20k", "cityscapes"]
Doublings = Literal["normal", "more", "most"]


class Published(NamedTuple):
    """The settings of a published network."""

    label_nc: int  # channels of the condition: classes, "don't care", instance edges
    crop_size: int = 256  # width of the image
    aspect_ratio: float = 1.0  # width / height
    num_upsampling_layers: str = "normal"


PUBLISHED = {
    "coco": Published(184),
    "ade20k": Published(151),
    "cityscapes": Published(36, 512, 2.0, "more"),
}
DOUBLINGS = {"normal": 5, "more": 6, "most": 7}
FARTHEST = 1000  # how many widths of the first map are tried to find a size to propose


class SPADEGenerator(nn.Module):
    """Generates an image from a condition (Park et al. 2019, figure 4): a first map, residual
    blocks, a convolution, tanh.

    By default it begins with noise at 4×4 and ends at 256×256; `official` builds the published
    networks. A new network has PyTorch's default initialisation; `initialise(network)` gives it the
    published one.

    Args:
        label_nc: channels of the condition.
        z_dim: length of the noise from which a linear layer computes the first map; if None, a
            convolution of the condition computes it.
        ngf: the number of channels that `stages` has multiples of; the first map has 16 · ngf.
        stages: the blocks, one `Stage` each.
        last_scale: the factor by which the last block's result is enlarged.
        start: size of the first map, one number or one for each axis.
        norm_G, nhidden: settings of the blocks: see SPADEResnetBlock.
        output_nc: channels of the image.
        spatial_dims: 1, 2 or 3.

    Attributes:
        recompute: whether to use gradient checkpointing. A forward in train mode then keeps only
            the input of each block, and backward recomputes the block, which takes the time of a
            second forward. The numbers are the same to the bit; running statistics and the vectors
            of spectral norm change once per forward. Hooks inside a block run in backward, too. A
            block that is itself watched by hooks is not recomputed, nor is any block of a network
            that torch.compile or torch.export records, or that is captured in a CUDA graph. If
            weights are written to before backward, backward raises RuntimeError. This is not a
            constructor argument, because it does not change the network.
    """

    recompute = False
    __call__: Callable[..., torch.Tensor]  # nn.Module's returns Any
    arguments: dict[str, Any]

    def __init__(
        self,
        label_nc: int,
        z_dim: int | None = 256,
        ngf: int = 64,
        *,
        stages: Iterable[Sequence[Any]] = FROM_NOISE,
        last_scale: int = 2,
        start: int | Iterable[int] = 4,
        norm_G: str = "spadeinstance3x3",
        nhidden: int = 128,
        output_nc: int = 3,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        spatial_dims = dimensions(spatial_dims)
        label_nc, ngf, nhidden, output_nc, last_scale = (
            whole_number("label_nc", label_nc, least=1),
            whole_number("ngf", ngf, least=1),
            whole_number("nhidden", nhidden, least=1),
            whole_number("output_nc", output_nc, least=1),
            whole_number("last_scale", last_scale, least=1),
        )
        z_dim = None if z_dim is None else whole_number("z_dim", z_dim, least=1)
        self.start = _first_size(start, spatial_dims)
        own = inspect.signature(SPADEGenerator).parameters
        taken = {*dir(self), *own, "kernel_size", "arguments", "made_with"}
        self.stages = _checked(stages, ngf, taken)
        self.label_nc, self.z_dim, self.last_scale = label_nc, z_dim, last_scale
        self.kernel_size = parse_config(norm_G, "norm_G").kernel_size
        width, convolution = 16 * ngf, CONVOLUTIONS[spatial_dims]
        self.fc: nn.Module
        if z_dim is None:
            self.fc = convolution(label_nc, width, 3, padding=1)
        else:
            self.fc = nn.Linear(z_dim, width * torch.Size(self.start).numel())
        for stage in self.stages:
            before, width = width, int(stage.width * ngf)
            self.add_module(
                stage.name,
                SPADEResnetBlock(
                    before, width, norm_G, label_nc, nhidden=nhidden, spatial_dims=spatial_dims
                ),
            )
        self.conv_img = convolution(width, output_nc, 3, padding=1)
        remember(
            self,
            {
                "label_nc": label_nc,
                "z_dim": z_dim,
                "ngf": ngf,
                "stages": [list(stage) for stage in self.stages],
                "last_scale": last_scale,
                "start": list(self.start),
                "norm_G": str(norm_G),
                "nhidden": nhidden,
                "output_nc": output_nc,
                "spatial_dims": spatial_dims,
            },
        )

    @classmethod
    def official(
        cls,
        dataset: Dataset | int,
        *,
        use_vae: bool = False,
        crop_size: int | None = None,
        aspect_ratio: float | None = None,
        num_upsampling_layers: Doublings | None = None,
        norm_G: str = NORM_G,
        z_dim: int = 256,
        ngf: int = 64,
        nhidden: int = 128,
    ) -> "Self":
        """The published generator, key for key, whose image is [N, 3, crop_size / aspect_ratio,
        crop_size].

        Args:
            dataset: "coco", "ade20k" or "cityscapes", which decides the arguments that are None; or
                the number of channels of the condition.
            use_vae: whether to begin with z (noise, or from the encoder) rather than with the
                condition.
            crop_size: width of the image.
            aspect_ratio: width / height of the image.
            num_upsampling_layers: "normal", "more" or "most": 5, 6 or 7 doublings.
            norm_G, z_dim, ngf, nhidden: see the class.

        Raises:
            ValueError, TypeError: if an argument is not as described above. If no image of that
                size can be made, the message names the nearest sizes.
        """
        return cls(
            **official_arguments(
                dataset,
                crop_size=crop_size,
                aspect_ratio=aspect_ratio,
                num_upsampling_layers=num_upsampling_layers,
            ),
            z_dim=whole_number("z_dim", z_dim, least=1) if use_vae else None,
            ngf=ngf,
            norm_G=norm_G,
            nhidden=nhidden,
        )

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """The size of x in each block, for `SemanticLayout.prepare`."""
        sizes, size = [], self.start
        for stage in self.stages:
            size = tuple(stage.scale * length for length in size)
            sizes.append(size)
        return sizes

    def forward(
        self, segmap: torch.Tensor | SemanticLayout, z: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The images [M, output_nc, *size], between −1 and 1.

        Args:
            segmap: [N, label_nc, *any], the condition, or a SemanticLayout of it; resized by
                nearest neighbour.
            z: [M, z_dim], for a generator that begins with noise; drawn from the standard normal
                distribution if None. M is a multiple of N: image i has condition i % N, and what
                depends on the condition alone is computed once.

        Raises:
            ValueError, TypeError: if an argument is not as described above; the message names it.
        """
        z = self._checked(segmap, z)
        times = 1 if z is None else images_of_each(z, segmap)
        layout = find_layout(segmap)
        seen = repeat_images(segmap if layout is None else layout, times)
        prepares = current_mode() != "never" and not torch.compiler.is_compiling()
        if isinstance(seen, SemanticLayout) and prepares and not is_recorded(seen.palette):
            seen.prepare(self.sizes, self.kernel_size)  # waits for a GPU here, nowhere below
        x = self._first_map(seen, z)
        recomputes = self.recompute and self.training and torch.is_grad_enabled()
        run_block = recomputed if recomputes else ResidualBlock.forward
        for stage in self.stages:
            block = getattr(self, stage.name)
            if isinstance(block, ResidualBlock) and block.is_open(x, seen):
                x = run_block(block, x, seen, stage.scale)
            else:
                x = block(repeat_pixels(x, stage.scale), repeat_images(segmap, times))
        x = F.leaky_relu(x, 0.2)
        summed = self.last_scale > 1 and may_sum_weights(x) and not is_recorded(x)
        summed = summed and repeats_exactly(x, self.last_scale)
        plain = is_plain(self.conv_img, CONVOLUTIONS.values())
        if summed and plain and keeps_size(self.conv_img, taps_of(self.conv_img)):
            x = convolve_repeated(self.conv_img, x, self.last_scale)
        else:
            x = self.conv_img(repeat_pixels(x, self.last_scale))
        return of_their_class(torch.tanh(x), segmap)

    def fold_spectral_norm(self) -> "Self":
        """Calls `fold_spectral_norm` on this generator. Raises RuntimeError in train mode."""
        if self.training:
            raise RuntimeError(
                "the generator is in train mode: σ changes in every call, call eval() first"
            )
        return fold_spectral_norm(self)

    def _checked(self, segmap, z):
        """z, drawn if needed but not given. Raises ValueError or TypeError, naming the argument."""
        first = getattr(self, self.stages[0].name)
        if isinstance(first, ResidualBlock) and isinstance(first.norm_0, SpatiallyAdaptive):
            first.norm_0.check_segmap(segmap)
        conditions = batch_of(segmap)
        if self.z_dim is None:
            if z is not None:
                raise ValueError("z should be None: this generator begins with the condition")
            return None
        if z is None:
            return self._drawn(segmap)
        if not isinstance(z, torch.Tensor) or z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(
                f"z is {list(z.shape) if isinstance(z, torch.Tensor) else z!r}; it should be a"
                f" tensor [M, {self.z_dim}]"
            )
        weight = weight_met_on(z.device, self.fc)
        if weight is not None and z.device != weight.device:
            raise ValueError(
                f"z is on {z.device}; it should be on the weights' device, {weight.device}"
            )
        check_dtype("z", z, weight)
        images = z.shape[0]
        if images == conditions:
            return z
        times, rest = divmod(images, max(1, conditions))
        if rest or times == 0 or conditions == 0:
            raise ValueError(
                f"z has a batch of {images}; it should be a multiple of segmap's, {conditions}"
            )
        return z

    def _drawn(self, segmap):
        """z from the standard normal distribution, one for each condition."""
        like = segmap.palette if isinstance(segmap, SemanticLayout) else segmap
        weight = weight_met_on(like.device, self.fc)
        device = like.device if weight is None else weight.device
        dtype = dtype_of_weights(self.fc) or like.dtype
        assert self.z_dim is not None  # otherwise the generator takes no z
        return torch.randn(batch_of(segmap), self.z_dim, dtype=dtype, device=device)

    def _first_map(self, segmap, z):
        if z is not None:
            return self.fc(z).view(z.shape[0], -1, *self.start)
        if isinstance(segmap, SemanticLayout):
            segmap = dense(segmap.resize(self.start), self.fc)
        return self.fc(resize(segmap, self.start))


def images_of_each(z: torch.Tensor, segmap: torch.Tensor | SemanticLayout) -> int:
    """The number of images per condition."""
    conditions = batch_of(segmap)
    return 1 if z.shape[0] == conditions else z.shape[0] // conditions


def repeat_images(
    segmap: torch.Tensor | SemanticLayout, times: int
) -> torch.Tensor | SemanticLayout:
    """A batch of conditions, repeated `times` times."""
    if isinstance(segmap, SemanticLayout):
        return segmap.repeat(times)
    return segmap if times == 1 else segmap.repeat(times, *[1] * (segmap.dim() - 1))


def published_settings(dataset: str | int) -> Published:
    """The settings for a dataset's name, or for a number of channels. Raises ValueError."""
    if isinstance(dataset, str) and dataset in PUBLISHED:
        return PUBLISHED[dataset]
    try:
        return Published(whole_number("dataset", dataset, least=1))
    except (TypeError, ValueError):
        raise ValueError(
            f"dataset is {dataset!r}; it should be {', '.join(PUBLISHED)}, or a number of channels"
        ) from None


def official_arguments(
    dataset: str | int,
    *,
    crop_size: int | None = None,
    aspect_ratio: float | None = None,
    num_upsampling_layers: str | None = None,
    takes: Callable[[int, tuple[int, int]], bool] = lambda crop_size, start: True,
) -> dict:
    """The `label_nc`, `stages`, `last_scale` and `start` of a SPADEGenerator, from the arguments
    that only `official` has. Errors: ValueError, TypeError.

    takes: whether the caller accepts a crop size with the first map's size; an error proposes no
        other.
    """
    published = published_settings(dataset)
    layers = (
        published.num_upsampling_layers if num_upsampling_layers is None else num_upsampling_layers
    )
    if not isinstance(layers, str) or layers not in DOUBLINGS:
        raise ValueError(
            f"num_upsampling_layers is {layers!r}; it should be one of {', '.join(DOUBLINGS)}"
        )
    crop_size = (
        published.crop_size if crop_size is None else whole_number("crop_size", crop_size, least=1)
    )
    aspect_ratio = published.aspect_ratio if aspect_ratio is None else aspect_ratio
    if not isinstance(aspect_ratio, numbers.Real) or not 0 < aspect_ratio < math.inf:
        raise ValueError(f"aspect_ratio is {aspect_ratio!r}; it should be a positive number")
    doublings = DOUBLINGS[layers]
    start = _first_of_image(crop_size, aspect_ratio, doublings)
    wrong = f"crop_size is {crop_size}, but with {doublings} doublings and an aspect ratio of"
    if min(start) < 1:
        least = next(_fitting_sizes(range(1, FARTHEST), aspect_ratio, doublings, takes), None)
        words = NO_SIZE if least is None else f"it should be {least} or more"
        raise ValueError(f"{wrong} {aspect_ratio} {words}")
    if not _is_of_image(start, crop_size, aspect_ratio, doublings):
        made = " × ".join(str(length << doublings) for length in start)
        asked = f"{round(crop_size / aspect_ratio)} × {crop_size}"
        raise ValueError(
            f"{wrong} {aspect_ratio}, {made} pixels would be made, not {asked}:"
            f" {_nearest(crop_size, aspect_ratio, doublings, takes)}"
        )
    return {
        "label_nc": published.label_nc,
        "stages": published_stages(layers),
        "last_scale": 1,
        "start": start,
    }


NO_SIZE = "no crop_size near this one fits the other arguments"


def _first_of_image(crop_size, aspect_ratio, doublings):
    """Height and width of the first map, as the published code rounds them."""
    width = crop_size >> doublings
    return round(width / aspect_ratio), width


def _is_of_image(start, crop_size, aspect_ratio, doublings):
    """Whether the doublings turn the first map into an image of the size asked for."""
    height, width = (length << doublings for length in start)
    return (height, width) == (round(crop_size / aspect_ratio), crop_size)


def _fitting_sizes(widths, aspect_ratio, doublings, takes):
    """The widths of the images that can be made from first maps of these widths, and are taken."""
    for width in widths:
        size = width << doublings
        start = _first_of_image(size, aspect_ratio, doublings)
        fits = min(start) > 0 and _is_of_image(start, size, aspect_ratio, doublings)
        if fits and takes(size, start):
            yield size


def _nearest(crop_size, aspect_ratio, doublings, takes):
    """The end of a message: the nearest sizes that can be made."""
    below = crop_size >> doublings
    found = [
        str(size)
        for widths in (range(below, 0, -1), range(below + 1, below + FARTHEST))
        for size in itertools.islice(_fitting_sizes(widths, aspect_ratio, doublings, takes), 1)
    ]
    if not found:
        return NO_SIZE
    return f"crop_size should be {' or '.join(found)}, the nearest possible"


def published_stages(num_upsampling_layers: str) -> list[Stage]:
    """The blocks of the published generators with "normal", "more" or "most" doublings."""
    middle = 1 if num_upsampling_layers == "normal" else 2
    stages = [Stage("head_0", 16, 1), Stage("G_middle_0", 16, 2), Stage("G_middle_1", 16, middle)]
    stages += [Stage("up_0", 8, 2), Stage("up_1", 4, 2), Stage("up_2", 2, 2), Stage("up_3", 1, 2)]
    return stages + ([Stage("up_4", 0.5, 2)] if num_upsampling_layers == "most" else [])


def _first_size(start, spatial_dims):
    """`start` as a tuple."""
    try:
        lengths = tuple(start) if isinstance(start, Iterable) else (start,) * spatial_dims
        lengths = tuple(whole_number("start", length, least=1) for length in lengths)
    except (TypeError, ValueError):
        lengths = ()
    if len(lengths) != spatial_dims:
        raise ValueError(
            f"start is {start!r}; it should be a positive whole number, or {spatial_dims} of them"
        )
    return lengths


def _checked(stages, ngf, taken):
    """The blocks, as a Stage each. Raises ValueError unless each has a name of its own, not one of
    those taken, and a whole number of channels.
    """
    try:
        stages = tuple(Stage(*stage) for stage in stages)
    except TypeError:
        stages = ()
    if not stages:
        raise ValueError("stages should be blocks, each with a name, a width and a scale")
    names = [stage.name for stage in stages]
    for number, (name, width, scale) in enumerate(stages):
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"a block's name is {name!r}; it should be a name without dots")
        if name in taken:
            raise ValueError(
                f"a block's name is {name!r}; it should not be that of an attribute or argument of"
                " the generator"
            )
        if name in ("fc", "conv_img") or name in names[:number]:
            raise ValueError(f"two parts have the name {name}, every block should have its own")
        whole_number(f"the block {name}'s scale", scale, least=1)
        if not isinstance(width, numbers.Real) or width * ngf < 1 or width * ngf % 1:
            raise ValueError(
                f"ngf is {ngf}, the block {name} of {width} · ngf channels should have a whole"
                " number of them"
            )
    return tuple(
        Stage(str(name), int(width) if width % 1 == 0 else float(width), operator.index(scale))
        for name, width, scale in stages
    )
