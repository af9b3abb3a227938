"""Copies of a module, on which its forward is tried out with random weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn as nn

from ..nn.choice import window_mode


@contextmanager
def trying(module: nn.Module) -> Iterator[None]:
    """Inside, a module's forward may be tried out: the states of random numbers, modes and devices
    are what they were, afterwards.
    """
    weight = next(module.parameters())
    device = weight.device
    with ExitStack() as stack:
        for context in (
            torch.random.fork_rng([device] if weight.is_cuda else []),
            torch.inference_mode(False),
            torch.enable_grad(),
            # Only if the default device is another one: a default that is set slows every call.
            nullcontext() if torch.get_default_device() == device else device,
            torch.autocast(device.type, enabled=False),
            window_mode("always"),
        ):
            stack.enter_context(context)
        yield


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


def copy_of(module: nn.Module, copies: dict) -> nn.Module:
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
            name: child and copy_of(child, copies) for name, child in module._modules.items()
        }
    return copies[id(module)]
