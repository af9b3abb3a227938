"""`convert`: finds the SPADEs of other people's models, proves that it has understood each, and
makes them fast in place.

A module stays the same object, with its parameters, buffers and hooks; its class becomes one that
is derived from its own and has the forward of `nn/spade.py` or `nn/block.py`. A SPADE is recognised
by its parts, not by its name, and then proved: on small random tensors its outputs, gradients and
buffers must be those of its own forward, in float64 and in its own dtype.
"""

import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn as nn
from rich.console import Console
from rich.table import Table

from . import kernels
from .agreement import excess
from .nn.block import ResidualBlock
from .nn.spade import CONVOLUTIONS, Form, SpatiallyAdaptive
from .nn.windows import window_mode

PIXELS, ODD_PIXELS = (
    (6, 5, 4),
    (9, 7, 5),
)  # of a probe: of x, and of a condition that is resized to it
# Of what agreement allows. In float64 that is 1e-12, and proves the formula; in other dtypes, where
# one sum of a few numbers may be luckier than another, it shows that the module's dtype works.
SLACK_IN_DOUBLE, SLACK = 100, 30


class Entry(NamedTuple):
    """What became of one module."""

    name: str
    type: str
    recognised_as: str
    converted: bool
    reason: str  # why it was not converted; else how γ and β are computed, and on which backend


class Report(tuple):
    """The entries of every module that looked like a SPADE or its block, in the model's order;
    printed, a table.
    """

    def __str__(self):
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get().rstrip()

    def __rich__(self):
        if not self:
            return (
                "No SPADE was found: no module has convolutions for gamma and beta beside a norm."
                " The model is as it was."
            )
        table = Table("layer", "class", "recognised as", "converted", "how, or why not")
        for entry in self:
            table.add_row(
                entry.name or "(the model)",
                entry.type,
                entry.recognised_as,
                "yes" if entry.converted else "no",
                entry.reason,
            )
        return table

    @property
    def converted(self):
        """How many modules were converted."""
        return sum(entry.converted for entry in self)


class Unlike(Exception):
    """Why a module is left as it was."""


class OwnForwardFails(Unlike):
    """A probe that the module itself does not take."""


