"""`spade-fast train`: from folders of label maps and photographs to a generator."""

import contextlib
import copy
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from .. import checkpoint
from ..data import (
    CONVENTIONS,
    Folder,
    Preparation,
    check_data,
    find_pairs,
    loader,
    read_palette,
)
from ..progress import progress_bar
from .average import settled
from .config import Config
from .log import Log
from .networks import label_channels
from .pictures import Scenes
from .run import BEST, EVENTS, GENERATOR, LOG, PICTURES, Run
from .trainer import Step, Trainer

PATIENCE = 2.0  # seconds


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
    run = Run(config.out)
    run.check_new()
    config = with_convention(config)
    examples = folder_of(config)
    return _train(run, with_steps(config, len(examples)), examples)


def resume(folder: str | os.PathLike, **settings) -> Path:
    """Goes on with the run in a folder from its newest checkpoint, as if it had not stopped; from
    the first step where it has none yet.

    settings: those that are to differ from the run's, and do from now on; some decide what was
        computed, and may not.

    Raises: as `train`.
    """
    run = Run(folder)
    before = run.settings()
    if settings.setdefault("out", str(folder)) != str(folder):
        raise ValueError(
            f"out is {settings['out']!r} and resume {str(folder)!r}, only one of them should be given"
        )
    if settings.get("epochs") is not None:
        settings = {"steps": None} | settings  # the run has its epochs as steps
    config, state = before.changed(**settings), None
    if run.numbers():
        state = run.load(run.numbers()[-1])
    else:
        run.check_new()
    began = before.deciding() if state is None else state["settings"]
    refused = {name: value for name, value in began.items() if getattr(config, name) != value}
    if refused:
        raise ValueError(
            "the run was begun with other settings: "
            + "; ".join(
                f"{name} was {value!r}, not {getattr(config, name)!r}"
                for name, value in refused.items()
            )
        )
    examples = folder_of(config)
    config = with_steps(config, len(examples))
    done = 0 if state is None else state["trainer"]["number"]
    if config.steps is not None and config.steps < done:
        raise ValueError(f"steps is {config.steps}, the run has taken {done} already")
    return _train(run, config, examples, state)


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


