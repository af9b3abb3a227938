"""The operations of `contract.py` as PyTorch operators, in plain PyTorch unless a compiled kernel
is registered.

Compiled backends register their kernels for these operators (csrc/cpu for CPU, csrc/cuda for CUDA).
Without compiled kernels the operators still exist and can be tested.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import torch_backend
from .contract import NUMBERING, OPERATIONS


def declare(namespace: str, names: Iterable[str]) -> None:
    """Declares these operators in a namespace. A second set of kernels for the same device needs a
    namespace of its own.
    """
    for name in names:
        operator, operation = f"{namespace}::{name}", OPERATIONS[name]
        torch.library.define(operator, operation.schema, tags=[torch.Tag.pt2_compliant_tag])
        torch.library.register_fake(operator, operation.checked(operation.fake))


def declare_numbering(namespace: str) -> None:
    """Declares the operators that number: only compiled GPU kernels implement them, and no graph
    compiler sees them.
    """
    for name, schema in NUMBERING.items():
        torch.library.define(f"{namespace}::{name}", schema)


def implement(namespace: str, name: str, key: str, kernel: Callable[..., Any]) -> None:
    """Registers a kernel for a dispatch key ("CPU", "CUDA")."""
    torch.library.impl(f"{namespace}::{name}", key, OPERATIONS[name].checked(kernel))


def declared(namespace: str, names: Iterable[str]) -> dict[str, Any]:
    """These operators of a namespace by name, as fields of a `Backend`."""
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in names}


declare("spade_fast", OPERATIONS)
declare_numbering("spade_fast")
for name in OPERATIONS:
    implement("spade_fast", name, "CompositeExplicitAutograd", getattr(torch_backend, name))


def without_kernel(dispatch_key: str, names: Iterable[str]) -> list[str]:
    """Those of these operators that have no compiled kernel for a device ("CPU", "CUDA")."""
    return [
        name
        for name in names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"spade_fast::{name}", dispatch_key)
    ]


def not_built(library: str, needs: str) -> str:
    """Why a library is missing, and what to do about it."""
    return (
        f"the library {library} is missing: it was not built when the package was installed. It"
        f" takes {needs}; install that, then reinstall the package with `pip install -v`, whose"
        " output says what was built, and why anything was not"
    )


def not_loaded(library: str, error: Exception) -> str:
    """Why a library that was built does not load, and what to do about it."""
    return (
        f"the library {library} cannot be loaded: {error}. If another torch was installed since it"
        " was built, reinstall the package"
    )
