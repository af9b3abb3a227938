"""Proves that a module's own forward and the fast one compute the same function: outputs, gradients
and buffers are compared on small random tensors, with random weights, in each state that the module
may be used in.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn as nn

from ..agreement import excess
from ..nn.choice import window_mode
from ..nn.modules import marks_of
from ..nn.parts import Form
from .recognise import Unlike
from .swap import Call, Fast, Proof, kinds_of_children, make_fast, marks

PIXELS = (6, 4, 4)  # of a probe's x
# A probe's conditions, by their size relative to x: noise has gradients, labels use windows.
CONDITIONS = {
    "larger": [((9, 7, 5), "noise"), ((12, 8, 8), "labels")],
    "smaller": [((3, 2, 2), "noise"), ((4, 3, 3), "labels")],
    "same": [(PIXELS, "noise")],
}
# Multiples of the error that agreement.py allows. In float64 this is 1e-12, which proves the
# formula. In other dtypes, where rounding may favour one of two short sums by chance, it shows that
# the dtype works.
SLACK_IN_DOUBLE, SLACK = 100, 30
# The distance allowed between the two outputs, as a fraction of the largest element. Rounding is
# amplified where a channel's deviation is small relative to its mean; here it is a hundredth.
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
AUTOCAST_SLACK = 3  # ratio of our error's norm to the own forward's, which rounds elsewhere


class OwnForwardFails(Unlike):
    """The module's own forward fails on a probe."""


