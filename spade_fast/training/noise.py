"""The random numbers of steps, which are the same for any number of processes."""

import torch


class Noise:
    """Standard normal numbers. Each process draws those for the images of all processes on the CPU,
    and takes its own, so that they depend neither on the device nor on the number of processes.
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
