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
    rows: torch.Size, weight: torch.Size, *others: object, out_shape: torch.Size, **settings: object
) -> int:
    return 2 * rows[0] * math.prod(weight)  # each row with each tap


def of_weight(
    gradient: torch.Size,
    rows: torch.Size,
    weight: torch.Size,
    *others: object,
    out_shape: torch.Size,
    **settings: object,
) -> int:
    return 2 * rows[0] * math.prod(weight)


def of_rows(
    gradient: torch.Size,
    weight: torch.Size,
    *others: object,
    out_shape: torch.Size,
    **settings: object,
) -> int:
    return 2 * out_shape[0] * math.prod(weight)


def of_results_in_triton(
    rows: torch.Size, weight: torch.Size, *others: object, out_shape: torch.Size, **settings: object
) -> int:
    return 2 * out_shape[0] * math.prod(weight)  # each window with each tap


def of_gathered(
    rows: torch.Size,
    weights: Sequence[torch.Size],
    *others: object,
    out_shape: torch.Size,
    **settings: object,
) -> int:
    return 2 * math.prod(out_shape) * math.prod(weights[0][1:])


def register(module: Any) -> None:
    for operator, formula in {
        torch.ops.spade_fast.convolve_windows: of_results,
        torch.ops.spade_fast.convolve_windows_weight: of_weight,
        torch.ops.spade_fast.convolve_windows_rows: of_rows,
        torch.ops.spade_fast.convolve_gathered: of_gathered,
        torch.ops.spade_fast_triton.convolve_windows: of_results_in_triton,
    }.items():
        module.register_flop_formula(operator)(formula)


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