def prove(module: nn.Module, kind: type[Fast], form: Form) -> tuple[Proof, list[str]]:
    """The proof, and descriptions of the states that it does not cover. Raises Unlike if the two
    forwards disagree in the module's present mode and dtype.
    """
    weight = next(module.parameters())
    device = weight.device
    with (
        torch.random.fork_rng([device] if weight.is_cuda else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        # Only if the default device is another one: a default that is set slows every call.
        nullcontext() if torch.get_default_device() == device else device,
        torch.autocast(device.type, enabled=False),
        window_mode("always"),
    ):
        probe = Probe(module, kind, form)
        sizes = probe.prove_sizes()
        modes: list[tuple] = [(module.training, True)]
        dtypes: list[tuple] = [(module.training, *[weight.dtype] * 2, None)]
        exceptions = []
        for words, state, kept, check in probe.others(weight, sizes[0]):
            try:
                check()
                (modes if kept == "mode" else dtypes).append(state)
            except OwnForwardFails:
                pass  # nothing to prove: the module cannot be used in this state
            except Unlike as unlike:
                exceptions.append(f"its own forward {words}: {unlike}")
    proof = Proof(
        marks(module, form),
        kinds_of_children(module),
        tuple(modes),
        tuple(dtypes),
        frozenset(sizes),
    )
    return proof, exceptions


class Probe:
    """Runs copies of a module, unchanged and made fast, on the same tensors and weights."""

    def __init__(self, module: nn.Module, kind: type[Fast], form: Form) -> None:
        self.module, self.kind, self.form = module, kind, form
        self.dtype = next(module.parameters()).dtype
        self.values = Values(module)

    def prove_sizes(self) -> list[str]:
        """The sizes, relative to x, that a condition may have. Raises Unlike if the two forwards
        disagree on a condition that the own forward accepts, or if it accepts none.
        """
        sizes: list[str] = []
        failure: OwnForwardFails | None = None
        for size, conditions in CONDITIONS.items():
            try:
                for condition in conditions:
                    self.compare(*condition)
                sizes.append(size)
            except OwnForwardFails as fails:
                failure = fails
        if failure is not None and not sizes:
            raise failure
        return sizes

    def others(self, weight: torch.Tensor, size: str) -> Iterator[tuple[str, tuple, str, Callable]]:
        """The modes, and the dtypes of weights, x and autocast, other than the present ones. Yields
        a description, the state, "mode" or "dtype", and the function that proves the state.
        """
        state: tuple
        condition, device, dtype = CONDITIONS[size][-1], weight.device.type, weight.dtype
        half = dict.fromkeys((torch.get_autocast_dtype(device), torch.bfloat16))
        for training in (self.module.training, not self.module.training):
            words = f"in {'train' if training else 'eval'} mode"
            if training != self.module.training:
                check = partial(self.compare, *condition, training)
                yield words, (training, True), "mode", check
                yield words, (training, *[dtype] * 2, None), "dtype", check
            check = partial(self.compare_outputs, *condition, training, torch.float64)
            yield f"{words} without gradients", (training, False), "mode", check
            for other in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                if other != dtype:
                    check = partial(self.compare_outputs, *condition, training, other)
                    state = (training, other, other, None)
                    yield f"{words} in {other}", state, "dtype", check
            for autocast in half:
                for of_x in dict.fromkeys((dtype, autocast)):
                    check = partial(self.compare_autocast, *condition, training, autocast, of_x)
                    state = (training, dtype, of_x, autocast)
                    yield f"{words} under autocast to {autocast}", state, "dtype", check

    def compare(self, size: tuple, content: str, training: bool | None = None) -> None:
        """Raises Unlike if the two forwards disagree in float64 or in the module's own dtype."""
        tensors = self.tensors(size, content)
        truth = self.outcome(None, tensors, torch.float64, training)
        ours = self.outcome(self.kind, tensors, torch.float64, training)
        _compare(ours, truth, truth, torch.float64)
        if self.dtype != torch.float64 and content == "labels":
            theirs = self.outcome(None, tensors, self.dtype, training)
            ours = self.outcome(self.kind, tensors, self.dtype, training)
            _compare(ours, theirs, truth, self.dtype)
            _compare_outputs(ours, theirs, self.dtype)

    @torch.no_grad()
    def compare_outputs(
        self, size: tuple[int, ...], content: str, training: bool | None, dtype: torch.dtype
    ) -> None:
        """Raises Unlike if the two forwards disagree in this dtype, without gradients."""
        tensors = self.tensors(size, content)
        theirs, ours = (self.outcome(of, tensors, dtype, training) for of in (None, self.kind))
        _compare_outputs(ours, theirs, dtype)

    def compare_autocast(
        self,
        size: tuple[int, ...],
        content: str,
        training: bool | None,
        dtype: torch.dtype,
        dtype_of_x: torch.dtype,
    ) -> None:
        """Raises Unlike if the fast forward rounds more, or returns another dtype."""
        tensors = self.tensors(size, content)
        with torch.autocast(tensors[0].device.type, dtype):
            # Autocast leaves float64 alone: the truth has only explicit roundings.
            truth = self.outcome(None, tensors, torch.float64, training)
            theirs, ours = (
                self.outcome(of, tensors, self.dtype, training, dtype_of_x)
                for of in (None, self.kind)
            )
        _compare(ours, theirs, truth, dtype)
        _compare_outputs(ours, theirs, dtype)
        for name in ("y", "the gradient of x"):
            scale = truth[name].norm()
            error, allowed = ((one[name].double() - truth[name]).norm() for one in (ours, theirs))
            if error > AUTOCAST_SLACK * allowed + 1e-6 * scale:
                raise Unlike(
                    f"it rounds less: its error in {name} is {(allowed / scale).item():.1e}"
                )

    def tensors(self, size: tuple, content: str) -> tuple:
        """x, a condition of this size and dy, all float64. A condition of noise requires gradients,
        one of labels does not.
        """
        channels, label_nc = self.form.norm_nc, self.form.label_nc
        dims = self.form.spatial_dims
        torch.manual_seed(0)
        # Some channels are small enough for eps to matter, others are not.
        spread = torch.logspace(-2, 1, channels, dtype=torch.float64).view(1, -1, *[1] * dims)
        x = torch.randn(2, channels, *PIXELS[:dims], dtype=torch.float64) * spread + 1
        dy = torch.randn_like(x)
        if content == "noise":
            segmap = torch.randn(2, label_nc, *size[:dims], dtype=torch.float64, requires_grad=True)
        else:
            labels = torch.randint(3, (2, *size[:dims]))
            segmap = torch.randn(3, label_nc, dtype=torch.float64)[labels].movedim(-1, 1)
        return x, segmap, dy

    def outcome(
        self,
        kind: type[Fast] | None,
        tensors: tuple,
        dtype: torch.dtype,
        training: bool | None,
        dtype_of_x: torch.dtype | None = None,
    ) -> dict:
        """y, the gradients if they are recorded, and the buffers, after one forward of a copy of
        the module, unchanged (kind is None) or made fast.
        """
        module = _copy(self.module, self.values(dtype))
        if training is not None:
            module.train(training)
        x, segmap, dy = (
            tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)
            for tensor in tensors
        )
        x = x.detach().to(dtype_of_x or dtype)
        wanted = {"x": x.requires_grad_(), "the condition": segmap}
        wanted |= dict(module.named_parameters())
        wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
        try:
            y = self._forward(module, kind, x, segmap)
            if not isinstance(y, torch.Tensor):
                kind_of = type(y).__name__
                raise Unlike(f"its own forward returns a {kind_of}; a SPADE returns a tensor")
            if not torch.is_grad_enabled():
                wanted = {}
            dy = dy.to(y.dtype)[:, :1].expand_as(y)
            gradients: tuple[torch.Tensor | None, ...] = ()
            if wanted:
                gradients = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
        except Unlike:
            raise
        except Exception as error:  # the own forward may raise anything
            on = (
                f"fails on x {list(x.shape)} and a condition {list(segmap.shape)}:"
                f" {type(error).__name__}: {error}"
            )
            if kind is None:
                raise OwnForwardFails(f"its own forward {on}") from error
            raise Unlike(f"the fast forward {on}") from error
        found: dict[str, torch.Tensor] = {"y": y.detach()}
        for name, gradient in zip(wanted, gradients):
            if gradient is not None:
                found[f"the gradient of {name}"] = gradient
        return found | {
            f"the buffer {name}": buffer.detach() for name, buffer in module.named_buffers()
        }

    def _forward(self, module, kind, x, segmap):
        """y, computed without the module's own hooks."""
        if kind is not None:
            make_fast(module, kind, self.form)
            return module._fast(x, segmap)
        further, before = dict.fromkeys(Call(type(module).forward).required), marks_of(module)
        y = type(module).forward(module, x, segmap, **further)
        kept = [name for name, mark in marks_of(module).items() if before.get(name) != mark]
        if kept:
            raise Unlike(f"its own forward changes its attributes: {', '.join(kept)}")
        return y


