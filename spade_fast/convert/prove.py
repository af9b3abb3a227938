"""Proves that a module's own forward and the fast one compute the same function: outputs, gradients
and buffers are compared on small random tensors, with random weights, in each state that the module
may be used in.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten

from ..agreement import excess
from ..nn.modules import marks_of, within
from ..nn.parts import Form
from .copies import Values, copy_of, trying
from .roles import OwnForwardFails, Unlike
from .swap import (
    Call,
    Called,
    Fast,
    Mark,
    OwnForm,
    Proof,
    call_own,
    kinds_of_children,
    make_fast,
    marks,
)

PIXELS = (6, 4, 4)  # of a probe's x
ODD = (5, 4, 4)  # where the first of an odd number of frames is resized apart
# A probe's conditions, by their size relative to x: noise has gradients, labels use windows.
CONDITIONS: dict[str, list[tuple[tuple | None, str]]] = {
    "larger": [((9, 7, 5), "noise"), ((12, 8, 8), "labels")],
    "smaller": [((3, 2, 2), "noise"), ((4, 3, 3), "labels")],
    "same": [(None, "noise")],
}
# Multiples of the error that agreement.py allows. In float64 this is 1e-12, which proves the
# formula. In other dtypes, where rounding may favour one of two short sums by chance, it shows that
# the dtype works.
SLACK_IN_DOUBLE, SLACK = 100, 30
# The distance allowed between the two outputs, as a fraction of the largest element. Rounding is
# amplified where a channel's deviation is small relative to its mean; here it is a hundredth.
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
BESIDE = "what its own forward returns beside y,"
AUTOCAST_SLACK = 3  # ratio of our error's norm to the own forward's, which rounds elsewhere


def prove(module: nn.Module, kind: type[Fast], form: Form | OwnForm) -> tuple[Proof, list[str]]:
    """The proof, and descriptions of the states that it does not cover. Raises Unlike if the two
    forwards disagree in the module's present mode and dtype.
    """
    weight = next(module.parameters())
    with trying(module):
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

    def __init__(self, module: nn.Module, kind: type[Fast], form: Form | OwnForm) -> None:
        self.module, self.kind, self.form = module, kind, form
        self.called = form.call or Called()
        self.dtype = next(module.parameters()).dtype
        self.values = Values(module)

    def prove_sizes(self) -> list[str]:
        """The sizes, relative to x, that a condition may have. Raises Unlike if the two forwards
        disagree on a condition that the own forward accepts, or if it accepts none.
        """
        sizes: list[str] = []
        failure: OwnForwardFails | None = None
        pixels = (ODD, PIXELS) if self.form.apart else (PIXELS,)
        for size, conditions in CONDITIONS.items():
            try:
                for (of_condition, content), of_x in product(conditions, pixels):
                    self.compare(of_condition, content, of_x)
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
        of_condition, content = CONDITIONS[size][-1]
        condition = (of_condition, content, ODD if self.form.apart else PIXELS)
        device, dtype = weight.device.type, weight.dtype
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

    def compare(
        self, size: tuple | None, content: str, pixels: tuple, training: bool | None = None
    ) -> None:
        """Raises Unlike if the two forwards disagree in float64 or in the module's own dtype."""
        tensors = self.tensors(size, content, pixels)
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
        self,
        size: tuple | None,
        content: str,
        pixels: tuple,
        training: bool | None,
        dtype: torch.dtype,
    ) -> None:
        """Raises Unlike if the two forwards disagree in this dtype, without gradients."""
        tensors = self.tensors(size, content, pixels)
        theirs, ours = (self.outcome(of, tensors, dtype, training) for of in (None, self.kind))
        _compare_outputs(ours, theirs, dtype)

    def compare_autocast(
        self,
        size: tuple | None,
        content: str,
        pixels: tuple,
        training: bool | None,
        dtype: torch.dtype,
        dtype_of_x: torch.dtype,
    ) -> None:
        """Raises Unlike if the fast forward rounds more, or returns another dtype."""
        tensors = self.tensors(size, content, pixels)
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

    def tensors(self, size: tuple | None, content: str, pixels: tuple) -> tuple:
        """x of this many pixels, a condition of this size (x's, if that is None) and dy, all
        float64. A condition of noise requires gradients, one of labels does not.
        """
        size = size or pixels
        channels, label_nc = self.form.norm_nc, self.form.label_nc
        dims = self.form.spatial_dims
        torch.manual_seed(0)
        # Some channels are small enough for eps to matter, others are not.
        spread = torch.logspace(-2, 1, channels, dtype=torch.float64).view(1, -1, *[1] * dims)
        x = torch.randn(2, channels, *pixels[:dims], dtype=torch.float64) * spread + 1
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
        module = copy_of(self.module, self.values(dtype))
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
        torch.manual_seed(0)  # the own forward may draw noise
        try:
            found = self._found(self._forward(module, kind, x, segmap, dtype))
            if not torch.is_grad_enabled():
                wanted = {}
            outputs = [tensor for tensor in found.values() if tensor.requires_grad]
            of_outputs = [
                dy.to(own.dtype)[:, :1].expand_as(own) if own.shape == dy.shape else own.detach()
                for own in outputs
            ]
            gradients: tuple[torch.Tensor | None, ...] = ()
            if wanted:
                gradients = torch.autograd.grad(
                    outputs, list(wanted.values()), of_outputs, allow_unused=True
                )
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
        found = {name: tensor.detach() for name, tensor in found.items()}
        for name, gradient in zip(wanted, gradients):
            if gradient is not None and gradient.layout != torch.strided:
                raise Unlike(f"the gradient of {name} is sparse")
            if gradient is not None:
                found[f"the gradient of {name}"] = gradient
        return found | {
            f"the buffer {name}": buffer.detach() for name, buffer in module.named_buffers()
        }

    def _found(self, result):
        """y and any other tensors of a result, by name."""
        leaves, spec = tree_flatten(result)
        if self.called.result is None:
            found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            return {f"result {number}" if number else "y": own for number, own in enumerate(found)}
        marked, expected = tree_flatten(self.called.result)
        tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        if spec != expected or tensors != [isinstance(mark, Mark) for mark in marked]:
            kind = type(result).__name__
            raise Unlike(f"its own forward returns a {kind}; it should return y as a tensor")
        named = {}
        for number, (leaf, mark) in enumerate(zip(leaves, marked)):
            if isinstance(mark, Mark):
                named["y" if mark is Mark.Y else f"{BESIDE} {number}"] = leaf
            elif leaf is not mark and leaf != mark:
                raise Unlike(f"its own forward returns {leaf!r} beside y, not always {mark!r}")
        return named

    def _forward(self, module, kind, x, segmap, dtype):
        """The result, computed without the module's own hooks."""
        if kind is not None:
            make_fast(module, kind, self.form)
            return module._fast(x, segmap)
        call, known = Call(type(module).forward), within(module)
        before = marks_of(module, known)
        forward, further = type(module).forward, {}
        if self.called.ignores:
            # What is not read is given, to show that it is not.
            other = copy_of(self.module, self.values(dtype)).train(module.training)
            of_other = (other, call, x.detach() + 1, segmap.detach() + 1, self.called)
            result = call_own(forward, *of_other)
            returned = list(zip(self.called.result, result))
            for name, ignored in self.called.ignores.items():
                further[name] = next(own for marked, own in returned if marked == ignored)
        y = call_own(forward, module, call, x, segmap, self.called, **further)
        after = marks_of(module, known)
        kept = [name for name, mark in after.items() if before.get(name) != mark]
        if kept:
            raise Unlike(f"its own forward changes its attributes: {', '.join(kept)}")
        return y


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
    the truth. What is returned beside y should be equal.
    """
    for name, beside in theirs.items():
        if name.startswith(BESIDE):
            own = ours[name]
            if own.dtype != beside.dtype or not torch.equal(own, beside):
                raise Unlike(f"{name} is not the condition, resized to x by nearest neighbour")
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
