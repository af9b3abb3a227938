"""The SPADE layer: convolutions make γ and β of a condition, which modulate the normalised x."""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import kernels
from ..kernels.torch_backend import is_channels_last, lies_like
from ..layout import LARGEST_KERNEL, SemanticLayout
from ..ops.convolve_windows import convolve_windows
from ..ops.modulate import spade_modulate
from .config import parse_config
from .frozen import kept_tables
from .upsampled import convolve_repeated, may_sum_weights, repeats
from .windows import FORMATS, find_layout, pays, with_channels_together

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KINDS = {
    **{module: "instance" for module in INSTANCE_NORMS.values()},
    **{module: "batch" for module in BATCH_NORMS.values()},
    nn.SyncBatchNorm: "syncbatch",
    nn.GroupNorm: "group",
}
ALWAYS_FRESH = 2**25  # bytes; of smaller tensors C libraries keep the memory
POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Identity)


class Form(NamedTuple):
    """The names of the sub-modules that a layer has for SPADE's parts, and its sizes."""

    norm: str
    shared: str
    gamma: str
    beta: str
    norm_nc: int
    label_nc: int
    spatial_dims: int


class Convolutions(NamedTuple):
    """What decides the γ and β of a window: three convolutions, what follows the first, and norms
    of γ's and β's own.
    """

    shared: nn.Module
    activations: list
    gamma: nn.Module
    beta: nn.Module
    gamma_norm: nn.Module | None
    beta_norm: nn.Module | None

    @property
    def normalise(self):
        """Whether γ or β is normalised over each image: then images with one window have two rows
        for it.
        """
        return self.gamma_norm is not None or self.beta_norm is not None