class Values:
    """Substitutes for a module's parameters and buffers, in any dtype. Gradients with respect to
    them do not reach the module. Their values are random, so that a parameter which starts at zero
    or one has a visible effect.
    """

    def __init__(self, module: nn.Module) -> None:
        torch.manual_seed(0)
        self.parameters = {
            id(own): (own, _random_weight(name, own)) for name, own in module.named_parameters()
        }
        self.buffers = {id(own): (own, _random_buffer(own)) for own in module.buffers()}

    def __call__(self, dtype: torch.dtype) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for number, (own, value) in self.parameters.items():
            found[number] = nn.Parameter(value.to(dtype, copy=True), own.requires_grad)
        for number, (buffer, value) in self.buffers.items():
            kept = dtype if buffer.is_floating_point() else buffer.dtype
            found[number] = value.to(kept, copy=True)
        return found


def _random_weight(name, own):
    """A random weight in the dtype of its own. A convolution's is scaled so that results are near
    one, and a norm's is near one.
    """
    noise = torch.randn(own.shape, dtype=torch.float64)
    if own.dim() > 1:
        noise = noise / max(1, own[0].numel()) ** 0.5
    else:
        noise = 0.5 * noise + (name.rpartition(".")[2] == "weight")
    return noise.to(own.dtype)


def _random_buffer(own):
    """A buffer plus positive noise: it may be a variance, which must not become negative."""
    if not own.is_floating_point():
        return own.detach().clone()
    return (own.detach() + 0.5 * torch.rand(own.shape, dtype=torch.float64)).to(own.dtype)


def _compare(ours, theirs, truth, dtype):
    if ours.keys() != theirs.keys():
        differ = ", ".join(sorted(ours.keys() ^ theirs.keys()))
        raise Unlike(f"only one of the two forwards has results for: {differ}")
    # One scale for all parameters of a module: a gradient that is zero in exact arithmetic is only
    # rounding noise.
    scales: dict[str, float] = {}
    for name, tensor in truth.items():
        owner = name.rpartition(".")[0] or name
        largest = tensor.double().abs().max().item() if tensor.numel() else 0.0
        scales[owner] = max(scales.get(owner, 0.0), largest)
    for name in theirs:
        if theirs[name].is_floating_point():
            scale, eps = scales[name.rpartition(".")[0] or name], torch.finfo(dtype).eps
            far = excess(ours[name], theirs[name], truth[name], scale, eps)
            agrees = far <= (SLACK_IN_DOUBLE if dtype == torch.float64 else SLACK)
        else:
            agrees = torch.equal(ours[name], theirs[name])
        if not agrees:
            away = _error(ours[name], truth[name])
            raise Unlike(
                f"it does not compute what its parts suggest: {name} is {away} away in {dtype}"
            )


def _compare_outputs(ours, theirs, dtype):
    """Compares the two outputs directly: if a forward depends on the dtype, a float64 result is not
    the truth.
    """
    ours, theirs = ours["y"], theirs["y"]
    scale = theirs.abs().max().item() if theirs.numel() else 0.0
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise Unlike(f"y is {ours.dtype} {list(ours.shape)}, not {theirs.dtype}")
    if not (ours - theirs).abs().max().item() <= CLOSE[dtype] * scale:
        raise Unlike(
            f"it does not compute what its parts suggest: y is {_error(ours, theirs)} away in"
            f" {dtype}"
        )


def _error(ours, truth):
    if ours.shape != truth.shape:
        return f"of shape {list(ours.shape)}, not {list(truth.shape)},"
    distance = (ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)
    return f"{distance.item():.1e}"


def _copy(module, copies):
    """A copy of a module, with the parameters and buffers that `copies` has in place of the own
    ones. Changes of the copy do not reach the module.
    """
    if id(module) not in copies:
        copies[id(module)] = copy = module.__class__.__new__(module.__class__)
        for name, value in module.__dict__.items():  # containers are not shared
            copy.__dict__[name] = type(value)(value) if type(value) in (list, dict, set) else value
        for kind in ("_parameters", "_buffers"):
            copy.__dict__[kind] = {
                name: own if own is None else copies[id(own)]
                for name, own in module.__dict__[kind].items()
            }
        copy.__dict__["_modules"] = {
            name: child and _copy(child, copies) for name, child in module._modules.items()
        }
    return copies[id(module)]
