"""Copies of modules that share their parameters."""

from typing import Any

from .modules import MAKERS, Model
from .unchanged import NAME


def twin(module: Model, known: dict[int, Any] | None = None) -> Model:
    """A module of the same classes, with the same parameters and hooks, and copies of the buffers.
    `known` has, by id, the twins made so far: a part that occurs twice has one twin.
    """
    known = {} if known is None else known
    if id(module) in known:
        return known[id(module)]
    other = known[id(module)] = module.__new__(type(module))
    own = other.__dict__
    own.update(
        (name, value.copy() if isinstance(value, dict) else value)
        for name, value in vars(module).items()
        if name != NAME
    )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, MAKERS):
            own.pop(hook.name, None)  # the previous call's weight, which takes memory
    for name, child in module._modules.items():
        other._modules[name] = None if child is None else twin(child, known)
    for name, buffer in module._buffers.items():
        if buffer is not None and id(buffer) not in known:
            known[id(buffer)] = buffer.detach().clone()
        other._buffers[name] = known.get(id(buffer))
    return other
