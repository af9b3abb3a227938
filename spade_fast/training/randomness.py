"""The states of the global random number generators, for a run that goes on where it stopped."""

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict:
    """Those of Python, NumPy and torch in this process, as torch.load reads them with
    weights_only.
    """
    version, numbers, following = random.getstate()
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    return {
        "python": (version, list(numbers), following),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict) -> None:
    """Makes the generators go on from there; those of GPUs where there are as many."""
    version, numbers, following = states["python"]
    random.setstate((version, tuple(numbers), following))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
