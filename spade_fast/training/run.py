"""The folder of a run: all that one needs to go on, each file whole or not there."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..writing import remove_unfinished, written
from .config import Config

SETTINGS, GENERATOR, BEST = "config.yaml", "generator.safetensors", "best.safetensors"
CHECKPOINTS, PICTURES, LOG, EVENTS = "checkpoints", "pictures", "log.txt", "tensorboard"


class Run:
    """A run's folder:

    - config.yaml: the settings;
    - checkpoints/step-N.pt: the newest ones, and the best, from which training goes on;
    - generator.safetensors: the generator's running average at the newest, for
      `checkpoint.load`; best.safetensors: at the best;
    - pictures/step-N.png: layouts, generated images and photographs; log.txt; tensorboard/.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def begin(self, config: Config) -> None:
        """Makes the folder and writes the settings.

        Errors: ValueError where there is a run in it already; OSError where it cannot be written.
        """
        if self.path(SETTINGS).exists():
            raise ValueError(
                f"{self.folder} has a run in it: `spade-fast train --resume {self.folder}` goes on"
                " with it, or out should be another folder"
            )
        for part in (CHECKPOINTS, PICTURES):
            self.path(part).mkdir(parents=True, exist_ok=True)
        with written(self.path(SETTINGS)) as path:
            config.save(path)

    def settings(self) -> Config:
        """The settings of the run in the folder. Errors: FileNotFoundError, ValueError."""
        if not self.path(SETTINGS).is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {SETTINGS}, it should be the folder of a run"
            )
        return Config.load(self.path(SETTINGS))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process trains in this folder; what a killed one left half-written is
        removed. Errors: ValueError where another does.
        """
        import fcntl

        with open(self.path(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"another process trains in {self.folder}") from None
            remove_unfinished(self.folder)
            yield

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def checkpoint(self, number: int) -> Path:
        return self.path(CHECKPOINTS, f"step-{number:08}.pt")

    def numbers(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        found = (re.fullmatch(r"step-(\d+)\.pt", path.name) for path in self.checkpoints())
        return sorted(int(match[1]) for match in found if match)

    def checkpoints(self) -> list[Path]:
        folder = self.path(CHECKPOINTS)
        return list(folder.iterdir()) if folder.is_dir() else []

    def save(self, number: int, state: dict) -> None:
        """Writes the checkpoint of a step. Errors: OSError, RuntimeError: the disk is full or the
        like; the checkpoints that are there stay.
        """
        with written(self.checkpoint(number)) as path:
            torch.save(state, path)

    def load(self, number: int) -> dict:
        """The checkpoint of a step, on the CPU."""
        return torch.load(self.checkpoint(number), map_location="cpu", weights_only=True)

    def keep(self, newest: int, best: int | None) -> None:
        """Removes the checkpoints that are neither among the newest nor the best."""
        for number in self.numbers()[:-newest]:
            if number != best:
                self.checkpoint(number).unlink()
