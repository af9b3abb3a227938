"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators that multiply matrices.

The formulas are registered when that module is imported elsewhere: importing it here would import
Triton, which takes a while.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def of_results(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *others: object,
    out_val: torch.Tensor,
    **settings: object,
) -> int:
    sizes = [weight.shape for weight in weights]
    if rows.is_cuda:
        return of_gathered(rows.shape, sizes, out_shape=out_val.shape)
    return each_row(len(rows), sizes)


def of_gathered(
    rows: torch.Size,
    weights: Sequence[torch.Size],
    *others: object,
    out_shape: torch.Size,
    **settings: object,
) -> int:
    return 2 * math.prod(out_shape) * math.prod(weights[0][1:])  # each window with each tap


def of_weights(
    gradients: Sequence[torch.Size],
    rows: torch.Size,
    weights: Sequence[torch.Size],
    *others: object,
    out_shape: Sequence[torch.Size],
    **settings: object,
) -> int:
    return each_row(rows[0], weights)


def of_rows(
    gradients: Sequence[torch.Size],
    weights: Sequence[torch.Size],
    *others: object,
    out_shape: torch.Size,
    **settings: object,
) -> int:
    return each_row(out_shape[0], weights)


def each_row(rows: int, weights: Sequence[torch.Size]) -> int:
    """The operations of multiplying each row with each tap of the weights."""
    return 2 * rows * sum(map(math.prod, weights))


def register(module: Any) -> None:
    register_formula = module.register_flop_formula
    # Shapes do not tell a CPU from a GPU.
    register_formula(torch.ops.spade_fast.convolve_windows, get_raw=True)(of_results)
    register_formula(torch.ops.spade_fast.convolve_windows_weights)(of_weights)
    register_formula(torch.ops.spade_fast.convolve_windows_rows)(of_rows)
    register_formula(torch.ops.spade_fast_triton.convolve_windows)(of_gathered)


class WhenImported(importlib.abc.MetaPathFinder):
    """Finds the counter's module once, as other finders would, and registers the formulas when it
    is loaded.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None  # it comes with torch
        loader: Any = spec.loader
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            register(module)

        loader.exec_module = exec_module
        return spec


def register_when_imported() -> None:
    """Registers the formulas as soon as the counter's module is imported. The operators must have
    been declared before.
    """
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, WhenImported())
