"""The SPADE layer: convolutions of a condition compute γ and β, which modulate the normalised x."""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase

from .. import kernels
from ..arguments import counted, whole_number
from ..kernels.contract import Activation, lies_like, sum_dtype
from ..layout import SemanticLayout
from ..ops.arguments import check_activation, check_channels, check_moments, check_x, is_divisor
from ..ops.modulate import modulate_by, spade_modulate
from ..ops.norms import Kind
from ..recording import of_their_class, ordinary
from .choice import find_layout, windows_of
from .config import Config, dimensions, odd_number, parse_config
from .labels import at_labels
from .modules import (
    BATCH_NORMS,
    CONVOLUTIONS,
    INSTANCE_NORMS,
    KINDS,
    KnownNorm,
    check_dtype,
    is_known,
    is_watched,
    may_overwrite_result,
)
from .parts import Form, HasParts, Known, part_of
from .pixels import at_pixels, dense, has_first_apart, resize, with_channels_together
from .tables import Keeper, at_windows, kept_tables
from .voxels import at_voxels

ALWAYS_FRESH = 2**25  # bytes; C libraries keep the memory of smaller tensors for the next ones


class SpatiallyAdaptive(HasParts):
    """The computation of a SPADE, for any class; `spade_form` names its parts.

    h = shared(segmap);  y = norm(x) · (1 + gamma(h)) + beta(h)

    A form may be without `shared` or without the "1 +", and may add a convolution of segmap to x.
    """

    def forward(
        self,
        x: torch.Tensor,
        segmap: torch.Tensor | SemanticLayout,
        *,
        activation: Activation | None = None,
        negative_slope: float = 0.2,
        moments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y, with x's shape. In two or three dimensions it is channels-last on a GPU, or if x has
        1024 pixels or more; with gradients, if it has 4096 or more and the processor has AVX-512 or
        lacks AVX2. Otherwise it has x's memory layout.

        Args:
            x: [N, norm_nc, *spatial].
            segmap: [N, label_nc, *any], the condition, or a SemanticLayout of it; resized to x by
                nearest neighbour. Either its batch or x's may be 1.
            activation: None, "relu", "leaky_relu" or "silu", applied to y in the same pass.
            negative_slope: the slope of leaky ReLU below zero.
            moments: the result of `plane_moments(x)`, where several layers normalise one x.

        Raises:
            ValueError, TypeError: if an argument is not as described above; the message names it.
        """
        known = Known.of(self)
        self.check(x, segmap, known)
        return self.modulate(x, segmap, activation, negative_slope, moments, known)

    def is_open(self, x: torch.Tensor, segmap: torch.Tensor | SemanticLayout) -> bool:
        """Whether calling the module with these runs SpatiallyAdaptive.forward and nothing else.
        Then `modulate` may be called instead, with an activation and moments.
        """
        return type(self).forward is SpatiallyAdaptive.forward and not is_watched(self)

    def modulate(
        self,
        x: torch.Tensor,
        segmap: torch.Tensor | SemanticLayout,
        activation: Activation | None = None,
        negative_slope: float = 0.2,
        moments: torch.Tensor | None = None,
        known: Known | None = None,
    ) -> torch.Tensor:
        """`forward` after its arguments have been checked. known: `Known.of(self)`, if the caller
        has it already.
        """
        known = Known.of(self) if known is None else known
        check_activation(activation, negative_slope)  # before a batch is counted
        images, form = batch_of(segmap), self.spade_form
        parts, kept = known.parts, kept_tables(self)
        layout = segmap if isinstance(segmap, SemanticLayout) else None
        if known.convolutions is not None or known.by_label is not None:
            layout = find_layout(segmap)
        if parts.added is not None:
            given = dense(segmap, parts.added)
            x, moments = x + parts.added(resize(given, x.shape[2:], form.apart)), None
        x = with_channels_together(ordinary(x))
        several = x.shape[0] != images != 1  # several conditions for one x
        # Read once, because a lazy norm changes its class when it is called.
        own_norm = None if several else known.own_norm
        if isinstance(own_norm, _NormBase):
            own_norm._check_input_dim(x)
        elif own_norm is None:
            x, moments = parts.norm(x), None
            x = x.expand(images, *x.shape[1:]) if several else x
        if moments is not None:  # before a batch is counted
            check_moments(moments, x)
        if layout is not None and len(layout) != x.shape[0]:
            layout = layout.repeat(x.shape[0]) if x.shape[0] else layout[:0]
        gamma, beta, lookup = self._gamma_and_beta(known, segmap, layout, x, kept)
        if not lookup and gamma.shape[0] != x.shape[0]:  # one condition for all images
            gamma, beta = gamma.expand(x.shape), beta.expand(x.shape)
        planes = None
        if kept is not None and own_norm is not None and lookup:
            planes = frozen_planes(kept, own_norm, x)
        if planes is not None:
            index = lookup["index"]
            y = modulate_by(
                planes, x, gamma, beta, index, activation, negative_slope, plus_one=form.plus_one
            )
            return of_their_class(y, x, segmap)
        if own_norm is not None:
            count_batch(own_norm)
        y = spade_modulate(
            x,
            gamma,
            beta,
            **lookup,
            **norm_arguments(own_norm),
            activation=activation,
            negative_slope=negative_slope,
            moments=moments,
            plus_one=form.plus_one,
            out=None if lookup else reused(parts.gamma, gamma, x),
        )
        return of_their_class(y, x, segmap)

    def _gamma_and_beta(self, known, segmap, layout, x, kept):
        """γ and β, and the arguments of `spade_modulate` by which each pixel finds its row: rows of
        labels, of voxels, or of windows; at pixels there are none.
        """
        if known.by_label is not None:
            return at_labels(known.by_label, segmap if layout is None else layout, x)
        if known.pointwise is not None:
            given = ordinary(dense(segmap, known.parts.gamma))
            return at_voxels(known.pointwise, given, x, self.spade_form.apart)
        found = windows_of(known, layout, x, kept)
        if found is not None:
            convolutions, windows = found
            return at_windows(self, layout, windows, x, convolutions, kept)
        given = ordinary(segmap) if isinstance(segmap, torch.Tensor) else layout
        return *at_pixels(known.parts, given, x), {}

    @property
    def measures(self) -> bool:
        """Whether x is normalised with its own moments, by a norm that takes `moments`."""
        norm = part_of(self, self.spade_form.norm)
        return is_known(norm) and measures(norm) and self.spade_form.added is None

    def check(
        self,
        x: torch.Tensor,
        segmap: torch.Tensor | SemanticLayout,
        known: Known | None = None,
    ) -> None:
        """Raises ValueError or TypeError, naming x or segmap, if this layer cannot take it. known:
        see `modulate`.
        """
        self._check_tensor("x", x, self.spade_form.norm_nc)
        self.check_segmap(segmap)
        known = Known.of(self) if known is None else known
        first = known.parts.first
        weight = segmap if known.weight is None else known.weight
        if weight.device != x.device and any(map(is_watched, first.modules())):
            weight = segmap  # a hook may bring the weights here only for the call
        for name, tensor in {"segmap": segmap, "the layer's weight": weight}.items():
            if tensor.device != x.device:
                raise ValueError(
                    f"{name} is on {tensor.device}; it should be on x's device, {x.device}"
                )
        if isinstance(segmap, torch.Tensor) and isinstance(weight, torch.Tensor):
            check_dtype("segmap", segmap, weight)
        images = batch_of(segmap)
        if images != x.shape[0] and images != 1 and x.shape[0] != 1:
            raise ValueError(
                f"segmap has a batch of {images}; it should be x's batch, {x.shape[0]}, or 1"
            )
        if self.spade_form.apart and has_first_apart(x.shape[2:]):
            given = segmap.codes if isinstance(segmap, SemanticLayout) else segmap[:, 0]
            if given.shape[1] == 1:
                raise ValueError(
                    f"segmap has one frame; it should have more, because x has {x.shape[2]}"
                )

    def check_segmap(self, segmap: torch.Tensor | SemanticLayout) -> None:
        """Raises ValueError or TypeError if this layer cannot take segmap, whatever x is."""
        form = self.spade_form
        if not isinstance(segmap, SemanticLayout):
            self._check_tensor("segmap", segmap, form.label_nc)
        elif segmap.codes.dim() - 1 != form.spatial_dims:
            given = segmap.codes.dim() - 1
            hint = "a single map [height, width] needs a batch: labels[None]"
            if given > form.spatial_dims:
                hint = "labels [N, 1, height, width] should lose an axis: labels[:, 0]"
            raise ValueError(
                f"segmap has {counted(given, 'spatial dimension')}; it should have"
                f" {form.spatial_dims}; {hint}"
            )
        elif segmap.label_nc != form.label_nc:
            raise ValueError(
                f"segmap has {segmap.label_nc} channels; it should have {form.label_nc}"
            )

    def _check_tensor(self, name, tensor, channels):
        if not isinstance(tensor, torch.Tensor):
            hint = ""
            if isinstance(tensor, torch.fx.Proxy):
                hint = ": torch.fx cannot trace this module, make it a leaf of your tracer"
            raise TypeError(
                f"{name} is a {type(tensor).__name__}; it should be a torch.Tensor{hint}"
            )
        if not tensor.is_floating_point():
            hint = "; for labels give SemanticLayout.from_labels(labels, num_classes)"
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; it should be a floating-point tensor"
                + (hint if name == "segmap" else "")
            )
        dims = self.spade_form.spatial_dims
        given = tensor.shape[1] if tensor.dim() == dims + 2 else None
        # Symbolic sizes are not compared: in some graphs equal sizes share one symbol, which the
        # comparison would fix.
        if given is None or (isinstance(given, int) and given != channels):
            spatial = ", ".join("DHW"[-dims:])
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; it should be [N, {channels}, {spatial}]"
            )


class SPADE(SpatiallyAdaptive):
    """Spatially-adaptive normalisation (Park et al. 2019, equation 1), with the state_dict keys of
    the published code.

        h = relu(mlp_shared(segmap));  y = norm(x) · (1 + mlp_gamma(h)) + mlp_beta(h)

    The published signature, SPADE("spadesyncbatch3x3", norm_nc, label_nc), is accepted as well: see
    `from_config`.

    Args:
        norm_nc: channels C of x.
        label_nc: channels of the condition.
        nhidden: channels of h.
        kernel_size: taps per axis of all three convolutions, odd, 3 if None; padding is with zeros.
        norm: "instance", "batch", "syncbatch", "group", or a module whose output is modulated.
        num_groups: the number of groups of channels, for norm="group".
        affine: whether the norm has a weight and a bias of its own.
        eps, momentum: the norm's settings.
        spatial_dims: 1, 2 or 3.

    Raises:
        ValueError, TypeError: if an argument is not as described above; the message names it.
    """

    __call__: Callable[..., torch.Tensor]  # nn.Module's returns Any

    def __init__(
        self,
        norm_nc: int | str,
        label_nc: int,
        nhidden: int = 128,
        kernel_size: int | None = None,
        norm: Kind | nn.Module = "instance",
        *,
        num_groups: int = 32,
        affine: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if isinstance(norm_nc, str):  # the published order: config_text, norm_nc, label_nc, nhidden
            config = parse_layer_config(norm_nc)
            norm_nc, label_nc = label_nc, nhidden
            nhidden = 128 if kernel_size is None else kernel_size
            kernel_size, norm = config.kernel_size, config.norm
        norm_nc = whole_number("norm_nc", norm_nc, least=1)
        label_nc = whole_number("label_nc", label_nc, least=1)
        nhidden = whole_number("nhidden", nhidden, least=1)
        kernel_size = odd_number("kernel_size", 3 if kernel_size is None else kernel_size)
        spatial_dims = dimensions(spatial_dims)
        own_norm: nn.Module
        if norm == "instance":
            own_norm = INSTANCE_NORMS[spatial_dims](norm_nc, eps=eps, affine=affine)
        elif norm == "batch":
            own_norm = BATCH_NORMS[spatial_dims](norm_nc, eps=eps, momentum=momentum, affine=affine)
        elif norm == "syncbatch":
            own_norm = nn.SyncBatchNorm(norm_nc, eps=eps, momentum=momentum, affine=affine)
        elif norm == "group":
            if not is_divisor(num_groups, norm_nc):
                raise ValueError(
                    f"num_groups is {num_groups!r}; it should be a positive number that divides"
                    f" norm_nc, {norm_nc}"
                )
            own_norm = nn.GroupNorm(num_groups, norm_nc, eps=eps, affine=affine)
        elif isinstance(norm, nn.Module):
            own_norm = norm
        else:
            raise ValueError(
                f"norm is {norm!r}; it should be 'instance', 'batch', 'syncbatch', 'group' or an"
                " nn.Module"
            )
        convolution = CONVOLUTIONS[spatial_dims]
        padding = kernel_size // 2
        self.norm_nc, self.label_nc, self.spatial_dims = norm_nc, label_nc, spatial_dims
        self.spade_form = Form(
            "param_free_norm",
            "mlp_shared",
            "mlp_gamma",
            "mlp_beta",
            norm_nc,
            label_nc,
            spatial_dims,
        )
        self.param_free_norm = own_norm
        self.mlp_shared = nn.Sequential(
            convolution(label_nc, nhidden, kernel_size, padding=padding), nn.ReLU()
        )
        self.mlp_gamma = convolution(nhidden, norm_nc, kernel_size, padding=padding)
        self.mlp_beta = convolution(nhidden, norm_nc, kernel_size, padding=padding)

    @classmethod
    def from_config(
        cls, config_text: str, norm_nc: int, label_nc: int, nhidden: int = 128, **settings: Any
    ) -> "SPADE":
        """SPADE("spadesyncbatch3x3", …) as in the published code. settings: SPADE's keywords."""
        config = parse_layer_config(config_text)
        return cls(norm_nc, label_nc, nhidden, config.kernel_size, config.norm, **settings)

    def extra_repr(self) -> str:
        return f"{self.norm_nc}, {self.label_nc}"


def parse_layer_config(config_text: str) -> Config:
    config = parse_config(config_text, "config_text")
    if config.spectral:
        raise ValueError(
            f"config_text is {config_text!r}; it should be without 'spectral', which is for the"
            " convolutions of a block"
        )
    return config


def batch_of(segmap: torch.Tensor | SemanticLayout) -> int:
    """The number of images in a condition. (len() of a tensor would fix the batch of an exported
    graph.)
    """
    return len(segmap) if isinstance(segmap, SemanticLayout) else segmap.shape[0]


def measures(norm: KnownNorm) -> bool:
    """Whether a known norm normalises x with x's own moments."""
    return norm.training or getattr(norm, "running_mean", None) is None


def count_batch(norm: KnownNorm) -> None:
    """Counts the batch, as a batch norm does in train mode."""
    if isinstance(norm, _NormBase) and norm.training and norm.track_running_stats:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)


