"""Predicates on modules: what a module is, and whether anything watches it."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn as nn
from torch.nn.modules import module as calls
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.module_tracker import ModuleTracker

from ..ops.norms import Kind
from ..recording import may_overwrite
from .inside import OURS, PLAIN, Met, Unwatched, walk
from .unchanged import version_of

Model = TypeVar("Model", bound=nn.Module)
KnownNorm = _NormBase | nn.GroupNorm  # _NormBase: instance and batch norms
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVOLUTION_TYPES: tuple[type[Convolution], ...] = tuple(CONVOLUTIONS.values())
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KINDS: dict[type[nn.Module], Kind] = {
    nn.InstanceNorm1d: "instance",
    nn.InstanceNorm2d: "instance",
    nn.InstanceNorm3d: "instance",
    nn.BatchNorm1d: "batch",
    nn.BatchNorm2d: "batch",
    nn.BatchNorm3d: "batch",
    nn.SyncBatchNorm: "syncbatch",
    nn.GroupNorm: "group",
}
MAKERS = (SpectralNorm, WeightNorm)  # hooks that compute the weight, whatever the input is
POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Identity)


def hooks(module: nn.Module) -> list[Callable]:
    """The module's own hooks, which run beside its forward when it is called."""
    return [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and its own hooks and nothing else: no
    hook on all modules, no forward set on the instance, nothing compiled in its place.
    """
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not replaced and not (calls._has_any_global_hook() and _somebody_watches_all())


def _somebody_watches_all() -> bool:
    """Whether there is a hook on all modules other than PyTorch's ModuleTracker, which
    FlopCounterMode uses: it notes which module runs and looks at no values.
    """
    kinds = (
        calls._global_forward_pre_hooks,
        calls._global_forward_hooks,
        calls._global_backward_pre_hooks,
        calls._global_backward_hooks,
    )
    hooks = [hook for kind in kinds for hook in kind.values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def is_watched(module: nn.Module) -> bool:
    """Whether anything besides its class's forward runs when the module is called, and so sees or
    may change what goes in and out. If so, it is called, with the arguments that it has in the
    plain network.
    """
    has_hooks = (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )
    return bool(has_hooks) or not is_called_plainly(module)


def is_plain(module: nn.Module, types: Iterable[type]) -> bool:
    """Whether a module is exactly of one of these types and not watched, so that its settings and
    weights determine its result.
    """
    return type(module) in types and not is_watched(module)


def leaves(module: nn.Module, inside: bool = False) -> list[nn.Module]:
    """The modules that a module runs one after another: those in a Sequential and in the
    Sequentials inside it; with `inside`, those in any module that has children.
    """
    in_turn = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    opens = in_turn or (inside and module._modules and not parametrize.is_parametrized(module))
    if not opens or is_watched(module):
        return [module]
    children = filter(None, module._modules.values())  # including one that occurs twice
    return [leaf for child in children for leaf in leaves(child, inside)]


def is_convolution(module: nn.Module, derived: bool = False) -> TypeGuard[Convolution]:
    """Whether a module is a convolution that its settings and `weight_of` determine: plain, or
    under spectral norm, weight norm or a parametrization.

    derived: accept a class that is derived from a convolution's, too. That it computes a
        convolution has then been proved.
    """
    kind = type(module)
    if derived and isinstance(module, CONVOLUTION_TYPES):
        kind = CONVOLUTION_TYPES[0]
    if kind not in CONVOLUTION_TYPES and parametrize.is_parametrized(module):
        kind = kind.__bases__[0]  # its class before the parametrization
    if kind not in CONVOLUTION_TYPES or not is_called_plainly(module):
        return False
    return all(isinstance(hook, MAKERS) and hook.name == "weight" for hook in hooks(module))


def weight_of(module: Convolution) -> torch.Tensor:
    """The weight that a call of a convolution would use, computed as the call computes it. Since
    this runs the hooks that compute it, ask for it once, in place of the call.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, None)
    return module.weight


