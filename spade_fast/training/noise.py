"""The random numbers of the steps: the same for any number of processes."""

import torch


class Noise:
    """Standard normal numbers, drawn on the CPU for the images of all processes, of which each
    process takes its own: so neither the device nor the number of processes decides them.
    """

    def __init__(self, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rank, self.processes = rank, processes

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """Numbers with the shape [N, length], dtype and device of `like`."""
        count, *rest = like.shape
        numbers = torch.randn(self.processes * count, *rest, generator=self.generator)
        own = numbers[self.rank * count : (self.rank + 1) * count]
        return own.to(like.device, like.dtype, non_blocking=True)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])
