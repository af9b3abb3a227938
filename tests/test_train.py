"""`spade-fast train`: a run's folder, that nothing in it is lost, and what is refused."""

import contextlib
import dataclasses
import errno
import inspect
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from drawn_data import command, draw_folder, settings_for, words_of
from exactly import assert_same
from typer.testing import CliRunner

from spade_fast import SPADEGenerator, checkpoint
from spade_fast.cli import app
from spade_fast.losses import KINDS
from spade_fast.training import PRESETS, Config, Stopped, preset, resume, signals, train, trainer
from spade_fast.training.log import Log
from spade_fast.training.recorder import Recorder
from spade_fast.training.run import Run
from spade_fast.training.signals import asked_to_stop
from spade_fast.writing import UNFINISHED


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def settings(scenes, tmp_path):
    return settings_for(scenes, out=str(tmp_path / "run"))


def last_state(folder):
    run = Run(folder)
    return run.load(run.numbers()[-1])


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {
        ".lock"
    }


def test_a_run_can_be_used_from_another_folder(scenes, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    (home / "scenes").symlink_to(scenes)
    monkeypatch.chdir(home)
    assert command(**settings_for(Path("scenes"), out="run", steps=1)).exit_code == 0
    monkeypatch.chdir(elsewhere)
    result = command(resume=home / "run", steps=2)
    assert result.exit_code == 0 and Run(home / "run").numbers() == [1, 2], result.output
    words = ["generate", home / "run", "--labels", home / "scenes" / "label", "--out", "images"]
    result = CliRunner().invoke(app, [*map(str, words)])  # with the run's instance maps
    assert result.exit_code == 0, result.output
    assert len(list((elsewhere / "images").iterdir())) == len(list((scenes / "label").iterdir()))


def test_a_run_has_everything_needed(settings, tmp_path):
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
    assert sum(" images/s" in line for line in lines) == 4 and "left" in lines[1]
    assert "images may stay grey" in lines[0]


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
def test_a_stopped_run_continues_bit_for_bit(settings, tmp_path, others):
    settings = settings | others
    train(Config(**settings | {"out": str(tmp_path / "whole")}))
    torch.manual_seed(5)
    stopped_after(settings, 2)
    torch.manual_seed(6)
    random.seed(6)
    resume(settings["out"])
    assert_same(last_state(settings["out"]), last_state(tmp_path / "whole"))


def stopped_after(settings, steps):
    """A run that is asked to stop after this number of steps."""
    before = Recorder.note

    def noting(self, step, looks):
        before(self, step, looks)
        if step.number == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "note", noting)
        with pytest.raises(Stopped, match=f"stopped after step {steps}: .*--resume"):
            train(Config(**settings))
    assert Run(settings["out"]).numbers() == [steps]


def test_signal_handlers_are_restored_after_a_run(settings):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(Config(**settings | {"steps": 1}))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_training_in_a_thread_that_gets_no_signals(settings):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(Config(**settings))))
    thread.start()
    thread.join()
    assert found


def train_or_resume(settings):
    torch.set_num_threads(1)
    if Run(settings["out"]).path("config.yaml").exists():
        resume(settings["out"], steps=settings["steps"])
    else:
        train(Config(**settings))


@pytest.mark.full
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


def test_unfinished_files_of_a_killed_process_are_removed(settings):
    """And nothing else: a user's own folder inside the run's is left alone."""
    train(Config(**settings | {"steps": 1}))
    run = Run(settings["out"])
    kept = files_of(run.folder) | {"mine/.a.unfinished.pt"}
    for name in (
        "mine/.a.unfinished.pt",
        ".generator.unfinished.safetensors",
        "checkpoints/.step-00000002.unfinished.pt",
        "pictures/.step-00000002.unfinished.png",
    ):
        run.path(name).parent.mkdir(exist_ok=True)
        run.path(name).write_bytes(b"half")
    resume(run.folder)
    assert files_of(run.folder) == kept


@pytest.mark.parametrize("number", range(1, 6))
def test_killed_when_a_file_gets_its_final_name(settings, tmp_path, number):
    """For the files of the settings, the first checkpoint, the generator and the best generator."""
    settings |= {"steps": 2, "save_every": 1}
    child = os.fork()
    if child == 0:
        killed_at(settings, number)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    if number > 2:  # the first step is complete, and the best so far
        resume(settings["out"], steps=1)
        best, newest = (checkpoint.read(Run(settings["out"]).path(name)) for name in WEIGHTS)
        assert_same(dict(best), dict(newest))
    train_or_resume(settings)
    train(Config(**settings | {"out": str(tmp_path / "whole")}))
    assert_same(last_state(settings["out"]), last_state(tmp_path / "whole"))


