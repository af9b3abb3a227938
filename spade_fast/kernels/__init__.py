"""The kernels of each backend, and the choice between the backends.

A backend is a `contract.Backend`; each of the modules `*_backend.py` has one. Its
`why_not(x, gamma)` answers both "can it run?" and "why not?".
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..scopes import Scope
from . import cpu_backend, cuda_backend, flops, torch_backend, triton_backend
from .contract import Backend

flops.register_when_imported()

BEST_FIRST = tuple(
    module.BACKEND for module in (cuda_backend, cpu_backend, triton_backend, torch_backend)
)
NAMES = tuple(backend.name for backend in BEST_FIRST)


class BackendStatus(NamedTuple):
    """One entry of what `backends()` returns."""

    name: str
    runs: bool
    reason: str  # why it does not run; empty if it does


def backends(x: Tensor | None = None, gamma: Tensor | None = None) -> list[BackendStatus]:
    """Which backends run here, and why the others do not: a list of BackendStatus, best first.

    With x (and γ), the answers are for these tensors. `spade_modulate` uses the first backend that
    runs, unless one is forced.

    Errors: TypeError if x or γ is not a tensor.
    """
    for name, tensor in {"x": x, "gamma": gamma}.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it should be a torch.Tensor")
    reasons = {backend.name: backend.why_not(x, gamma) for backend in BEST_FIRST}
    return [BackendStatus(name, reason is None, reason or "") for name, reason in reasons.items()]


def _checked(name, source):
    if name is not None and name not in NAMES:
        raise ValueError(f"{source} is {name!r}; it should be one of {', '.join(NAMES)}")
    return name


FORCED = _checked(os.environ.get("SPADE_FAST_BACKEND") or None, "SPADE_FAST_BACKEND")


class use_backend(Scope):
    """Inside `with use_backend("torch"):` this thread or task uses only this backend, and raises a
    RuntimeError if it cannot run. `use_backend("torch")` alone holds from then on.

    The environment variable SPADE_FAST_BACKEND, read when the package is imported, does the same
    for a whole process. `use_backend(None)` restores the automatic choice.
    """

    def __init__(self, name: str | None) -> None:
        super().__init__(_checked(name, "name"))


def is_exporting() -> bool:
    """Whether torch.export is running. In torch 2.11 `torch.compiler.is_exporting()` is also true
    in torch.compile.
    """
    return torch.compiler._is_exporting_flag


def select(x: Tensor, gamma: Tensor | None = None) -> Backend:
    """The backend for x and γ: the forced one, else the best that can run.

    Errors: RuntimeError if the forced one cannot run.
    """
    if is_exporting():
        return torch_backend.BACKEND  # an exported graph must run without this package
    forced = use_backend.setting_here(FORCED)
    for backend in BEST_FIRST:
        if forced in (None, backend.name):
            reason = backend.why_not(x, gamma)
            if reason is None:
                return backend
    raise RuntimeError(f"the backend {forced} was requested but cannot run: {reason}")