def check_examples(config: Config, examples: Folder) -> None:
    """Raises ValueError where there is a file that cannot be trained on: which one, and why."""
    report = check_data(
        config.labels,
        config.images,
        config.instances,
        convention=config.convention,
        palette=examples.palette,
        num_classes=config.num_classes,
        dont_care=config.dont_care,
        progress=progress_bar,
    )
    if report.faults:
        raise ValueError(
            f"{len(report.faults)} faults in the data, first: {report.faults[0]}; `spade-fast"
            " check-data` lists them all, and --no-check trains all the same"
        )
    wanted = round(config.crop_size / config.aspect_ratio), config.crop_size
    for size, path in report.sizes.items():
        try:
            found = examples.preparation.size_of(*size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if found != wanted:
            heights = [f"{width} × {height}" for height, width in (found, wanted)]
            raise ValueError(
                f"preprocess is {config.preprocess!r}, which makes {path} {heights[0]}: the"
                f" generator makes {heights[1]}, as crop_size and aspect_ratio say"
            )


def _train(run, config, examples, state=None):
    trainer = Trainer(config)
    trainer.seed()
    if state is not None:
        trainer.load_state_dict(state["trainer"])
    batches = _batches(trainer, examples)
    with contextlib.ExitStack() as stack:
        recorder = _Recorder(run, trainer, None if state is None else state["best"])
        _in_first(trainer, lambda: recorder.begin(stack, examples))
        asked = stack.enter_context(_asked_to_stop())
        try:
            _take_steps(trainer, batches, recorder, asked)
        except (ValueError, TypeError, OSError, torch.OutOfMemoryError) as error:
            raise Stopped(f"{_reason(error)}; {recorder.last_good()}") from error
    return run.path(GENERATOR)


def _take_steps(trainer, batches, recorder, asked):
    config = trainer.config
    for step in trainer.fit(batches):
        last = step.number == config.steps
        saves = last or step.number % config.save_every == 0
        recorder.note(step, saves)
        stops = not last and _anywhere(trainer.accelerator, bool(asked))
        if saves or stops:
            recorder.save(judges=saves)
        if stops:
            raise Stopped(
                f"stopped after step {step.number}: `spade-fast train --resume"
                f" {recorder.run.folder}` goes on"
            )


def _in_first(trainer, work):
    """Does work in the first process alone. An error of it is raised in all of them: else the
    others would wait for it for ever.
    """
    error = None
    if trainer.accelerator.is_main_process:
        try:
            work()
        except Exception as found:
            error = found
    error = trainer.gathered(error)[0]
    if error is not None:
        raise error


def _reason(error):
    """An error in one line, without the traceback that a DataLoader's worker puts before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]


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

    def __init__(self, run, trainer, best):
        self.run, self.trainer, self.best = run, trainer, best  # (step, distance) of the best one
        self.unseen, self.seen = [], []  # steps that nobody has looked at; losses since a line
        self.log = None  # in other processes than the first

    def begin(self, stack, examples):
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
        log = Log(run.path(LOG), events, trainer.number, config.steps, config.batch)
        self.log = stack.enter_context(log)
        if trainer.number > 0:
            self._restore()
            log.say(f"resumed at step {trainer.number}")

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
        for number, losses in self.unseen:
            losses = trainer.mean(losses)
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
                self._write(GENERATOR, trainer.average)
                if is_best:
                    self._write(BEST, trainer.average)
                self._picture(generated, distance)
            except (OSError, ValueError) as error:
                failure = _reason(error)
        failure = trainer.gathered(failure)[0]
        if failure is not None:
            raise Stopped(f"in saving step {trainer.number}: {failure}; {self.last_good()}")

    def _restore(self):
        """Writes the generator and the best one as checkpoints have them, since a process may have
        been killed between a checkpoint and these.
        """
        average = copy.deepcopy(self.trainer.average)
        self._write(GENERATOR, average)
        if self.best is not None and self.best[0] in self.run.numbers():
            average.load_state_dict(self.run.load(self.best[0])["trainer"]["average"])
            self._write(BEST, average)

    def _look(self):
        """The average's images of the scenes, and how far they are from the photographs."""
        settled(self.trainer.average, self.painter)
        generated = self.scenes.generated(self.painter, self.trainer.networks.encoder)
        return self.scenes.distance(generated, self.trainer.networks.perceptual), generated

    def _write(self, name, average):
        settled(average, self.painter)
        with self.run.written(self.run.path(name)) as path:
            checkpoint.write(self.painter, path)

    def _picture(self, generated, distance):
        grid, number = self.scenes.grid(generated), self.trainer.number
        with self.run.written(self.run.path(PICTURES, f"step-{number:08}.png")) as path:
            Image.fromarray(grid).save(path)
        self.log.picture(number, grid, distance)
        self.log.say(f"saved step {number}, {distance:.4g} from the photographs")

    def last_good(self):
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


def _check_finite(trainer):
    """Raises ValueError where a step with finite losses has left numbers that are not."""
    for name, network in trainer.networks.trained().items():
        for key, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key} of the {name} is not finite")


def _mean_of(name, found):
    values = [losses[name] for losses in found if name in losses]
    return sum(values) / len(values)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[float]]:
    """Inside, SIGINT and SIGTERM end nothing, but their times are added to the list. One that comes
    more than PATIENCE seconds after the first ends the process as always; before, it may be the
    same request, which launchers pass on to processes that had it from the terminal. In other
    threads than the main one signals are left alone.
    """
    asked, before = [], {}

    def note(number, frame):
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > PATIENCE:
            signal.signal(number, before[number])
            signal.raise_signal(number)

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
