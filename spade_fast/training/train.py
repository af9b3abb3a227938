"""`spade-fast train`: from folders of label maps and photographs to a generator."""

import contextlib
import copy
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .. import checkpoint
from ..data import CONVENTIONS, Folder, Preparation, find_pairs, loader, read_palette
from ..writing import written
from .average import settled
from .config import Config, may_change
from .log import Log
from .networks import label_channels
from .pictures import Scenes
from .run import BEST, EVENTS, GENERATOR, LOG, PICTURES, Run
from .trainer import Step, Trainer


class Stopped(Exception):
    """Why a run ended before its last step, in words for the user."""


def train(config: Config) -> Path:
    """Trains from the first step on, in a new folder, `config.out`. Returns the path of the
    generator's weights.

    Raises:
        ValueError, TypeError, OSError: the settings, the data or the folder are not as they should
            be; nothing has been trained then.
        ModuleNotFoundError: Accelerate or TensorBoard is not installed.
        Stopped: a signal, a loss that is not finite or a full disk ended the run; the message says
            which checkpoint it goes on from.
    """
    if config.out is None:
        raise ValueError("out is not given, it should be the folder of the run")
    config = with_convention(config)
    examples = folder_of(config)
    config = with_steps(config, len(examples))
    run = Run(config.out)
    trainer = Trainer(config)
    trainer.seed()
    if trainer.accelerator.is_main_process:
        run.begin(config)
    trainer.accelerator.wait_for_everyone()
    return _train(run, trainer, examples)


def resume(folder: str | os.PathLike, **settings) -> Path:
    """Goes on with the run in a folder from its newest checkpoint, as if it had not stopped.

    settings: those that are to differ from the run's; some decide what was computed, and may not.

    Raises: as `train`.
    """
    run = Run(folder)
    before = run.settings()
    config = before.changed(**settings, out=str(folder))
    refused = [name for name in before.differences(config) if not may_change(name)]
    if refused:
        raise ValueError(
            "the run was begun with other settings: "
            + "; ".join(
                f"{name} was {getattr(before, name)!r}, not {getattr(config, name)!r}"
                for name in refused
            )
        )
    if not run.numbers():
        raise ValueError(f"{run.folder} has no checkpoint to go on from: remove it, and train anew")
    examples = folder_of(config)
    trainer = Trainer(with_steps(config, len(examples)))
    return _train(run, trainer, examples, run.load(run.numbers()[-1]))


def with_convention(config: Config) -> Config:
    """The settings with what the data set's convention says of classes, where they do not."""
    convention = CONVENTIONS[config.convention]
    found = {}
    for name in ("num_classes", "dont_care"):
        if getattr(config, name) is None:
            found[name] = getattr(convention, name)
    if convention.beside_labels and config.instances is None:
        found["instances"] = config.labels
    return config.changed(**found)


