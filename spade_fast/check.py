"""The work of `spade-fast check`: converts a copy of a model, compares the two, and times both."""

import contextlib
import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .convert import Report, convert, revert
from .imported import Failed, returned, theirs
from .nn import spade as layer

AGREES = 1e-8  # largest error in float64, relative to each tensor's norm


class Result(NamedTuple):
    """What `check` found. If nothing was converted, only the report has contents."""

    report: Report
    # The relative error in float64 of each output ("output 0", …) and of the worst gradient
    # ("gradient of …").
    errors: dict
    # By mode ("forward", "forward and backward"): the median seconds of a call of the original and
    # of the converted model.
    seconds: dict
    # By mode: how many calls of SPADEs computed γ and β at "windows", and how many at "pixels".
    ways: dict

    @property
    def agrees(self) -> bool:
        return all(error <= AGREES for error in self.errors.values())


def load(name: str) -> tuple[torch.nn.Module, Sequence]:
    """The model and its arguments from "module:function", a function without arguments that returns
    (model, arguments).

    Errors: ValueError if there is no such function, or if it returns something else; Failed if the
    module or the function raises.
    """
    found = returned(name, "my_project.models:generator_and_inputs")
    if not (
        isinstance(found, tuple)
        and len(found) == 2
        and isinstance(found[0], torch.nn.Module)
        and isinstance(found[1], (tuple, list))
    ):
        raise ValueError(
            f"{name!r} should return (model, arguments): a torch.nn.Module, and a tuple of the"
            " arguments to call it with"
        )
    return found


def check(model: torch.nn.Module, arguments: Sequence, seconds: float = 10.0) -> Result:
    """Converts a copy of the model and compares the two. Neither the model nor its arguments
    change.

    Args:
        model: a torch.nn.Module, in the mode (train or eval) to check it in. Modules in it that
            are already converted are compared with their own classes.
        arguments: the arguments to call it with. Its result should be a tensor, or a tuple, list or
            dictionary that contains tensors.
        seconds: seconds to spend on timing.

    Errors: Failed if the model itself fails, or if it cannot be copied or converted.
    """
    with theirs("the model cannot be copied"):
        own, fast = copy.deepcopy(model), copy.deepcopy(model)
    revert(own)
    try:
        report = convert(fast)
    except TypeError as error:
        raise Failed(str(error)) from None
    if not report.converted:
        return Result(report, {}, {}, {})
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        with theirs("the model itself failed in float64"):
            truth = outcome(_double(copy.deepcopy(own)), _double(arguments))
        ours = outcome(_double(copy.deepcopy(fast)), _double(arguments))
        times, ways = time_both(own, fast, arguments, seconds)
    return Result(report, compare(truth, ours), times, ways)


def outcome(model: torch.nn.Module, arguments: Sequence) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one forward and backward, by name."""
    torch.manual_seed(0)
    tensors = outputs(model(*arguments))
    wanted = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    found = {f"output {number}": tensor.detach() for number, tensor in enumerate(tensors)}
    differentiable = [tensor for tensor in tensors if tensor.requires_grad]
    if wanted and differentiable:
        gradients = torch.autograd.grad(
            differentiable,
            list(wanted.values()),
            [torch.cos(tensor.detach()) for tensor in differentiable],
            allow_unused=True,
        )
        found |= {
            f"gradient of {name}": tensor
            for name, tensor in zip(wanted, gradients)
            if tensor is not None
        }
    return found


def outputs(result: object) -> list[torch.Tensor]:
    """The floating-point tensors in a model's result."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() else []
    parts = (
        result.values()
        if isinstance(result, dict)
        else result
        if isinstance(result, (tuple, list))
        else ()
    )
    return [tensor for part in parts for tensor in outputs(part)]


def compare(truth: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, float]:
    """The relative error of each output and of the worst gradient. A gradient that consists of
    rounding errors is measured against the largest gradient instead of its own norm.
    """
    largest = max(
        (tensor.norm().item() for name, tensor in truth.items() if name.startswith("gradient")),
        default=0.0,
    )
    errors = {}
    for name, tensor in truth.items():
        scale = max(tensor.norm().item(), 1e-6 * largest if name.startswith("gradient") else 0.0)
        error = (ours[name] - tensor).norm().item() if name in ours else float("inf")
        errors[name] = (
            float("inf") if error != error else error / scale if scale else error
        )  # NaN agrees with nothing
    gradients = {name: error for name, error in errors.items() if name.startswith("gradient")}
    worst = [max(gradients, key=gradients.__getitem__)] if gradients else []
    return {name: error for name, error in errors.items() if name not in gradients or name in worst}


def time_both(
    own: torch.nn.Module, fast: torch.nn.Module, arguments: Sequence, seconds: float
) -> tuple[dict[str, tuple[float, float]], dict[str, Counter]]:
    """Median seconds of calls, with the two models called in turn, and how the fast model computed
    γ and β: {mode: (own, fast)}, {mode: ways}.
    """

    def forward(model):
        with torch.no_grad():
            model(*arguments)

    def both(model):
        tensors = [
            tensor.float().sum() for tensor in outputs(model(*arguments)) if tensor.requires_grad
        ]
        if tensors:
            torch.stack(tensors).sum().backward()

    found: dict[str, tuple[float, float]] = {}
    ways: dict[str, Counter] = {}
    for mode, call in {"forward": forward, "forward and backward": both}.items():
        times: tuple[list[float], list[float]] = ([], [])
        end = time.monotonic() + seconds / 2
        with theirs("the model itself failed"):
            call(own)  # once to warm up
        with ways_of_spades() as ways[mode]:
            call(fast)
        while time.monotonic() < end or not times[1]:
            for model, taken in zip((own, fast), times):
                _wait()
                start = time.perf_counter()
                call(model)
                _wait()
                taken.append(time.perf_counter() - start)
        found[mode] = statistics.median(times[0]), statistics.median(times[1])
    return found, ways


@contextlib.contextmanager
def ways_of_spades() -> Iterator[Counter]:
    """Inside, counts the calls in which SPADEs compute γ and β at "windows", looked up by an index,
    and those at "pixels".
    """
    modulate, ways = layer.spade_modulate, Counter[str]()

    def counting(*arguments, index=None, **named):
        ways["pixels" if index is None else "windows"] += 1
        return modulate(*arguments, index=index, **named)

    layer.spade_modulate = counting
    try:
        yield ways
    finally:
        layer.spade_modulate = modulate


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _double(value):
    """A model or arguments with all their floating-point tensors in float64."""
    if isinstance(value, torch.nn.Module):
        return value.double()
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_double, value))
    return type(value)(map(_double, value)) if isinstance(value, (tuple, list)) else value
