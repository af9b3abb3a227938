"""The folder of a run, with everything needed to resume it. Each file is written whole or not at
all.
"""

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
PARTS = {"trainer", "best", "settings"}  # the keys of a checkpoint


class Run:
    """A run's folder:

    - config.yaml: the settings;
    - checkpoints/step-N.pt: the newest checkpoints, and the best one;
    - generator.safetensors: the generator's running average at the newest checkpoint, for
      `checkpoint.load`; best.safetensors: that at the best one;
    - pictures/step-N.png: layouts, generated images and photographs; log.txt; tensorboard/.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def check_new(self) -> None:
        """Raises ValueError if the folder contains a run. Settings alone do not count: a run that
        ended before its first checkpoint has nothing to lose.
        """
        if self.numbers() or self.path(GENERATOR).exists():
            raise ValueError(
                f"{self.folder} has a run in it: `spade-fast train --resume {self.folder}`"
                " continues it, or out should be another folder"
            )

    def begin(self, config: Config) -> None:
        """Writes the settings, makes the folders of checkpoints and pictures. Errors: OSError."""
        with written(self.path(SETTINGS)) as path:
            config.save(path)
        for part in (CHECKPOINTS, PICTURES):
            self.path(part).mkdir(exist_ok=True)

    def settings(self) -> Config:
        """The settings of the run in the folder. Errors: FileNotFoundError, ValueError."""
        if not self.path(SETTINGS).is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {SETTINGS}; it should be the folder of a run"
            )
        return Config.load(self.path(SETTINGS))

    def weights(self) -> Path:
        """The path of the generator's weights. Errors: FileNotFoundError, ValueError."""
        if not self.path(GENERATOR).is_file():
            self.settings()  # which refuses a folder that is not a run's
            raise FileNotFoundError(f"{self.folder} has no {GENERATOR} yet: training writes it")
        return self.path(GENERATOR)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder and locks it: inside, no other process trains there. Files that a killed
        process left half-written are removed. Errors: ValueError if another process trains there,
        or the folder cannot be written to.
        """
        import fcntl

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.path(".lock"), "w")
        except OSError as error:
            raise ValueError(
                f"out is {self.folder}; it should be a folder that can be written to:"
                f" {error.strerror}"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"another process is training in {self.folder}") from None
            # The workers of a killed process live on for 5 s, and would hold the lock.
            os.register_at_fork(after_in_child=lock.close)
            for part in ("", CHECKPOINTS, PICTURES):  # other folders are the user's
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
        """Writes the checkpoint of a step, with the keys PARTS. Errors: OSError, for example if the
        disk is full; earlier checkpoints are left as they are.
        """
        with written(self.checkpoint(number)) as path, open(path, "wb") as file:
            torch.save(state, file)

    def load(self, number: int) -> dict:
        """The checkpoint of a step, on the CPU. Errors: ValueError if it is damaged; the message
        names the file, and the step from which the run continues without it.
        """
        path, older = self.checkpoint(number), [one for one in self.numbers() if one < number]
        try:
            state = contents(path)
            if not isinstance(state, dict) or not PARTS <= set(state):
                raise UnreadableFile(f"{path} is not a checkpoint of a run")
        except UnreadableFile as error:
            rest = f"step {older[-1]}" if older else "the first step"
            raise ValueError(f"{error}; without this file the run continues from {rest}") from None
        return state

    def keep(self, newest: int, best: int | None) -> None:
        """Removes all checkpoints but the newest ones and the best.

        newest: how many to keep.
        best: the best one's step, or None.
        """
        for number in self.numbers()[:-newest]:
            if number != best:
                self.checkpoint(number).unlink()
