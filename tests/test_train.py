"""`spade-fast train`: a run's folder, that nothing of it is lost, and what is refused."""

import errno
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch
from drawn_data import draw_folder, settings_for
from typer.testing import CliRunner

from spade_fast import SPADEGenerator, checkpoint
from spade_fast.cli import app
from spade_fast.training import Config, Stopped, preset, resume, train
from spade_fast.training import train as train_module
from spade_fast.training.run import Run
from spade_fast.writing import UNFINISHED

train_module = __import__("spade_fast.training.train", fromlist=["train"])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def settings(scenes, tmp_path):
    return settings_for(scenes, out=str(tmp_path / "run"))


def assert_same(found, expected, place="state"):
    """Bit for bit, whatever they are made of."""
    assert type(found) is type(expected), place
    if isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), place
    elif isinstance(found, dict):
        assert list(found) == list(expected), place
        for name in found:
            assert_same(found[name], expected[name], f"{place}.{name}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected)):
            assert_same(one, other, f"{place}.{number}")
    else:
        assert found == expected, place


def last_state(folder):
    run = Run(folder)
    return run.load(run.numbers()[-1])


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {
        ".lock"
    }


def test_a_run_has_all_that_one_needs(settings, tmp_path):
    weights = train(Config(**settings, save_every=1, keep=1, log_every=1))
    run = Run(settings["out"])
    assert run.settings() == Config(**settings, save_every=1, keep=1, log_every=1).changed(
        num_classes=182, dont_care=255
    )
    best = run.load(4)["best"][0]
    assert run.numbers() == sorted({best, 4})
    assert files_of(run.folder) == {
        "config.yaml",
        "generator.safetensors",
        "best.safetensors",
        "log.txt",
        *(f"pictures/step-{number:08}.png" for number in (1, 2, 3, 4)),
        *(f"checkpoints/step-{number:08}.pt" for number in run.numbers()),
    }
    generator = checkpoint.load(weights)
    assert isinstance(generator, SPADEGenerator) and generator.label_nc == 184
    averaged = last_state(run.folder)["trainer"]["average"]
    for name, parameter in generator.named_parameters():
        assert torch.equal(parameter, averaged[f"module.{name}"])
    lines = (run.folder / "log.txt").read_text().splitlines()
    assert sum(" images/s" in line for line in lines) == 4 and "left" in lines[0]


def test_tensorboard_has_losses_and_pictures(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Config(**settings | {"tensorboard": True, "steps": 2}, log_every=1))
    events = EventAccumulator(str(Run(settings["out"]).path("tensorboard"))).Reload()
    assert {"losses/feature_matching", "losses/fake", "distance"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("losses/real")] == [1, 2]
    assert events.Tags()["images"] == ["scenes"]


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"workers": 1, "use_vae": True, "z_dim": 3, "norm_G": "spectralspadesyncbatch3x3"},
        {"order": "shared", "discriminator_steps": 2, "decay": 0.5, "ema": 0.5},
        {"accumulate": 2, "recompute": True, "batch": 4},
    ],
    ids=["plain", "vae", "shared", "accumulated"],
)
def test_a_stopped_run_goes_on_bit_for_bit(settings, tmp_path, others):
    settings = settings | others
    train(Config(**settings | {"out": str(tmp_path / "whole")}))
    torch.manual_seed(5)
    stopped_after(settings, 2)
    torch.manual_seed(6)
    random.seed(6)
    resume(settings["out"])
    assert_same(last_state(settings["out"]), last_state(tmp_path / "whole"))


def stopped_after(settings, steps):
    """A run that is asked to stop after so many steps."""
    before, note = train_module._Recorder.note, []

    def noting(self, step, looks):
        before(self, step, looks)
        if step.number == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module._Recorder, "note", noting)
        with pytest.raises(Stopped, match=f"stopped after step {steps}: .*--resume"):
            train(Config(**settings))
    assert Run(settings["out"]).numbers() == [steps]


def test_signals_are_as_before_after_a_run(settings):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(Config(**settings | {"steps": 1}))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_trains_in_a_thread_that_gets_no_signals(settings):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(Config(**settings))))
    thread.start()
    thread.join()
    assert found


def train_or_resume(settings):
    torch.set_num_threads(1)
    run = Run(settings["out"])
    if run.numbers():
        resume(settings["out"])
    else:
        if run.path("config.yaml").exists():
            run.path("config.yaml").unlink()
        train(Config(**settings))


def test_a_killed_run_ends_with_the_same_bits(settings, tmp_path):
    settings |= {"save_every": 1, "steps": 6, "workers": 1}
    whole = settings | {"out": str(tmp_path / "whole")}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["spade_fast.training", "drawn_data"])
    began = time.monotonic()
    run_in(processes, whole, None)
    seconds, chance = time.monotonic() - began, random.Random(0)
    for _ in range(3):
        run_in(processes, settings, chance.uniform(0.3, 1) * seconds)
    run_in(processes, settings, None)
    assert_same(last_state(settings["out"]), last_state(tmp_path / "whole"))
    for name in ("generator.safetensors", "best.safetensors"):
        found, expected = (
            checkpoint.read(os.path.join(one["out"], name)) for one in (settings, whole)
        )
        assert_same(dict(found), dict(expected))
    assert not [name for name in files_of(Run(settings["out"]).folder) if UNFINISHED in name]


def run_in(processes, settings, seconds):
    """Trains in a process that is killed after some time; None: never."""
    process = processes.Process(target=train_or_resume, args=(settings,))
    process.start()
    process.join(seconds)
    if seconds is None:
        assert process.exitcode == 0
    process.kill()
    process.join()


def test_a_full_disk_leaves_the_last_good_checkpoint(settings, monkeypatch):
    before, writes = os.fsync, []

    def full(descriptor):
        writes.append(descriptor)
        if Run(settings["out"]).numbers():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return before(descriptor)

    run = Run(settings["out"])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Stopped, match="could not be saved: .*No space left.* step 2:"):
        train(Config(**settings, save_every=1))
