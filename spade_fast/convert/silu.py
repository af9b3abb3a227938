"""SiLU after a modulation, where other people's code applies it: it keeps nothing for backward."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..ops.modulate import Modulate, modulated_again


class BeforeSiLU(torch.Tensor):
    """y of a modulation by tables. SiLU keeps its argument for backward; of this one it keeps where
    the modulation has what y is computed from, and backward computes y again. Every operation is
    that of an ordinary tensor, and so is its result.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not all(issubclass(cls, kind) for kind in types):
            return NotImplemented  # another class of tensors decides
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.__reduce_ex__:
                return args[0].as_subclass(torch.Tensor).__reduce_ex__(*args[1:])
            if func is F.silu and not kwargs.get("inplace") and not args[0]._version:
                return _silu(args[0])
            return func(*args, **kwargs)


def before_silu(y: torch.Tensor) -> torch.Tensor:
    """y, as a BeforeSiLU if a modulation by tables has just computed it for a backward."""
    node = y.grad_fn
    if not isinstance(node, Modulate._backward_cls) or not getattr(node, "by_tables", False):
        return y
    return y.as_subclass(BeforeSiLU)


def _silu(y):
    node = y.grad_fn.next_functions[0][0]  # y is an alias of what the modulation returned
    memory = y.data_ptr(), y.shape, y.dtype

    def pack(kept):
        return node if (kept.data_ptr(), kept.shape, kept.dtype) == memory else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return F.silu(y)


def _unpack(kept):
    return kept if isinstance(kept, torch.Tensor) else modulated_again(kept)
