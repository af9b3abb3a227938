"""What a run looks at and writes while it trains."""

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
from .run import BEST, EVENTS, GENERATOR, LOG, PICTURES, Run
from .step import Losses
from .trainer import Step, Trainer


class Stopped(Exception):
    """Why a run ended before its last step, in words for the user."""


class Recorder:
    """What a run looks at and writes while it trains."""

    def __init__(self, run: Run, trainer: Trainer, best: tuple[int, float] | None) -> None:
        self.run, self.trainer, self.best = run, trainer, best  # (step, distance) of the best one
        self.unseen: list[tuple[int, Losses]] = []  # of steps that nobody has looked at
        self.seen: list[dict[str, float]] = []  # losses since a line
        self.log: Log | None = None  # in other processes than the first

    def begin(self, stack: ExitStack, examples: Folder) -> None:
        """Checks the data, and only then begins to write in the folder, for as long as the stack
        is open.
        """
        run, trainer, config = self.run, self.trainer, self.trainer.config
        if config.check:
            check_examples(config, examples)
        self.painter = copy.deepcopy(trainer.average.module).eval()
        self.scenes = _scenes(trainer, examples)
        stack.enter_context(run.held())
        if trainer.number == 0:
            run.check_new()  # another process may have trained there until now
        run.begin(config)
        events = run.path(EVENTS) if config.tensorboard else None
        log = Log(run.path(LOG), events, trainer.number, trainer.steps, config.batch)
        self.log = stack.enter_context(log)
        if trainer.number > 0:
            self._restore()
            log.say(_words_of_resuming(trainer))

    def note(self, step: Step, looks: bool) -> None:
        """Takes the losses of a step. A GPU is waited for where somebody looks at them: every
        `log_every` steps. Raises Stopped where one is not finite.
        """
        trainer, config = self.trainer, self.trainer.config
        if self.log is not None:
            self.log.advance(step.number)
        self.unseen.append((step.number, step.losses))
        writes = step.number % config.log_every == 0 or step.number == config.steps
        if not (looks or writes or trainer.accelerator.device.type == "cpu"):
            return
        for number, unseen in self.unseen:
            losses = trainer.mean(unseen)
            wrong = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
            if wrong:
                words = ", ".join(f"{name} is {loss}" for name, loss in wrong.items())
                raise Stopped(f"{words} in step {number}; {self.last_good()}")
            self.seen.append(losses)
        self.unseen.clear()
        if writes and self.log is not None:
            names = dict.fromkeys(name for losses in self.seen for name in losses)
            self.log.losses(step.number, {name: _mean_of(name, self.seen) for name in names})
        if writes:
            self.seen.clear()

    def save(self, judges: bool) -> None:
        """Writes a checkpoint, the generator and pictures.

        judges: whether it may become the best. One that is written because somebody stopped the
            run may not: the best should not depend on that.

        Raises Stopped where they cannot be written.
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
        """Writes the generator and the best one as checkpoints have them, since a process may have
        been killed between a checkpoint and these.
        """
        settled(self.trainer.average, self.painter)
        self._write(GENERATOR)
        if self.best is not None and self.best[0] in self.run.numbers():
            average = copy.deepcopy(self.trainer.average)
            average.load_state_dict(self.run.load(self.best[0])["trainer"]["average"])
            settled(average, self.painter)
            self._write(BEST)

    def _look(self):
        """The average's images of the scenes, and how far they are from the photographs."""
        settled(self.trainer.average, self.painter)
        generated = self.scenes.generated(self.painter, self.trainer.networks.encoder)
        return self.scenes.distance(generated, self.trainer.networks.perceptual), generated

    def _write(self, name):
        """Writes the painter, which has been settled: at the published sizes that takes seconds."""
        with written(self.run.path(name)) as path:
            checkpoint.write(self.painter, path)

    def _picture(self, generated, distance):
        grid, number = self.scenes.grid(generated), self.trainer.number
        with written(self.run.path(PICTURES, f"step-{number:08}.png")) as path:
            Image.fromarray(grid).save(path)
        assert self.log is not None  # this process is the first
        self.log.picture(number, grid, distance)
        self.log.say(f"saved step {number}, {distance:.4g} from the photographs")

    def last_good(self) -> str:
        numbers = self.run.numbers()
        if not numbers:
            return "there is no checkpoint before it"
        return (
            f"the last good checkpoint is that of step {numbers[-1]}: `spade-fast train --resume"
            f" {self.run.folder}` goes on from there"
        )


def _words_of_resuming(trainer):
    if trainer.number < trainer.steps:
        return f"resumed at step {trainer.number}"
    return f"the run has taken all its {trainer.steps} steps already; a larger --steps continues it"


def _scenes(trainer, examples):
    """The scenes of the run's pictures, from all over the data set."""
    count = max(1, min(trainer.config.pictures, len(examples)))
    numbers = [number * len(examples) // count for number in range(count)]
    generator = trainer.networks.generator
    chosen = [examples[number] for number in numbers]
    return Scenes(chosen, generator.sizes, generator.kernel_size)


def reason_of(error: BaseException) -> str:
    """An error in one line, without the traceback that a DataLoader's worker puts before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]


def _check_finite(trainer):
    """Raises ValueError where a step with finite losses has left numbers that are not."""
    for name, network in trainer.networks.trained().items():
        for key, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key} of the {name} is not finite")


def _mean_of(name, found):
    values = [losses[name] for losses in found if name in losses]
    return sum(values) / len(values)