class SpatiallyAdaptive:
    """What a module does as a SPADE, whatever its class: `spade_form` names its parts.

    h = shared(segmap);  y = norm(x) · (1 + gamma(h)) + beta(h)
    """

    spade_form: Form

    def forward(self, x, segmap, *, activation=None, negative_slope=0.2, moments=None):
        """y of x's shape; channels-last from 4096 pixels on, else of x's memory layout.

        Args:
            x: [N, norm_nc, *spatial].
            segmap: [N, label_nc, *any], the condition, or a SemanticLayout of it; resized to x by
                nearest neighbour.
            activation: None, "relu", "leaky_relu" or "silu", applied to y in the same pass.
            negative_slope: of leaky ReLU.
            moments: `plane_moments(x)`, where several layers normalise one x.

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        self.check(x, segmap)
        layout = find_layout(segmap)
        x = with_channels_together(x)
        convolutions = None if layout is None else self.convolutions()
        if convolutions is not None and pays(layout, x.shape[2:], self, convolutions):
            gamma, beta, lookup = self._from_windows(layout, x, convolutions)
        else:
            gamma, beta, lookup = *self._from_pixels(segmap, x), {}
        norm = self.part("norm")
        if not is_known(norm):
            x, moments = norm(x), None
        norm = self._norm_arguments()
        out = None if lookup else self._reused(x, gamma)
        return spade_modulate(
            x,
            gamma,
            beta,
            **lookup,
            **norm,
            activation=activation,
            negative_slope=negative_slope,
            moments=moments,
            out=out,
        )

    def _reused(self, x, gamma):
        """γ, where it is large and nobody else's: y then takes its place. Memory fresh from the
        system takes longer than to modulate.
        """
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        suits = (
            gamma.nbytes >= ALWAYS_FRESH
            and gamma.dtype == torch.promote_types(x.dtype, gamma.dtype)
            and lies_like(gamma, x)
        )
        return gamma if suits and owns_result(self.part("gamma")) else None

    def part(self, name):
        """The module of this name in `spade_form`."""
        return self.get_submodule(getattr(self.spade_form, name))

    def convolutions(self):
        """What decides γ and β, or None where that is more than a window's codes and the weights of
        plain convolutions.
        """
        shared, *activations = leaves(self.part("shared"))
        (gamma, *gamma_norms), (beta, *beta_norms) = (
            leaves(self.part("gamma")),
            leaves(self.part("beta")),
        )
        size = gamma.kernel_size[0] if isinstance(gamma, tuple(CONVOLUTIONS.values())) else 0
        if not (
            1 <= size <= LARGEST_KERNEL
            and all(sees_windows(module, size) for module in (shared, gamma, beta))
        ):
            return None
        if (
            not all(is_plain(module, POINTWISE) for module in activations)
            or len(gamma_norms) > 1
            or len(beta_norms) > 1
        ):
            return None
        own_norms = [*gamma_norms, *beta_norms]
        if not all(
            is_plain(module, INSTANCE_NORMS.values()) and not module.track_running_stats
            for module in own_norms
        ):
            return None
        return Convolutions(
            shared,
            activations,
            gamma,
            beta,
            *(norms[0] if norms else None for norms in (gamma_norms, beta_norms)),
        )

    def _from_pixels(self, segmap, x):
        """γ and β of every pixel, of x's shape."""
        if isinstance(segmap, SemanticLayout):
            segmap = segmap.resize(x.shape[2:]).to_segmap(self._first_weight().dtype)
        hidden = self._hidden(like_pixels_of(x, segmap), x.shape[2:])
        convolve = (
            convolve_jointly if hidden.is_cuda else convolve_apart
        )  # on a CPU nothing is gained, and copying costs
        return convolve((self.part("gamma"), self.part("beta")), hidden)

    def _hidden(self, segmap, size):
        """What γ and β are convolved from, at every pixel of this size."""
        shared, factor = self.part("shared"), repeats(segmap, size)
        conv, *activations = leaves(shared)
        simple = all(is_plain(module, POINTWISE) for module in activations) and sees_windows(
            conv, getattr(conv, "kernel_size", [0])[0]
        )
        if not simple:
            return shared(resize(segmap, size))
        repeated = factor > 1 and may_sum_weights(segmap)
        hidden = convolve_repeated(conv, segmap, factor) if repeated else conv(resize(segmap, size))
        for number, activation in enumerate(
            activations
        ):  # ReLU in the convolution's own result, which no backward needs
            hidden = (
                F.relu_(hidden)
                if number == 0 and type(activation) is nn.ReLU
                else activation(hidden)
            )
        return hidden

    def _from_windows(self, layout, x, convolutions):
        """γ and β of every distinct window, [K, C], and how a pixel finds its own."""
        windows = layout.windows(x.shape[2:], convolutions.gamma.kernel_size[0])
        dtype, kept = dtype_of_convolution(x, convolutions.gamma.weight), kept_tables(self)
        if kept is None:
            gamma, beta = compute_table(layout, windows, convolutions, dtype)
        else:
            images = x.shape[0] if convolutions.normalise else None
            key = (self, x.shape[2:], dtype, images)
            gamma, beta = kept.get(
                layout.source, key, lambda: compute_table(layout, windows, convolutions, dtype)
            )
        index = windows.index_of_images if convolutions.normalise else windows.index
        return gamma, beta, {"index": index, "order": windows.order}

    @property
    def measures(self):
        """Whether x is normalised with its own moments, by a norm that takes `moments`."""
        norm = self.part("norm")
        return is_known(norm) and (norm.training or getattr(norm, "running_mean", None) is None)

    def _norm_arguments(self):
        """What `spade_modulate` is to be told of the norm, which is read anew each time: it may
        have been exchanged.
        """
        norm = self.part("norm")
        if not is_known(norm):
            return {"norm": None}
        kind = KINDS[type(norm)]
        arguments = {"norm": kind, "eps": norm.eps, "weight": norm.weight, "bias": norm.bias}
        if kind == "group":
            arguments["num_groups"] = norm.num_groups
        if kind in ("batch", "syncbatch"):
            arguments |= {
                "training": self.measures,
                "running_mean": norm.running_mean,
                "running_var": norm.running_var,
            }
            arguments["momentum"] = norm.momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if norm.momentum is None:  # a cumulative average
                    arguments["momentum"] = 1.0 / float(norm.num_batches_tracked)
        if kind == "syncbatch":
            arguments["process_group"] = norm.process_group
        return arguments

    def check(self, x, segmap):
        """Raises what is wrong with x or segmap, by name."""
        self._check_tensor("x", x, self.spade_form.norm_nc)
        self.check_segmap(segmap)
        weight = self._first_weight()
        for name, tensor in {"segmap": segmap, "the layer's weight": weight}.items():
            if tensor.device != x.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, it should be on x's device, {x.device}"
                )
        if (
            isinstance(segmap, torch.Tensor)
            and segmap.dtype != weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        ):
            raise TypeError(
                f"segmap has dtype {segmap.dtype}, it should be the weights', {weight.dtype}"
            )
        if batch_of(segmap) != x.shape[0]:
            raise ValueError(
                f"segmap has a batch of {batch_of(segmap)}, it should be x's, {x.shape[0]}"
            )

    def check_segmap(self, segmap):
        """Raises what is wrong with segmap, whatever x is."""
        if not isinstance(segmap, SemanticLayout):
            self._check_tensor("segmap", segmap, self.spade_form.label_nc)
        elif segmap.codes.dim() - 1 != self.spade_form.spatial_dims:
            raise ValueError(
                f"segmap has {segmap.codes.dim() - 1} dimensions, it should have"
                f" {self.spade_form.spatial_dims}"
            )
        elif segmap.label_nc != self.spade_form.label_nc:
            raise ValueError(
                f"segmap has {segmap.label_nc} channels, it should have {self.spade_form.label_nc}"
            )

    def _check_tensor(self, name, tensor, channels):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, it should be a torch.Tensor")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, it should be a floating-point tensor"
            )
        if tensor.dim() != self.spade_form.spatial_dims + 2 or tensor.shape[1] != channels:
            spatial = ", ".join("DHW"[-self.spade_form.spatial_dims :])
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, it should be [N, {channels}, {spatial}]"
            )

    def _first_weight(self):
        return next(self.part("shared").parameters())