def with_steps(config: Config, examples: int) -> Config:
    """The settings with the steps that their epochs are."""
    if config.epochs is None:
        return config
    return config.changed(steps=config.epochs * max(1, examples // config.batch), epochs=None)


def folder_of(config: Config) -> Folder:
    """The data set that the settings name. Errors: ValueError, OSError."""
    for name in ("labels", "images"):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is not given, it should be a folder")
    label_channels(config)
    preparation = Preparation(
        config.num_classes,
        config.dont_care,
        mode=config.preprocess,
        load_size=config.load_size,
        crop_size=config.crop_size,
        aspect_ratio=config.aspect_ratio,
        flip=config.flip,
        label_shift=CONVENTIONS[config.convention].label_shift,
    )
    pairs = find_pairs(config.labels, config.images, config.instances, config.convention)
    palette = None if config.palette is None else read_palette(config.palette)
    return Folder(pairs, preparation, palette=palette, seed=config.seed)


def _train(run, trainer, examples, state=None):
    config, accelerator = trainer.config, trainer.accelerator
    with contextlib.ExitStack() as stack:
        speaks = accelerator.is_main_process
        if speaks:
            stack.enter_context(run.held())
        best = None
        if state is not None:
            trainer.load_state_dict(state["trainer"])
            best = state["best"]
        events = run.path(EVENTS) if config.tensorboard else None
        log = Log(run.path(LOG), events, trainer.number, config.steps, config.batch, speaks)
        recorder = _Recorder(run, trainer, examples, stack.enter_context(log), best)
        if state is not None:
            log.say(f"resumed at step {trainer.number}")
        asked = stack.enter_context(_asked_to_stop())
        for step in trainer.fit(_batches(trainer, examples)):
            last = step.number == config.steps
            saves = last or step.number % config.save_every == 0
            recorder.note(step, saves)
            stops = not last and _anywhere(accelerator, bool(asked))
            if saves or stops:
                recorder.save(judges=saves)
            if stops:
                raise Stopped(
                    f"stopped after step {step.number}: `spade-fast train --resume {run.folder}`"
                    " goes on"
                )
        recorder.publish()
    return run.path(GENERATOR)


def _batches(trainer, examples):
    """The batches from the trainer's next step on, numbered for its networks."""
    config, accelerator = trainer.config, trainer.accelerator
    generator = trainer.networks.generator
    return loader(
        examples,
        trainer.images,
        sizes=generator.sizes,
        kernel_size=generator.kernel_size,
        scales=config.scales,
        workers=config.workers,
        seed=config.seed,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        start=trainer.number * config.accumulate,
    )


class _Recorder:
    """What a run looks at and writes while it trains."""

    def __init__(self, run, trainer, examples, log, best):
        self.run, self.trainer, self.log = run, trainer, log
        self.best = best  # (a step, its distance) with the least distance, or None
        self.unseen, self.seen = [], []  # steps that nobody has looked at; losses since a line
        self.speaks = trainer.accelerator.is_main_process
        if self.speaks:
            self.painter = copy.deepcopy(trainer.average.module).eval()
            self.scenes = _scenes(trainer, examples)

    def note(self, step: Step, looks: bool) -> None:
        """Takes the losses of a step. A GPU is waited for where somebody looks at them: every
        `log_every` steps. Raises Stopped where one is not finite.
        """
        trainer, config = self.trainer, self.trainer.config
        self.log.advance(step.number)
        self.unseen.append((step.number, step.losses))
        writes = step.number % config.log_every == 0 or step.number == config.steps
        if not (looks or writes or trainer.accelerator.device.type == "cpu"):
            return
        for number, losses in self.unseen:
            losses = trainer.mean(losses)
            wrong = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
            if wrong:
                words = ", ".join(f"{name} is {loss}" for name, loss in wrong.items())
                raise Stopped(f"{words} in step {number}; {self._last_good()}")
            self.seen.append(losses)
        self.unseen.clear()
        if writes:
            names = dict.fromkeys(name for losses in self.seen for name in losses)
            self.log.losses(step.number, {name: _mean_of(name, self.seen) for name in names})
            self.seen.clear()

    def save(self, judges: bool) -> None:
        """Writes a checkpoint, the generator and pictures.

        judges: whether it may become the best. One that is written because somebody stopped the
            run may not: the best should not depend on that.

        Raises Stopped where they cannot be written.
        """
        trainer, run, failure = self.trainer, self.run, None
        state = trainer.state_dict()
        if self.speaks:
            try:
                distance, generated = self._look()
                is_best = judges and (self.best is None or distance < self.best[1])
                if is_best:
                    self.best = (trainer.number, distance)
                run.save(trainer.number, {"trainer": state, "best": self.best})
                run.keep(trainer.config.keep, self.best and self.best[0])
                self._write(GENERATOR)
                if is_best:
                    self._write(BEST)
                self._picture(generated, distance)
            except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
                failure = str(error) or type(error).__name__
        failures = [one for one in trainer.gathered(failure) if one is not None]
        if failures:
            raise Stopped(
                f"step {trainer.number} could not be saved: {failures[0]}; {self._last_good()}"
            )

    def publish(self) -> None:
        """Writes the generator of a run that has ended, where a killed process did not."""
        if self.speaks:
            settled(self.trainer.average, self.painter)
            self._write(GENERATOR)

    def _look(self):
        """The average's images of the scenes, and how far they are from the photographs."""
        settled(self.trainer.average, self.painter)
        generated = self.scenes.generated(self.painter, self.trainer.networks.encoder)
        return self.scenes.distance(generated, self.trainer.networks.perceptual), generated

    def _write(self, name):
        with written(self.run.path(name)) as path:
            checkpoint.write(self.painter, path)

    def _picture(self, generated, distance):
        grid, number = self.scenes.grid(generated), self.trainer.number
        with written(self.run.path(PICTURES, f"step-{number:08}.png")) as path:
            Image.fromarray(grid).save(path)
        self.log.picture(number, grid, distance)
        self.log.say(f"saved step {number}, {distance:.4g} from the photographs")

    def _last_good(self):
        numbers = self.run.numbers()
        if not numbers:
            return "there is no checkpoint before it"
        return (
            f"the last good checkpoint is that of step {numbers[-1]}: `spade-fast train --resume"
            f" {self.run.folder}` goes on from there"
        )


def _scenes(trainer, examples):
    """The scenes of the run's pictures, from all over the data set."""
    count = max(1, min(trainer.config.pictures, len(examples)))
    numbers = [number * len(examples) // count for number in range(count)]
    generator = trainer.networks.generator
    chosen = [examples[number] for number in numbers]
    return Scenes(chosen, generator.sizes, generator.kernel_size)


def _mean_of(name, found):
    values = [losses[name] for losses in found if name in losses]
    return sum(values) / len(values)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM end nothing, but are added to the list; a second one ends the
    process as always. In other threads than the main one signals are left alone.
    """
    asked, before = [], {}

    def note(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _anywhere(accelerator, asked):
    """Whether one of the processes was asked to stop: all of them know of it in the same step."""
    if accelerator.num_processes == 1:
        return asked
    if asked:
        accelerator.set_trigger()
    return accelerator.check_trigger()
