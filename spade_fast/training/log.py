"""The reports of a run: a progress bar, lines in a file, TensorBoard's events."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..optional import needed


class Log:
    """Reports a run's losses and pictures.

    Args:
        path: the file that lines are appended to.
        events: the folder of TensorBoard's events, or None for none.
        done, steps: how many steps the run has taken, and will have in the end.
        images: how many images a step has.

    Raises:
        ModuleNotFoundError: events is given and TensorBoard is not installed.
        ValueError: the name of events is not UTF-8, which TensorBoard needs.
    """

    def __init__(self, path: Path, events: Path | None, done: int, steps: int, images: int) -> None:
        self.steps, self.images = steps, images
        self.events = None if events is None else _writer(events, done)
        self.file = open(path, "a", buffering=1)
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=done, losses="")
        self._since, self._from = time.monotonic(), done

    def __enter__(self) -> "Log":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        for part in (self.file, self.events):
            if part is not None:
                with contextlib.suppress(OSError):  # of a full disk, which has already been raised
                    part.close()

    def advance(self, number: int) -> None:
        """Moves the progress bar to a step."""
        self.progress.update(self.task, completed=number)

    def losses(self, number: int, losses: Mapping[str, float]) -> None:
        """Writes a line: the losses, images per second since the last line, and the time left."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9) / max(number - self._from, 1)  # per step
        self._since, self._from = now, number
        speed, left = self.images / seconds, (self.steps - number) * seconds
        words = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        words += f"  {speed:.3g} images/s  {_hours(left)} left"
        self.progress.update(self.task, completed=number, losses=words)
        self._line(f"step {number}/{self.steps}  {words}", shown=self.progress.disable)
        if self.events is not None:
            for name, value in losses.items():
                self.events.add_scalar(f"losses/{name}", value, number)
            self.events.add_scalar("images per second", speed, number)

    def say(self, words: str) -> None:
        """Writes a line with the time."""
        self._line(words, shown=True)

    def picture(self, number: int, grid: np.ndarray, distance: float) -> None:
        """Records a step's picture [H, W, 3], and its images' distance from the photographs."""
        if self.events is not None:
            self.events.add_image("scenes", grid, number, dataformats="HWC")
            self.events.add_scalar("distance", distance, number)

    def _line(self, words, shown):
        self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {words}\n")
        if shown:
            self.console.print(words, highlight=False, markup=False, soft_wrap=True)


def _hours(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _writer(folder, done):
    purpose = "writing TensorBoard's events, which --no-tensorboard leaves out,"
    needed("tensorboard", purpose, "'spade_fast[train]'")
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder), purge_step=done + 1)
    except UnicodeEncodeError:
        raise ValueError(
            f"out is {folder.parent}, whose name is not UTF-8; it should be for TensorBoard's"
            " events, which --no-tensorboard leaves out"
        ) from None
