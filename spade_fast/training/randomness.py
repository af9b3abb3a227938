"""The states of the global random number generators, which a checkpoint saves and restores."""

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict:
    """The states of Python, NumPy and torch in this process, in types that torch.load accepts with
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
    """Restores the generators' states; those of GPUs only if there are as many GPUs as before."""
    version, numbers, following = states["python"]
    random.setstate((version, tuple(numbers), following))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
