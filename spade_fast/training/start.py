"""Runs in a folder, as `spade-fast train` starts and resumes them."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from ..data import loader
from ..settings import Config
from .examples import folder_of, with_convention, with_steps
from .recorder import Recorder, Stopped, reason_of
from .run import GENERATOR, Run
from .signals import anywhere, asked_to_stop
from .trainer import Trainer


def train(config: Config) -> Path:
    """Trains from the first step on, in a new folder, `config.out`. Returns the path of the
    generator's weights.

    Raises:
        ValueError, TypeError, OSError: the settings, the data or the folder are not as they should
            be; no step has been taken.
        ModuleNotFoundError: Accelerate or TensorBoard is not installed.
        Stopped: the run ended early, because of a signal, a loss that is not finite, a file that
            cannot be read or written, or a lack of memory; the message says from which checkpoint
            it can continue.
    """
    if config.out is None:
        raise ValueError("out is not given; it should be the folder of the run")
    run = Run(config.out)
    run.check_new()
    config.check_used()
    config = with_convention(config)
    examples = folder_of(config)
    return _train(run, with_steps(config, len(examples)), examples)


def resume(folder: str | os.PathLike, **settings: Any) -> Path:
    """Continues the run in a folder from its newest checkpoint as if it had not stopped, or from
    the first step if it has no checkpoint yet.

    settings: new values for some of the run's settings, from now on. Settings that affect what
        steps compute cannot be changed.

    Raises: as `train` does.
    """
    run = Run(folder)
    before = run.settings()
    if settings.setdefault("out", str(folder)) != str(folder):
        raise ValueError(
            f"out is {settings['out']!r} and resume {str(folder)!r}, only one of them should be"
            " given"
        )
    if settings.get("epochs") is not None:
        settings = {"steps": None} | settings  # the run's epochs were converted to steps
    config, state = before.changed(**settings), None
    config.check_used(settings)
    if run.numbers():
        state = run.load(run.numbers()[-1])
    elif run.path(GENERATOR).exists():
        raise ValueError(
            f"{run.folder} has lost its checkpoints, so it cannot be resumed; out should be another"
            " folder, for a new run"
        )
    began = before.deciding() if state is None else state["settings"]
    refused = {name: value for name, value in began.items() if getattr(config, name) != value}
    if refused:
        raise ValueError(
            "the run began with other settings: "
            + "; ".join(
                f"{name} was {value!r}, and is now {getattr(config, name)!r}"
                for name, value in refused.items()
            )
        )
    examples = folder_of(config)
    config = with_steps(config, len(examples))
    done = 0 if state is None else state["trainer"]["number"]
    if config.steps is not None and config.steps < done:
        raise ValueError(
            f"steps is {config.steps}; it should be {done} or more: the run has taken {done} steps"
        )
    return _train(run, config, examples, state)


def _train(run, config, examples, state=None):
    trainer = Trainer(config)
    trainer.seed()
    if state is not None:
        trainer.load_state_dict(state["trainer"])
    batches = _batches(trainer, examples)
    with contextlib.ExitStack() as stack:
        recorder = Recorder(run, trainer, None if state is None else state["best"])
        _in_first(trainer, lambda: recorder.begin(stack, examples))
        asked = stack.enter_context(asked_to_stop())
        try:
            _take_steps(trainer, batches, recorder, asked)
        except (ValueError, TypeError, OSError, torch.OutOfMemoryError) as error:
            raise Stopped(f"{reason_of(error)}; {recorder.last_good()}") from error
    return run.path(GENERATOR)


def _take_steps(trainer, batches, recorder, asked):
    config = trainer.config
    for step in trainer.fit(batches):
        last = step.number == config.steps
        saves = last or step.number % config.save_every == 0
        recorder.note(step, saves)
        stops = not last and anywhere(trainer.accelerator, bool(asked))
        if saves or stops:
            recorder.save(judges=saves)
        if stops:
            raise Stopped(
                f"stopped after step {step.number}: `spade-fast train --resume"
                f" {recorder.run.folder}` continues the run"
            )


def _in_first(trainer, work):
    """Does work in the first process only. An error is raised in all of them, or else the others
    would wait for the first forever.
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
