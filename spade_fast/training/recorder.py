"""The checks, checkpoints, pictures and log of a run while it trains."""

import copy
import math
from contextlib import ExitStack

from PIL import Image

from .. import checkpoint
from ..data import Folder
from ..writing import written
from .average import settled
from .examples import check_examples
from .log import Log
from .pictures import Scenes
from .run import BEST, EVENTS, GENERATOR, LOG, PICTURES, SETTINGS, Run
from .step import Losses
from .trainer import Step, Trainer

# A run's steps beside those of the running average. At 0.4 all images were grey, with a standard
# deviation of 1.4 of 255.
SHORT = 2


class Stopped(Exception):
    """Raised when a run ends before its last step; the message tells the user why."""


class Recorder:
    """Checks the losses of a run, and writes its checkpoints, pictures and log.

    run, trainer: the folder, and the trainer that takes the steps.
    best: the step and the distance of the best checkpoint so far, or None.
    """

    def __init__(self, run: Run, trainer: Trainer, best: tuple[int, float] | None) -> None:
        self.run, self.trainer, self.best = run, trainer, best
        self.unread: list[tuple[int, Losses]] = []  # losses by step, still on the device
        self.read: list[dict[str, float]] = []  # losses since the last line of the log
        self.log: Log | None = None  # stays None in all processes but the first

    def begin(self, stack: ExitStack, examples: Folder) -> None:
        """Checks the data, and only then begins to write in the folder. The folder stays locked and
        the log open until the stack closes.
        """
        run, trainer, config = self.run, self.trainer, self.trainer.config
        if config.check:
            check_examples(config, examples)
        self.painter = copy.deepcopy(trainer.average.module).eval()
        self.scenes = _scenes(trainer, examples)
        stack.enter_context(run.held())
        if trainer.number == 0:
            run.check_new()  # again, now that no other process can train there
        begins_again = trainer.number == 0 and run.path(SETTINGS).exists()
        run.begin(config)
        events = run.path(EVENTS) if config.tensorboard else None
        log = Log(run.path(LOG), events, trainer.number, trainer.steps, config.batch)
        self.log = stack.enter_context(log)
        if trainer.number > 0:
            self._restore()
            log.say(_words_of_resuming(trainer))
        if begins_again:
            log.say("there is no checkpoint in the folder: the run starts from the first step")
        if trainer.number == 0 and trainer.steps * (1 - config.ema) < SHORT:
            log.say(
                f"note: the saved generator is the running average of the last"
                f" {1 / (1 - config.ema):,.0f} steps or so; in a run of {trainer.steps:,} steps its"
                " images may stay grey; --ema 0.9 suits a short run"
            )

    def note(self, step: Step, looks: bool) -> None:
        """Takes the losses of a step. On a GPU they are read only if `looks` is true, and every
        `log_every` steps, because that waits for the GPU. Raises Stopped if one is not finite.
        """
        trainer, config = self.trainer, self.trainer.config
        if self.log is not None:
            self.log.advance(step.number)
        self.unread.append((step.number, step.losses))
        writes = step.number % config.log_every == 0 or step.number == config.steps
        if not (looks or writes or trainer.accelerator.device.type == "cpu"):
            return
        for number, unread in self.unread:
            losses = trainer.mean(unread)
            wrong = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
            if wrong:
                words = ", ".join(f"{name} is {loss}" for name, loss in wrong.items())
                raise Stopped(f"{words} in step {number}; {self.last_good()}")
            self.read.append(losses)
        self.unread.clear()
        if writes and self.log is not None:
            names = dict.fromkeys(name for losses in self.read for name in losses)
            self.log.losses(step.number, {name: _mean_of(name, self.read) for name in names})
        if writes:
            self.read.clear()

    def save(self, judges: bool) -> None:
        """Writes a checkpoint, the generator and a picture.

        judges: whether this checkpoint may become the best. One that is written because the run was
            stopped may not: the best should not depend on when a run is stopped.

        Raises Stopped if they cannot be written.
        """
        trainer, run, failure = self.trainer, self.run, None
        state = trainer.state_dict()
        if self.log is not None:
            try:
                _check_finite(trainer)
                distance, generated = self._look()
                is_best = judges and (self.best is None or distance < self.best[1])
                if is_best:
                    self.best = (trainer.number, distance)
                settings = trainer.config.deciding()
                state = {"trainer": state, "best": self.best, "settings": settings}
                run.save(trainer.number, state)
                run.keep(trainer.config.keep, self.best and self.best[0])
                self._write(GENERATOR)
                if is_best:
                    self._write(BEST)
                self._picture(generated, distance)
            except (OSError, ValueError) as error:
                failure = reason_of(error)
        failure = trainer.gathered(failure)[0]
        if failure is not None:
            raise Stopped(f"in saving step {trainer.number}: {failure}; {self.last_good()}")

    def _restore(self):
        """Writes the generator and the best one from their checkpoints, because a process may have
        been killed after it wrote a checkpoint and before it wrote these.
        """
        settled(self.trainer.average, self.painter)
        self._write(GENERATOR)
        if self.best is not None and self.best[0] in self.run.numbers():
            average = copy.deepcopy(self.trainer.average)
            average.load_state_dict(self.run.load(self.best[0])["trainer"]["average"])
            settled(average, self.painter)
            self._write(BEST)

    def _look(self):
        """The average's images of the scenes, and their distance from the photographs."""
        settled(self.trainer.average, self.painter)
        generated = self.scenes.generated(self.painter, self.trainer.networks.encoder)
        return self.scenes.distance(generated, self.trainer.networks.perceptual), generated

    def _write(self, name):
        """Writes the painter, which the caller has settled: at the published sizes that takes
        seconds, and is done once for several files.
        """
        with written(self.run.path(name)) as path:
            checkpoint.write(self.painter, path)

    def _picture(self, generated, distance):
        grid, number = self.scenes.grid(generated), self.trainer.number
        with written(self.run.path(PICTURES, f"step-{number:08}.png")) as path:
            Image.fromarray(grid).save(path)
        assert self.log is not None  # this process is the first
        self.log.picture(number, grid, distance)
        self.log.say(f"saved step {number}, distance from the photographs {distance:.4g}")

    def last_good(self) -> str:
        numbers = self.run.numbers()
        if not numbers:
            return "there is no earlier checkpoint"
        return (
            f"the last good checkpoint is that of step {numbers[-1]}: `spade-fast train --resume"
            f" {self.run.folder}` continues from there"
        )


def _words_of_resuming(trainer):
    if trainer.number < trainer.steps:
        return f"resumed at step {trainer.number}"
    return f"the run has taken all its {trainer.steps} steps already; a larger --steps continues it"


def _scenes(trainer, examples):
    """The scenes of the run's pictures, evenly spread over the data set."""
    count = max(1, min(trainer.config.pictures, len(examples)))
    numbers = [number * len(examples) // count for number in range(count)]
    generator = trainer.networks.generator
    chosen = [examples[number] for number in numbers]
    return Scenes(chosen, generator.sizes, generator.kernel_size)


def reason_of(error: BaseException) -> str:
    """An error in one line, without the traceback that a DataLoader's worker adds before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]


def _check_finite(trainer):
    """Raises ValueError if weights or buffers are not finite, though the losses were."""
    for name, network in trainer.networks.trained().items():
        for key, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key} of the {name} is not finite")


def _mean_of(name, found):
    values = [losses[name] for losses in found if name in losses]
    return sum(values) / len(values)
