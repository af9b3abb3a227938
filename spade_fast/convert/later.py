"""A tensor that is computed when something reads it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class Later(torch.Tensor):
    """What `make` returns when an operation first reads this tensor, with what autograd and
    autocast are now. Until then it takes no memory. Operations, attributes, copies and pickles are
    those of the tensor that was made; only its class shows that it is made later.
    """

    _make: Callable[[], torch.Tensor] | None
    _made: torch.Tensor

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], torch.Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Later":
        later = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        kind = device.type
        records, casts = torch.is_grad_enabled(), torch.is_autocast_enabled(kind)
        to = torch.get_autocast_dtype(kind)

        def make_as_now():
            with torch.set_grad_enabled(records), torch.autocast(kind, to, casts):
                return make()

        later._make = make_as_now
        return later

    def read(self) -> torch.Tensor:
        """The tensor, made now if nothing has read it before."""
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Later, lambda own: own.read(), (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__: Any = __torch_function__