def norm_arguments(norm: KnownNorm | None) -> dict[str, Any]:
    """The arguments of `spade_modulate` for a known norm, read in each call because they may have
    been replaced.
    """
    if norm is None:
        return {"norm": None}
    kind = KINDS[type(norm)]
    arguments: dict[str, Any] = {
        "norm": kind,
        "eps": norm.eps,
        "weight": norm.weight,
        "bias": norm.bias,
    }
    if isinstance(norm, nn.GroupNorm):
        arguments["num_groups"] = norm.num_groups
    elif kind in ("batch", "syncbatch"):
        tracked = norm.num_batches_tracked if norm.track_running_stats else None
        momentum = norm.momentum
        if momentum is None:  # a cumulative average
            momentum = 0.0 if tracked is None or not norm.training else 1.0 / float(tracked)
        reads = norm.track_running_stats or not norm.training
        arguments |= {
            "training": measures(norm),
            "running_mean": norm.running_mean if reads else None,
            "running_var": norm.running_var if reads else None,
            "momentum": momentum,
        }
    if isinstance(norm, nn.SyncBatchNorm):
        arguments["process_group"] = norm.process_group
    return arguments


def frozen_planes(kept: Keeper, norm: KnownNorm, x: torch.Tensor) -> torch.Tensor | None:
    """The shift, scale and offset of each plane of x [N, C, *spatial], [3, N, C], from running
    statistics and the norm's own parameters, computed once; None if the norm measures x.
    """
    if not isinstance(norm, _NormBase) or measures(norm) or norm.num_batches_tracked is None:
        return None
    eps, count = norm.eps, norm.num_batches_tracked
    mean, variance, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    shape, dtype = x.shape[:2], sum_dtype(x.dtype)

    def make():
        check_x(x)
        for name in ("running_mean", "running_var", "weight", "bias"):
            check_channels(name, getattr(norm, name), x)
        return [kernels.select(x).running_planes(x, mean, variance, weight, bias, eps)]

    # PyTorch's own batch norm writes to running statistics without changing their version, but the
    # count of batches shows it.
    weights = [mean, variance, count, weight, bias]
    return kept.derive(norm, "planes", weights, (shape, dtype, eps), make)[0]


def reused(module: nn.Module, gamma: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """γ, for y to overwrite, if γ is large and only the module that computed it has seen it.
    Getting fresh memory from the system takes longer than the modulation.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or not may_overwrite_result(module):
        return None
    is_fresh = gamma.nbytes >= ALWAYS_FRESH and gamma.shape == x.shape and lies_like(gamma, x)
    return gamma if is_fresh and gamma.dtype == torch.promote_types(x.dtype, gamma.dtype) else None
