"""What `spade-fast check` does: converts a model, compares it with what it was, and times both."""

import copy
import importlib
import os
import statistics
import sys
import time
from typing import NamedTuple

import torch

from .convert import Report, convert

AGREES = 1e-8  # in float64, of each tensor's norm


class Result(NamedTuple):
    """What `check` found."""

    report: Report
    # relative error in float64 of each output ("output 0", …) and of the worst gradient ("gradient
    # of …")
    errors: dict
    # median of a call, by mode ("forward", "forward and backward"): the model's own, and converted
    seconds: dict

    @property
    def agrees(self):
        return all(error <= AGREES for error in self.errors.values())


def load(name):
    """The model and its arguments from "module:function": a function without arguments that returns
    them, (model, arguments).

    Errors: ValueError where there is no such function, or it returns something else.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(
            f"{name!r} should be MODULE:FUNCTION, such as my_project.models:generator_and_inputs"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    found = (
        function() if callable(function) and not isinstance(function, torch.nn.Module) else function
    )
    if not (
        isinstance(found, tuple)
        and len(found) == 2
        and isinstance(found[0], torch.nn.Module)
        and isinstance(found[1], (tuple, list))
    ):
        raise ValueError(
            f"{name!r} should return (model, arguments): a torch.nn.Module, and what it is called"
            " with as a tuple"
        )
    return found


def check(model, arguments, seconds=10.0):
    """Converts a copy of the model and compares the two. Neither the model nor its arguments
    change.

    Args:
        model: a torch.nn.Module, in the mode that it is to be checked in.
        arguments: what it is called with; its result is a tensor, or a tuple, list or dictionary
            that has some.
        seconds: how long the two are timed for.
    """
    fast = copy.deepcopy(model)
    report = convert(fast)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        truth, ours = (
            outcome(_double(copy.deepcopy(one)), _double(arguments)) for one in (model, fast)
        )
        seconds = time_both(copy.deepcopy(model), fast, arguments, seconds)
    return Result(report, compare(truth, ours), seconds)


def outcome(model, arguments):
    """Outputs and gradients by name, of one forward and backward."""
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


def outputs(result):
    """The floating-point tensors of what a model returns."""
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


def compare(truth, ours):
    """The relative error of each output and of the worst gradient; a gradient that is nothing but
    rounding is judged beside the others.
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
    worst = [max(gradients, key=gradients.get)] if gradients else []
    return {name: error for name, error in errors.items() if name not in gradients or name in worst}


def time_both(own, fast, arguments, seconds):
    """Medians of calls, the two models in turn: {mode: (own, fast)}."""

    def forward(model):
        with torch.no_grad():
            model(*arguments)

    def both(model):
        tensors = [
            tensor.float().sum() for tensor in outputs(model(*arguments)) if tensor.requires_grad
        ]
        if tensors:
            sum(tensors).backward()

    found = {}
    for mode, call in {"forward": forward, "forward and backward": both}.items():
        times, end = ([], []), time.monotonic() + seconds / 2
        for model in (own, fast):
            call(model)  # once to warm up
        while time.monotonic() < end or not times[1]:
            for model, taken in zip((own, fast), times):
                _wait()
                start = time.perf_counter()
                call(model)
                _wait()
                taken.append(time.perf_counter() - start)
        found[mode] = tuple(map(statistics.median, times))
    return found


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _double(value):
    """A model or arguments in float64, whatever is floating-point of them."""
    if isinstance(value, torch.nn.Module):
        return value.double()
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(map(_double, value)) if isinstance(value, (tuple, list)) else value
