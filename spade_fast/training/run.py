"""The folder of a run: all that one needs to go on, each file whole or not there."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoint.files import UnreadableFile, contents
from ..settings import Config
from ..writing import remove_unfinished, written

SETTINGS, GENERATOR, BEST = "config.yaml", "generator.safetensors", "best.safetensors"
CHECKPOINTS, PICTURES, LOG, EVENTS = "checkpoints", "pictures", "log.txt", "tensorboard"
PARTS = {"trainer", "best", "settings"}  # of a checkpoint


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

    def check_new(self) -> None:
        """Raises ValueError where there is a run in the folder. Settings alone are none: a run that
        ended before its first checkpoint has left nothing to lose.
        """
        if self.numbers() or self.path(GENERATOR).exists():
            raise ValueError(
                f"{self.folder} has a run in it: `spade-fast train --resume {self.folder}` goes on"
                " with it, or out should be another folder"
            )

    def begin(self, config: Config) -> None:
        """Writes the settings, and makes the folders of what follows. Errors: OSError."""
        with written(self.path(SETTINGS)) as path:
            config.save(path)
        for part in (CHECKPOINTS, PICTURES):
            self.path(part).mkdir(exist_ok=True)

    def settings(self) -> Config:
        """The settings of the run in the folder. Errors: FileNotFoundError, ValueError."""
        if not self.path(SETTINGS).is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {SETTINGS}, it should be the folder of a run"
            )
        return Config.load(self.path(SETTINGS))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process trains in this folder, which is made; what a killed one left
        half-written is removed. Errors: ValueError where another does, or it cannot be written.
        """
        import fcntl

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.path(".lock"), "w")
        except OSError as error:
            raise ValueError(
                f"out is {self.folder}, which is no folder that can be written to: {error.strerror}"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"another process trains in {self.folder}") from None
            for part in ("", CHECKPOINTS, PICTURES):  # not below other folders: they are no run's
                remove_unfinished(self.path(part))
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
        """Writes the checkpoint of a step, PARTS. Errors: OSError: the disk is full or the like;
        the checkpoints that are there stay.
        """
        with written(self.checkpoint(number)) as path, open(path, "wb") as file:
            torch.save(state, file)

    def load(self, number: int) -> dict:
        """The checkpoint of a step, on the CPU. Errors: ValueError where it is damaged: which file,
        and which one is older.
        """
        path, older = self.checkpoint(number), [one for one in self.numbers() if one < number]
        try:
            state = contents(path)
            if not isinstance(state, dict) or not PARTS <= set(state):
                raise UnreadableFile(f"{path} is no checkpoint of a run")
        except UnreadableFile as error:
            rest = f"step {older[-1]}" if older else "the first step"
            raise ValueError(f"{error}; without this file the run goes on from {rest}") from None
        return state

    def keep(self, newest: int, best: int | None) -> None:
        """Removes the checkpoints that are neither among the newest nor the best."""
        for number in self.numbers()[:-newest]:
            if number != best:
                self.checkpoint(number).unlink()