def weights_in(module: nn.Module) -> list[torch.Tensor]:
    """A module's parameters, the tensors that it was given in their place, and its buffers."""
    return [*module.parameters(), *given_in(module), *module.buffers()]


def given_in(module: nn.Module) -> list[torch.Tensor]:
    """The tensors that were `given_to` a module and the modules in it."""
    return [tensor for part in module.modules() for tensor in given_to(part).values()]


def given_to(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that are a module's plain attributes, by name. A hypernetwork or FSDP gives a
    module weights in this way, and DataParallel its replicas. The weight that spectral norm or
    weight norm computes is not given.
    """
    made = {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, MAKERS)}
    return {
        name: own
        for name, own in module.__dict__.items()
        if isinstance(own, torch.Tensor) and name not in made
    }


def named_given(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights and biases that were `given_to` the convolutions, norms and linear layers in a
    module, by name, except those that hooks may have computed and those whose memory FSDP has
    freed. (Modules of other classes may keep results as attributes.)
    """
    for name, part in module.named_modules():
        known = type(part) in (*CONVOLUTION_TYPES, *KINDS, nn.Linear)
        if known and all(isinstance(hook, MAKERS) for hook in part._forward_pre_hooks.values()):
            for own, tensor in given_to(part).items():
                if own in ("weight", "bias") and tensor.untyped_storage().nbytes():
                    yield ".".join(filter(None, (name, own))), tensor


def first_weight(module: nn.Module) -> torch.Tensor | None:
    """The first of `weights_in`, found faster; None if there is none, as in a quantized layer."""
    for weight in module._parameters.values():
        if weight is not None:
            return weight
    weight = next(module.parameters(), None)
    return next(iter(weights_in(module)), None) if weight is None else weight


def dtype_of_weights(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first weight; None if there is none."""
    weight = first_weight(module)
    return None if weight is None else weight.dtype


def weight_met_on(device: torch.device, module: nn.Module) -> torch.Tensor | None:
    """The first weight, which an argument on this device meets; None if there is none, or if it is
    elsewhere and something may bring it to the device only for the call.
    """
    weight = first_weight(module)
    if weight is None or weight.device == device:
        return weight
    return None if any(map(is_watched, module.modules())) else weight


def check_dtype(name: str, tensor: torch.Tensor, weight: torch.Tensor | None) -> None:
    """Raises TypeError unless an argument has the dtype of the weight that it meets, if there is
    one, or autocast casts both.
    """
    if weight is None or tensor.dtype == weight.dtype:
        return
    if not torch.is_autocast_enabled(tensor.device.type):
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; it should be the weights' dtype, {weight.dtype}"
        )


def shape_of_weight(module: nn.Module) -> torch.Size:
    """The shape of a convolution's weight, without computing the weight."""
    kept: tuple[dict[str, Any], ...] = (module._parameters, module.__dict__)
    for name in ("weight", "weight_orig", "weight_v"):  # plain, spectral norm, weight norm
        for own in kept:
            if name in own:
                return own[name].shape
    parametrizations: Any = module.parametrizations
    made = parametrizations.weight
    # Where there are several, as under weight norm, the last one may have the weight's shape.
    last = "original" if made.is_tensor else f"original{made.ntensors - 1}"
    return getattr(made, last).shape


def check_module(name: str, value: object) -> None:
    """Raises TypeError unless an argument is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} is a {type(value).__name__}; it should be a torch.nn.Module")


# Attributes that torch has in every module (the mode is compared separately), that DataParallel
# adds, and ours.
NOT_MARKED = {*vars(nn.Module()), "_is_replica", "_former_parameters", *OURS}


def marks_of(module: nn.Module, known: Collection[int] = ()) -> dict:
    """The marks of what a forward may read of a module besides its weights: its attributes and the
    buffers that are not floating-point. known: see `mark_of`.
    """
    weights = module.__dict__.get("_former_parameters", ())  # of a replica: plain tensors
    marks = {
        name: mark_of(value, known)
        for name, value in module.__dict__.items()
        if name not in NOT_MARKED and name not in weights
    }
    for name, value in module._buffers.items():
        if value is not None and not value.is_floating_point():
            marks[name] = mark_of(value)
    return marks


def marks_of_settings(module: nn.Module, known: Collection[int] = ()) -> dict:
    """The marks of the attributes that are not tensors, because a call may replace tensors.
    known: see `mark_of`.
    """
    own = module.__dict__.items()
    return {
        name: mark_of(value, known)
        for name, value in own
        if name not in NOT_MARKED and not isinstance(value, torch.Tensor)
    }


def mark_of(value: object, known: Collection[int] = ()) -> object:
    """A mark that stays equal as long as a value is unchanged. Numbers, flags and strings are
    compared by value, containers by what they contain, tensors by identity and version, and all
    else by identity and by what is inside it. NeverTheSame if that cannot be compared.

    known: the ids of modules that are compared elsewhere.
    """
    try:
        return [_mark_of_one(met) for met in walk(value, known)]
    except Unwatched as unwatched:
        return NeverTheSame(str(unwatched))


def _mark_of_one(met: Met) -> tuple:
    value = met.value
    if type(value) in PLAIN:
        return type(value), value
    if isinstance(value, torch.Tensor):
        return Same(value), version_of(value)
    if met.before is not None:
        return None, met.before
    return (Same(value) if met.container is None else met.container), met.size


def within(module: nn.Module) -> set[int]:
    """The ids of a module and of those inside it, which are compared by themselves."""
    return set(map(id, module.modules()))


class NeverTheSame:
    """The mark of a value that cannot be compared in each call. why: what attributes do that have
    such a value.
    """

    def __init__(self, why: str) -> None:
        self.why = why

    def __eq__(self, other: object) -> bool:
        return False


class Same:
    """A mark that compares an object by identity."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __deepcopy__(self, memo: dict) -> "Same":
        return Same(memo.get(id(self.value), self.value))  # the copy if there is one, or itself


def changes_itself(module: nn.Module) -> bool:
    """Whether a call may change the weight of the next one, as spectral norm's does in train
    mode.
    """
    makes = type(module) not in CONVOLUTION_TYPES or hooks(module)
    return bool(makes) and any(part.training for part in module.modules())


def keeps_size(module: nn.Module, size: int, derived: bool = False) -> TypeGuard[Convolution]:
    """Whether a module is a convolution with `size` taps along each axis, an odd number, centred on
    each pixel of the map, which is padded with zeros. Then the window around a pixel determines its
    result. derived: see `is_convolution`.
    """
    if size % 2 == 0 or not is_convolution(module, derived):
        return False
    ones = (1,) * len(module.kernel_size)
    return (
        module.kernel_size == (size,) * len(ones)
        and module.padding == (size // 2,) * len(ones)
        and module.stride == module.dilation == ones
        and module.groups == 1
        and module.padding_mode == "zeros"
        and shape_of_weight(module)[1:] == (module.in_channels, *module.kernel_size)
    )


def taps_of(module: nn.Module) -> int:
    """A convolution's taps along an axis; 0 for any other module."""
    return module.kernel_size[0] if isinstance(module, CONVOLUTION_TYPES) else 0


def is_known(norm: nn.Module) -> TypeGuard[KnownNorm]:
    """Whether `spade_modulate` can compute what this module computes."""
    if not is_plain(norm, KINDS):
        return False
    # An instance norm with running statistics updates them, which `spade_modulate` does not.
    return KINDS[type(norm)] != "instance" or norm.running_mean is None


def may_overwrite_result(module: nn.Module) -> bool:
    """Whether a module returns a new tensor that nothing else has seen or keeps."""
    is_new = type(module) in CONVOLUTION_TYPES and not module._forward_hooks
    return is_new and is_called_plainly(module) and may_overwrite()