WEIGHTS = ("best.safetensors", "generator.safetensors")


def killed_at(settings, number):
    """Trains, and kills the process when the file with this number gets its final name."""
    replace, calls = os.replace, []

    def killing(before, after):
        calls.append(after)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(before, after)

    os.replace = killing
    train(Config(**settings))
    os._exit(0)


def run_in(processes, settings, seconds):
    """Trains in a process that is killed after `seconds`; None lets it finish."""
    process = processes.Process(target=train_or_resume, args=(settings,))
    process.start()
    process.join(seconds)
    if seconds is None:
        assert process.exitcode == 0
    process.kill()
    process.join()


def test_signals_to_the_whole_group_save_and_stop(settings):
    """As with a scheduler's SIGTERM, or Ctrl+C in a terminal: the workers get the signal, too, and
    it comes twice. This runs the real command in its own process.
    """
    run = Run(settings["out"])
    words = words_of(**settings | {"steps": 100000, "workers": 2, "save_every": 5})
    program = [sys.executable, "-c", "from spade_fast.cli import app; app()", *words]
    process = subprocess.Popen(
        program, start_new_session=True, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    while not run.numbers():
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    lines = process.communicate(timeout=60)[1].splitlines()
    last = run.numbers()[-1]
    assert process.returncode == 1 and not any("Traceback" in line for line in lines)
    assert lines[-1] == (
        f"stopped after step {last}: `spade-fast train --resume {run.folder}` continues the run"
    )
    assert last_state(run.folder)["trainer"]["number"] == last
    with pytest.raises(ProcessLookupError):  # no process of the group is left, not even a worker
        os.killpg(process.pid, 0)


@pytest.fixture
def listens_to_interrupts():
    """As in a process at a terminal; a background process may have been started with interrupts
    ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("order", [[0.0, 1.0], [0.0, 3.0]], ids=["soon", "later"])
def test_only_a_later_signal_ends_the_process(order, monkeypatch, listens_to_interrupts):
    times = iter(order)
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(times))
    with pytest.raises(KeyboardInterrupt) if order[1] > 2 else contextlib.nullcontext():
        with asked_to_stop() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked == [0.0]
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


FILES = {"step-00000002.pt": 1, "generator.safetensors": 2, "step-00000002.png": 2}


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_the_last_good_checkpoint(settings, tmp_path, name):
    run, replace, last = Run(settings["out"]), os.replace, FILES[name]
    settings |= {"save_every": 1, "keep": 4}

    def full(before, after):
        if os.path.basename(after) == name and run.checkpoint(1).exists():
            if run.path("pictures", "step-00000001.png").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(before, after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(Stopped) as stopped:
            train(Config(**settings))
    assert re.match(
        rf"in saving step 2: \[Errno 28\] No space left on device: '.*{name}'; the last good"
        rf" checkpoint is that of step {last}: `spade-fast train --resume",
        str(stopped.value),
    )
    assert run.numbers() == list(range(1, last + 1))
    assert not [path for path in files_of(run.folder) if UNFINISHED in path]
    resume(run.folder)
    train(Config(**settings | {"out": str(tmp_path / "whole")}))
    assert_same(last_state(run.folder), last_state(tmp_path / "whole"))


def test_a_full_disk_of_the_log(settings, monkeypatch):
    def full(self, number, losses):
        if number == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Log, "losses", full)
    with pytest.raises(Stopped, match=r"No space left on device; the last .* that of step 2: "):
        train(Config(**settings, save_every=2, log_every=1))


def nan_in_a_loss(losses, fakes):
    return losses | {"feature_matching": losses["feature_matching"] * float("nan")}


def nan_in_a_gradient(losses, fakes):
    """The loss is 0, but the derivative of the square root is infinite."""
    return losses | {"more": (fakes * 0).sum().sqrt()}


@pytest.mark.parametrize(
    "ruin, words",
    [
        (nan_in_a_loss, "feature_matching is nan.* in step 3"),
        (nan_in_a_gradient, r"in saving step 3: \S+ of the generator is not finite"),
    ],
)
def test_values_that_are_not_finite_are_not_saved(settings, monkeypatch, ruin, words):
    losses_of, calls = trainer.generator_losses, []

    def third(networks, config, layout, fakes, reals):
        calls.append(layout)
        losses = losses_of(networks, config, layout, fakes, reals)
        return ruin(losses, fakes) if len(calls) == 3 else losses

    monkeypatch.setattr(trainer, "generator_losses", third)
    with pytest.raises(Stopped, match=rf"{words}; the last good checkpoint is that of step 2: "):
        train(Config(**settings, save_every=1, order="shared"))
    assert Run(settings["out"]).numbers() == [1, 2]
    for tensor in last_state(settings["out"])["trainer"]["networks"]["generator"].values():
        assert tensor.isfinite().all()


def test_an_error_in_the_middle_keeps_saved_files(settings, monkeypatch):
    before = Recorder.note

    def broken(self, step, looks):
        if step.number == 2:
            raise KeyboardInterrupt
        before(self, step, looks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "note", broken)
        with pytest.raises(KeyboardInterrupt):
            train(Config(**settings, save_every=1))
    assert Run(settings["out"]).numbers() == [1]
    resume(settings["out"])
    assert Run(settings["out"]).numbers()[-1] == 4


def test_a_run_continued_for_more_steps_equals_the_longer_run(settings, tmp_path):
    """Even with falling learning rates, which had reached 0 in the shorter run."""
    settings |= {"decay": 0.5}
    stopped_after(settings, 2)
    resume(settings["out"], steps=6)
    train(Config(**settings | {"out": str(tmp_path / "whole"), "steps": 6}))
    rates = [
        [
            state["lr"]
            for one in last_state(folder)["trainer"]["optimizers"]
            for state in one["param_groups"]
        ]
        for folder in (settings["out"], tmp_path / "whole")
    ]
    assert rates[0] == rates[1]


def test_seeds(settings, tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(Config(**settings | {"out": str(tmp_path / name), "steps": 1, "seed": seed}))
        states.append(last_state(tmp_path / name))
    assert_same(states[0], states[1])
    first, other = (state["trainer"]["networks"]["generator"]["fc.weight"] for state in states[1:])
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["small", "published"])
def test_presets_and_options(settings, tmp_path, name):
    given = {key: settings[key] for key in ("labels", "images", "convention", "out", "workers")}
    own = dict(ngf=1, ndf=2, nhidden=2, batch=2)
    result = command(
        **given, **own, preset=name, epochs=1, crop_size=64, perceptual=False, tensorboard=False
    )
    assert result.exit_code == 0, result.output
    found = Run(settings["out"]).settings()
    expected = preset(name) | own | {"steps": 2, "epochs": None}
    assert {key: getattr(found, key) for key in expected} == expected


def test_the_help_says_which_settings_a_preset_sets():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "150"}).output
    words = " ".join(shown.replace("│", " ").split())
    for name, (text, settings) in PRESETS.items():
        options = words_of(**settings)[1:]
        assert f"{name}: {text} Sets {' '.join(options)}." in words
    assert "--lr-generator 0.0002" in words


def test_every_setting_is_an_option():
    words = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "150"}).output
    for each in dataclasses.fields(Config):
        assert f"--{each.name.lower().replace('_', '-')} " in words
    panels = re.findall(r"─ ([A-Z][\w ]+) ─", words)
    assert panels == [
        "Options",
        "The run",
        "Data",
        "Networks",
        "Losses",
        "Perceptual loss",
        "Steps",
    ]
    assert "Default: 256." in words


def test_settings_spell_what_the_losses_and_the_generator_have():
    """Their module imports neither, since the command's help should not import PyTorch."""
    words = {each.name: each.metadata["help"] for each in dataclasses.fields(Config)}
    assert set(re.findall(r"\w+", words["adversarial"])) >= KINDS.keys()
    official = inspect.signature(SPADEGenerator.official)
    assert official.parameters["norm_G"].default == Config().norm_G


def test_steps_replace_a_presets_epochs():
    config = Config(**preset("published", steps=10))
    assert (config.steps, config.epochs, config.batch) == (10, None, 32)
    with pytest.raises(ValueError, match="steps is 10 and epochs is 3, only one"):
        Config(**preset("published", steps=10, epochs=3))