class SPADE(SpatiallyAdaptive, nn.Module):
    """Spatially-adaptive normalisation (Park et al. 2019, equation 1), with the state_dict keys of
    the published code.

        h = relu(mlp_shared(segmap));  y = norm(x) · (1 + mlp_gamma(h)) + mlp_beta(h)

    Args:
        norm_nc: channels C of x.
        label_nc: channels of the condition.
        nhidden: channels of h.
        kernel_size: of all three convolutions, odd; zeros are padded.
        norm: "instance", "batch", "syncbatch", "group", or a module whose output is modulated.
        num_groups: for norm="group".
        affine: whether the norm has a weight and a bias of its own.
        eps, momentum: of the norm.
        spatial_dims: 1, 2 or 3.
    """

    def __init__(
        self,
        norm_nc,
        label_nc,
        nhidden=128,
        kernel_size=3,
        norm="instance",
        *,
        num_groups=32,
        affine=False,
        eps=1e-5,
        momentum=0.1,
        spatial_dims=2,
    ):
        super().__init__()
        for name, number in {"norm_nc": norm_nc, "label_nc": label_nc, "nhidden": nhidden}.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} is {number!r}, it should be a positive whole number")
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size!r}, it should be an odd whole number")
        if spatial_dims not in CONVOLUTIONS:
            raise ValueError(f"spatial_dims is {spatial_dims!r}, it should be 1, 2 or 3")
        if norm == "instance":
            norm = INSTANCE_NORMS[spatial_dims](norm_nc, eps=eps, affine=affine)
        elif norm == "batch":
            norm = BATCH_NORMS[spatial_dims](norm_nc, eps=eps, momentum=momentum, affine=affine)
        elif norm == "syncbatch":
            norm = nn.SyncBatchNorm(norm_nc, eps=eps, momentum=momentum, affine=affine)
        elif norm == "group":
            norm = nn.GroupNorm(num_groups, norm_nc, eps=eps, affine=affine)
        elif not isinstance(norm, nn.Module):
            raise ValueError(
                f"norm is {norm!r}, it should be 'instance', 'batch', 'syncbatch', 'group' or an"
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
        self.param_free_norm = norm
        self.mlp_shared = nn.Sequential(
            convolution(label_nc, nhidden, kernel_size, padding=padding), nn.ReLU()
        )
        self.mlp_gamma = convolution(nhidden, norm_nc, kernel_size, padding=padding)
        self.mlp_beta = convolution(nhidden, norm_nc, kernel_size, padding=padding)

    @classmethod
    def from_config(cls, config_text, norm_nc, label_nc, nhidden=128, **settings):
        """SPADE("spadesyncbatch3x3", …) of the published code. settings: SPADE's keywords."""
        config = parse_config(config_text, "config_text")
        if config.spectral:
            raise ValueError(
                f"config_text is {config_text!r}: 'spectral' is for a block's convolutions, SPADE"
                " has none with it"
            )
        return cls(norm_nc, label_nc, nhidden, config.kernel_size, config.norm, **settings)

    def extra_repr(self):
        return f"{self.norm_nc}, {self.label_nc}"


def leaves(module):
    """The modules that a module is, one after the other: those of a Sequential, and of the
    Sequentials in it.
    """
    if (
        not isinstance(module, nn.Sequential)
        or type(module).forward is not nn.Sequential.forward
        or hooks(module)
    ):
        return [module]
    return [leaf for child in module for leaf in leaves(child)]


def sees_windows(module, size):
    """Whether a module is a convolution with so many taps per axis, around each pixel, of the map
    with zeros around it.
    """
    settings = {"kernel_size": size, "padding": size // 2, "stride": 1, "dilation": 1}
    return (
        is_plain(module, CONVOLUTIONS.values())
        and module.groups == 1
        and module.padding_mode == "zeros"
        and all(set(getattr(module, name)) == {setting} for name, setting in settings.items())
    )


def compute_table(layout, windows, convolutions, dtype):
    """γ and β of the distinct windows, [K, C], in dtype; where they have norms of their own, of
    those of each image, [N·K, C].
    """
    shared, activations, *rest = convolutions
    within = (
        torch.promote_types(dtype, torch.float32) if convolutions.normalise else dtype
    )  # norms see what differs between windows
    hidden = convolve_windows(layout.palette, shared.weight, shared.bias, windows.hidden, within)
    for activation in activations:
        hidden = activation(hidden)
    if kernels.select(hidden) is not kernels.cpu_backend and (
        joint := joined(rest[:2])
    ):  # half the launches; copies cost a CPU more
        rows = convolve_windows(hidden, *joint, windows.table, within).split(
            [module.out_channels for module in rest[:2]], dim=1
        )
    else:
        rows = [
            convolve_windows(hidden, module.weight, module.bias, windows.table, within)
            for module in rest[:2]
        ]
    if convolutions.normalise:
        rows = [normalise_over_images(table, windows, norm) for table, norm in zip(rows, rest[2:])]
    return [table.to(dtype) for table in rows]


def normalise_over_images(table, windows, norm):
    """A table [K, C] as instance norm makes it of each image, [N·K, C]: a row counts as often as
    the image has its window.

    In float64, for the table is small: γ and β differ little from window to window, and in float32
    their mean took that with it.
    """
    images, count = len(windows.index), windows.count
    if norm is None:
        return table.repeat(images, 1)
    share, exact = windows.shares, table.double()
    deviations = exact - (share @ exact)[:, None]
    variance = torch.einsum("nk,nkc->nc", share, deviations.square())
    normalised = deviations * torch.rsqrt(variance + norm.eps)[:, None]
    if norm.affine:
        normalised = normalised * norm.weight + norm.bias
    return normalised.view(images * count, -1).to(table.dtype)


def batch_of(segmap):
    """How many images' condition this is; len() of a tensor would hold an exported graph to one
    batch.
    """
    return len(segmap) if isinstance(segmap, SemanticLayout) else segmap.shape[0]


def like_pixels_of(x, segmap):
    """segmap with each pixel's channels together where x has them so: convolutions keep that, and γ
    and β then lie as x does.
    """
    return (
        segmap.contiguous(memory_format=FORMATS[x.dim()])
        if x.dim() in FORMATS and is_channels_last(x)
        else segmap
    )


def resize(segmap, size):
    """segmap at x's size, by nearest neighbour: `F.interpolate`'s pixels, as a view where each size
    is a multiple of x's.
    """
    if segmap.shape[2:] == tuple(size):
        return segmap
    if all(wanted and given % wanted == 0 for given, wanted in zip(segmap.shape[2:], size)):
        steps = [
            slice(None, None, given // wanted) for given, wanted in zip(segmap.shape[2:], size)
        ]
        return segmap[(slice(None), slice(None), *steps)]
    return F.interpolate(segmap, size=tuple(size), mode="nearest")


def dtype_of_convolution(x, weight):
    """Of a convolution's output for this weight, beside x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def convolve_jointly(convolutions, x):
    """The outputs of equal convolutions of one x, from one convolution; their weights stay
    parameters of their own.
    """
    plain = all(is_plain(module, CONVOLUTIONS.values()) for module in convolutions)
    if not plain or (joint := joined(convolutions)) is None:
        return convolve_apart(convolutions, x)
    return (
        convolutions[0]
        ._conv_forward(x, *joint)
        .split([module.out_channels for module in convolutions], dim=1)
    )


def joined(convolutions):
    """Weight and bias of several convolutions of one x as those of one convolution, or None where
    they differ in kind.
    """
    settings = ("kernel_size", "padding", "stride", "dilation", "groups", "padding_mode")
    differ = any(len({getattr(module, name) for module in convolutions}) > 1 for name in settings)
    if differ or any(module.bias is None for module in convolutions):
        return None
    return torch.cat([module.weight for module in convolutions]), torch.cat(
        [module.bias for module in convolutions]
    )


def convolve_apart(convolutions, x):
    """The outputs of convolutions of one x."""
    return [module(x) for module in convolutions]


def is_known(norm):
    """Whether `spade_modulate` can do what this module does."""
    return is_plain(norm, KINDS) and not (
        KINDS[type(norm)] == "instance" and norm.track_running_stats
    )


def is_plain(module, types):
    """Whether a module is just what its type says, with no hook (such as spectral_norm's) that must
    run when it is called.
    """
    return type(module) in types and not hooks(module)


def owns_result(module):
    """Whether what a module returns is a new tensor that nobody else has seen."""
    return type(module) in CONVOLUTIONS.values() and not module._forward_hooks


def hooks(module):
    """Everything that runs when a module is called, beside its forward."""
    kinds = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return [hook for kind in kinds for hook in kind.values()]