def convert(model, *, probe=True, blocks=True):
    """Makes the SPADEs of a model fast, in place: the same parameters, buffers, hooks, keys and
    numbers.

    Args:
        model: any torch.nn.Module. What it has of SPADEs is found by structure: see the report for
            what was not converted, and why.
        probe: prove each by outputs, gradients and buffers on small random tensors, against its own
            forward.
        blocks: convert residual blocks of the published shape (norm_0, norm_1, norm_s, conv_0,
            conv_1, conv_s) as well.

    Returns:
        The Report. `revert(model)` undoes it.

    Raises:
        TypeError: the model is no module, or is scripted or compiled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, it should be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is scripted: its forward is fixed; convert it before torch.jit.script or trace"
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is compiled: convert it before torch.compile")
    entries = {}
    for name, module in model.named_modules():
        if looks_like_spade(module):
            entries[name] = _convert(name, module, FastSPADE, recognise, spade_inputs, probe)
    for name, module in model.named_modules() if blocks else ():
        if looks_like_block(module):
            entries[name] = _convert(name, module, FastBlock, recognise_block, block_inputs, probe)
    return Report(entries[name] for name, _ in model.named_modules() if name in entries)


def revert(model):
    """Gives the modules that `convert` converted their own classes back. Returns how many they
    were.
    """
    found = [module for module in model.modules() if isinstance(module, Fast)]
    for module in found:
        module.__class__ = module.own_class
        module.__dict__.pop("spade_form", None)
    return len(found)


class Fast:
    """Marks the classes that `convert` makes. They have no name that could be imported: pickle and
    copy make them anew.
    """

    def __reduce_ex__(self, protocol):
        return _empty, (self.kind, self.own_class), self.__dict__

    def _get_name(self):
        return f"Fast{self.own_class.__name__}"

    def forward(self, *arguments, **named):
        # x and the condition may be given by the names that the module's own forward has for them.
        arguments += tuple(
            named.pop(name) for name in self.argument_names[len(arguments) :] if name in named
        )
        return super().forward(*arguments, **named)


class FastSPADE(Fast, SpatiallyAdaptive):
    """A SPADE of another class, as `nn/spade.py` computes it."""


class FastBlock(Fast, ResidualBlock):
    """A residual block of another class, as `nn/block.py` computes it."""


@functools.cache
def fast_class(kind, own_class):
    """The class that is own_class but for forward."""
    names = tuple(inspect.signature(own_class.forward).parameters)[1:3]
    return type(own_class)(
        own_class.__name__,
        (kind, own_class),
        {"kind": kind, "own_class": own_class, "argument_names": names},
    )


def _empty(kind, own_class):
    kind = fast_class(kind, own_class)
    return kind.__new__(kind)


def _convert(name, module, kind, recognise, inputs, probe):
    def entry(recognised_as, converted, reason):
        own_class = getattr(module, "own_class", type(module))
        return Entry(name, own_class.__name__, recognised_as, converted, reason)

    if isinstance(module, (SpatiallyAdaptive, ResidualBlock)):
        return entry("spade_fast's", isinstance(module, Fast), "it is fast already")
    try:
        if "forward" in module.__dict__:
            raise Unlike("its forward was replaced on this very module")
        if any(tensor.is_meta for tensor in module.parameters()):
            raise Unlike("its parameters are on the meta device, they have no values")
        form, recognised_as = recognise(module)
    except Unlike as unlike:
        return entry("", False, str(unlike))
    try:
        if probe:
            prove(module, kind, form, inputs)
    except Unlike as unlike:
        return entry(recognised_as, False, str(unlike))
    make_fast(module, kind, form)
    return entry(recognised_as, True, how(module))


def make_fast(module, kind, form):
    module.__class__ = fast_class(kind, type(module))
    if form is not None:
        module.spade_form = form


def how(module):
    """How a converted module computes γ and β, and on which backend."""
    weight = next(module.parameters())
    backend = kernels.select(weight).NAME
    if isinstance(module, FastBlock):
        return f"with its activations; {backend}"
    return f"{'windows of labels, else pixels' if module.convolutions() else 'pixels'}; {backend}"


def looks_like_spade(module):
    """Whether a module has children for γ and for β."""
    names = [name.lower() for name, _ in module.named_children()]
    return any("gamma" in name for name in names) and any("beta" in name for name in names)


def recognise(module):
    """The Form of a SPADE, and what it is in words; raises Unlike."""
    children = {name: _only_child(name, child) for name, child in module.named_children()}
    children = {name: child for name, child in children.values()}
    convolutions = {
        name: [part for part in child.modules() if isinstance(part, tuple(CONVOLUTIONS.values()))]
        for name, child in children.items()
    }

    def only(what, names):
        if len(names) != 1:
            raise Unlike(
                f"it has {', '.join(names) or 'nothing'} for {what}, it should have one module"
            )
        return names[0]

    gamma = only(
        "gamma", [name for name in children if "gamma" in name.lower() and convolutions[name]]
    )
    beta = only(
        "beta", [name for name in children if "beta" in name.lower() and convolutions[name]]
    )
    shared = only(
        "the convolution before gamma and beta",
        [name for name in children if convolutions[name] and name not in (gamma, beta)],
    )
    for name in (gamma, beta, shared):
        only(
            f"the convolution of {name}",
            [f"convolution {number + 1}" for number in range(len(convolutions[name]))],
        )
    first, second, third = (convolutions[name][0] for name in (shared, gamma, beta))
    if (
        not first.out_channels == second.in_channels == third.in_channels
        or second.out_channels != third.out_channels
    ):
        raise Unlike(f"{shared}, {gamma} and {beta} have other channels than those of a SPADE")
    norm = only(
        "the norm",
        [
            name
            for name in children
            if name not in (gamma, beta, shared) and not _is_activation(children[name])
        ],
    )
    used = {
        id(tensor) for name in (gamma, beta, shared, norm) for tensor in children[name].parameters()
    }
    others = [name for name, tensor in module.named_parameters() if id(tensor) not in used]
    if others:
        raise Unlike(f"it has parameters that a SPADE has not: {', '.join(others)}")
    dims = next(dims for dims, kind in CONVOLUTIONS.items() if isinstance(first, kind))
    form = Form(norm, shared, gamma, beta, second.out_channels, first.in_channels, dims)
    return (
        form,
        f"SPADE({form.norm_nc}, {form.label_nc}, {first.out_channels}),"
        f" {type(children[norm]).__name__}",
    )


def _only_child(name, child):
    """A child and its name, of a list of one that one."""
    if isinstance(child, nn.ModuleList) and len(child) == 1:
        return _only_child(f"{name}.0", child[0])
    return name, child


def _is_activation(module):
    return type(module).__module__ == nn.ReLU.__module__ and not list(module.parameters())


def spade_inputs(module, form):
    return form.norm_nc, form.label_nc, form.spatial_dims


def looks_like_block(module):
    """Whether a module has the children of a residual block, with SPADEs that are fast."""
    children = dict(module.named_children())
    if not {"norm_0", "norm_1", "conv_0", "conv_1"} <= children.keys() or (
        "norm_s" in children
    ) != ("conv_s" in children):
        return False
    return all(
        isinstance(children[name], SpatiallyAdaptive)
        for name in ("norm_0", "norm_1", "norm_s")
        if name in children
    )


def recognise_block(module):
    return (
        None,
        f"residual block {module.norm_0.spade_form.norm_nc} → {module.norm_1.spade_form.norm_nc}",
    )


def block_inputs(module, form):
    return spade_inputs(module.norm_0, module.norm_0.spade_form)


def prove(module, kind, form, inputs):
    """Raises Unlike where the module's own forward and the fast one do not agree: y, each gradient,
    each buffer.
    """
    weight = next(module.parameters())
    with (
        torch.random.fork_rng([weight.device] if weight.is_cuda else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(weight.device.type, enabled=False),
        window_mode("always"),
    ):
        try:
            _prove(module, kind, form, inputs(module, form), weight, resizes=True)
        except OwnForwardFails:
            _prove(module, kind, form, inputs(module, form), weight, resizes=False)


def _prove(module, kind, form, sizes, weight, resizes):
    parameters = Parameters(module)
    for has_labels in (False, True):
        tensors = [
            tensor.to(weight.device) for tensor in probe_tensors(*sizes, has_labels, resizes)
        ]
        truth = _try(module, None, form, tensors, torch.float64, parameters)
        _compare(
            _try(module, kind, form, tensors, torch.float64, parameters),
            truth,
            truth,
            torch.float64,
        )
    if weight.dtype != torch.float64:
        theirs, ours = (
            _try(module, which, form, tensors, weight.dtype, parameters) for which in (None, kind)
        )
        _compare(ours, theirs, truth, weight.dtype)


class Parameters:
    """A module's parameters as others of their own, in one dtype or another: gradients with respect
    to them do not reach the module.
    """

    def __init__(self, module):
        self.own = list(module.parameters())
        self.of_dtype = {}

    def __call__(self, dtype):
        if dtype not in self.of_dtype:
            self.of_dtype[dtype] = {
                id(own): nn.Parameter(
                    own.detach().to(dtype, copy=own.is_inference()), own.requires_grad
                )
                for own in self.own
            }
        return self.of_dtype[dtype]


def probe_tensors(channels, label_nc, dims, has_labels, resizes):
    """x, a condition (of another size where it is resized) of noise with gradients or of labels
    without, and dy, all in float64.
    """
    torch.manual_seed(0)
    spread = torch.logspace(-2, 1, channels, dtype=torch.float64).view(
        1, -1, *[1] * dims
    )  # where eps matters, and where it does not
    x = torch.randn(2, channels, *PIXELS[:dims], dtype=torch.float64) * spread + 1
    dy = torch.randn_like(x)
    if not has_labels:
        return (
            x,
            torch.randn(
                2,
                label_nc,
                *(ODD_PIXELS if resizes else PIXELS)[:dims],
                dtype=torch.float64,
                requires_grad=True,
            ),
            dy,
        )
    labels = torch.randint(3, (2, *PIXELS[:dims]))
    for dim in range(1, dims + 1) if resizes else ():
        labels = labels.repeat_interleave(2, dim)
    return x, torch.randn(3, label_nc, dtype=torch.float64)[labels].movedim(-1, 1), dy


def _compare(ours, theirs, truth, dtype):
    if ours.keys() != theirs.keys():
        raise Unlike(
            "the fast forward has other gradients:"
            f" {', '.join(sorted(ours.keys() ^ theirs.keys()))}"
        )
    # of a module's parameters together: a gradient that is zero in exact arithmetic is noise beside
    # the others
    scales = {}
    for name, tensor in truth.items():
        owner = name.rpartition(".")[0] or name
        scales[owner] = max(
            scales.get(owner, 0.0), tensor.double().abs().max().item() if tensor.numel() else 0.0
        )
    for name in theirs:
        if theirs[name].is_floating_point():
            far = excess(
                ours[name], theirs[name], truth[name], scales[name.rpartition(".")[0] or name]
            )
            agrees = far <= (SLACK_IN_DOUBLE if dtype == torch.float64 else SLACK)
        else:
            agrees = torch.equal(ours[name], theirs[name])
        if not agrees:
            raise Unlike(
                f"it computes something else than its parts say: {name} is"
                f" {_error(ours[name], truth[name])} away in {dtype}"
            )


def _error(ours, truth):
    if ours.shape != truth.shape:
        return f"of shape {list(ours.shape)}, not {list(truth.shape)},"
    distance = (ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)
    return f"{distance.item():.1e}"


def _try(module, kind, form, tensors, dtype, parameters):
    """y, the gradients and the buffers after one forward of a copy of the module, as it is (kind
    None) or made fast.
    """
    module = _copy(module, dtype, dict(parameters(dtype)))
    if kind is not None:
        make_fast(module, kind, form)
    x, segmap, dy = (
        tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)
        for tensor in tensors
    )
    wanted = {"x": x.requires_grad_(), "the condition": segmap, **dict(module.named_parameters())}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    try:
        y = module.forward(x, segmap)  # without the module's own hooks, which stay with it
        if not isinstance(y, torch.Tensor):
            raise Unlike(f"its own forward returns a {type(y).__name__}, a SPADE returns a tensor")
        gradients = torch.autograd.grad(
            y, list(wanted.values()), dy.to(y.dtype)[:, :1].expand_as(y), allow_unused=True
        )
    except Unlike:
        raise
    except Exception as error:  # whatever a stranger's forward may raise
        on = (
            f"fails on x {list(x.shape)} and a condition {list(segmap.shape)}:"
            f" {type(error).__name__}: {error}"
        )
        raise (
            OwnForwardFails(f"its own forward {on}")
            if kind is None
            else Unlike(f"the fast forward {on}")
        ) from error
    found = {"y": y.detach()} | {
        f"the gradient of {name}": gradient
        for name, gradient in zip(wanted, gradients)
        if gradient is not None
    }
    return found | {
        f"the buffer {name}": buffer.detach() for name, buffer in module.named_buffers()
    }


def _copy(module, dtype, copies):
    """A copy of a module, with those parameters that `copies` has for its own, and copies of its
    buffers: nothing done to it reaches it.
    """
    if id(module) not in copies:
        copies[id(module)] = copy = module.__class__.__new__(module.__class__)
        copy.__dict__.update(module.__dict__)
        copy.__dict__["_parameters"] = {
            name: own if own is None else copies[id(own)]
            for name, own in module._parameters.items()
        }
        copy.__dict__["_buffers"] = {
            name: own
            if own is None
            else own.detach().to(dtype if own.is_floating_point() else own.dtype, copy=True)
            for name, own in module._buffers.items()
        }
        copy.__dict__["_modules"] = {
            name: child and _copy(child, dtype, copies) for name, child in module._modules.items()
        }
    return copies[id(module)]
