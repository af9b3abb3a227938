"""The networks that scores are measured with, and their entries in the protocol."""

import hashlib
import inspect
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..imported import returned

# Beside a package that pip should install, because torchvision, which some need, fits one torch.
SAME_TORCH = f"torch=={torch.__version__.partition('+')[0]}"


class Network(NamedTuple):
    """A module that takes images, uint8 [N, 3, H, W] in RGB, its entry in the protocol, and the
    packages that it comes from.
    """

    module: nn.Module
    protocol: dict[str, Any]
    packages: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> "Network":
        """The network, moved to a device."""
        return self._replace(module=self.module.to(device))


def given(argument: str, network: str | nn.Module, example: str) -> Network:
    """The user's network: a module, or the one that MODULE:FUNCTION returns, in eval mode.

    The protocol has its name, and the SHA-256 of its weights and of the file with its class, which
    together determine what it computes.

    Errors: ValueError, TypeError or Failed if there is no such function, it fails, or the network
        is not a torch.nn.Module.
    """
    name = network
    if isinstance(network, str):
        network = returned(network, example)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{argument} is {name!r}, which is a {type(network).__name__}; it should be a"
            " torch.nn.Module or a function that returns one"
        )
    kind = type(network)
    return Network(
        network.eval(),
        {
            "network": name if isinstance(name, str) else f"{kind.__module__}:{kind.__qualname__}",
            "weights_sha256": sha256_of(network),
            "source_sha256": _sha256_of_source(kind),
        },
    )


def sha256_of(module: nn.Module) -> str:
    """The SHA-256 of a module's state_dict: names, dtypes, shapes and values, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        values = value.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


def _sha256_of_source(kind):
    """The SHA-256 of the source file of a class, or None if there is none."""
    try:
        path = inspect.getsourcefile(sys.modules[kind.__module__])
        return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (TypeError, OSError, KeyError):
        return None
