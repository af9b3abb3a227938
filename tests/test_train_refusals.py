"""`spade-fast train` refuses in one line, before anything is written."""

import multiprocessing
import os
import re
import sys
import time

import pytest
import ruined
import torch
from drawn_data import command, draw_folder, settings_for

from spade_fast.training import Config, train
from spade_fast.training.run import Run


@pytest.fixture
def folder(tmp_path):
    return draw_folder(tmp_path / "scenes")


@pytest.fixture
def options(folder, tmp_path):
    return settings_for(folder, out=str(tmp_path / "run"), steps=1)


def refusal(**options):
    """The command's one-line refusal of these settings. Asserts that nothing was written or
    changed.
    """
    folder = options.get("resume") or options.get("out")
    before = contents(folder)
    result = command(**options)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and result.stdout == "", result.output
    assert contents(folder) == before
    return result.stderr.removeprefix("Error: ").strip()


def contents(folder):
    run = Run(folder or "nowhere")
    paths = [run.path("config.yaml"), run.path("log.txt"), *run.checkpoints()]
    return {path: path.read_bytes() for path in paths if path.exists()}


SAYS_ALSO = {
    ruined.missing: "1 name without a partner, or with two files: ",
    ruined.truncated: "the data have 1 fault, the first: ",
    ruined.out_of_range: "`spade-fast check-data --all-faults`",
}


@pytest.mark.parametrize("ruin", ruined.RUINS, ids=lambda ruin: ruin.__name__)
def test_a_ruined_folder(folder, options, ruin):
    expected, found = ruin(folder), refusal(**options)
    assert all(words in found for words in [*expected, SAYS_ALSO.get(ruin, "")]), found
    assert not Run(options["out"]).folder.exists()


def test_an_empty_folder(folder, options):
    for path in (folder / "label").iterdir():
        path.unlink()
    assert re.search("labels is .*label, which has no images", refusal(**options))
    assert not Run(options["out"]).folder.exists()


@pytest.mark.parametrize(
    "others, words",
    [
        (dict(convention="folder"), "--num-classes is not given; .*check-data` suggests"),
        (dict(labels=None), "--labels is not given"),
        (dict(images="nowhere"), "--images is nowhere, which does not exist"),
        (dict(palette="nowhere.txt"), "nowhere.txt"),
        (dict(out=None), "--out is not given"),
        (dict(steps=None), "--steps is not given"),
        (dict(epochs=2), "--steps is 1 and epochs is 2, only one of them"),
        (dict(perceptual=True, vgg_weights="nowhere"), "nowhere"),
        (
            dict(vgg_weights=__file__),
            "--vgg-weights is '.*'; it should not be given: --perceptual is off",
        ),
        (dict(z_dim=256), "--z-dim is 256; it should not be given: --use-vae is off"),
        (dict(weight_kl=0.1), "--weight-kl is 0.1; it should not be given: --use-vae is off"),
        (dict(weight_perceptual=1.0), "--weight-perceptual is 1.0; .* --perceptual is off"),
        (dict(init="default", init_gain=0.1), "--init-gain is 0.1; .*: init is 'default'"),
        (dict(crop_size=40), "--crop-size is 40, .* --crop-size should be 32 or 64"),
        (dict(crop_size=48, batch=1), "--crop-size is 48, .* --crop-size should be 64, the near"),
        (dict(crop_size=48, load_size=60), "--crop-size is 48, .* --crop-size should be 32, the"),
        (dict(crop_size=16, preset="small"), "--crop-size is 16, .* it should be 64 or more"),
        (dict(crop_size=72, load_size=80, batch=1), "--crop-size is 72, .* should be 64, the near"),
        (dict(crop_size=16, load_size=20), "--crop-size is 16, .* no crop_size near this one"),
        (dict(crop_size=48, load_size=50, batch=1), "--crop-size is 48, .* no crop_size near"),
        (dict(crop_size=16), "--crop-size is 16, .* it should be 32 or more"),
        (dict(norm_G="spadeinstance3x3"), "--crop-size is 32; it should be larger: .* 1 × 1"),
        (dict(norm_G="spadebatch3x3", batch=1), "--crop-size is 32; it should be larger"),
        (dict(norm_G="spadebatch3x3", accumulate=2), "--crop-size is 32; it should be larger"),
        (dict(norm_G="spadesyncbatch3x3", batch=1), "--crop-size is 32; it should be larger"),
        (dict(norm_G="spade-batch"), "--norm-g is 'spade-batch'"),
        (dict(preprocess="none"), "--preprocess is 'none', which makes .*000.png 64 × 32; .* 32 ×"),
        (dict(preprocess="scale_width"), "--preprocess is .*000.png 32 × 24; it should be 32 × 32"),
        (dict(preprocess="crop", crop_size=64), "000.png: the image is 52 × 40 before it is cro"),
        (dict(preprocess="stretch"), "--preprocess is 'stretch'; it should be one of"),
        (dict(preprocess="fixed", load_size=40), "--load-size is 40"),
        (dict(load_size=30), "--load-size is 30; it should be 32 or more"),
        (dict(batch=5), "the data set has 4 examples; it should have at least one batch"),
        (dict(batch=3, accumulate=2), "--batch is 3; it should be a multiple of accumulate, 2"),
        (dict(order="shared", accumulate=2), "--order is 'shared' and accumulate is 2"),
        (dict(precision="fp16"), "--precision is 'fp16'; it should be bf16 or no on a CPU"),
        (dict(precision="half"), "--precision is 'half'; it should be one of"),
        (dict(decay=1.5), "--decay is 1.5; it should be 1 or less"),
        (dict(decay=-0.5), "--decay is -0.5; it should be 0 or more"),
        (dict(weight_kl=float("nan")), "--weight-kl is nan; it should be a finite number"),
        (dict(lr_generator=float("inf")), "--lr-generator is inf; it should be a finite number"),
        (dict(lr_generator=-1e-4), "--lr-generator is -0.0001; it should be 0 or more"),
        (dict(ema=1.0), "--ema is 1.0; it should be less than 1"),
        (dict(beta1=1), "--beta1 is 1.0; it should be less than 1"),
        (dict(aspect_ratio=0.0), "--aspect-ratio is 0.0; it should be a positive number"),
        (dict(steps=0), "--steps is 0; it should be 1 or more"),
        (dict(preset="large"), "--preset is 'large'; it should be one of published, small"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting(options, others, words):
    if torch.cuda.is_available() and others.get("precision") == "fp16":
        pytest.skip("it runs on a GPU")
    assert re.search(words, refusal(**options | others))
    out = (options | others)["out"]
    assert out is None or not Run(out).folder.exists()


def test_zeros_are_accepted(options):
    zeros = dict(weight_adversarial=0.0, lr_generator=0.0, ema=0.0, pictures=0, seed=0)
    assert command(**options | zeros).exit_code == 0


def test_without_the_check_training_starts_and_reports_the_fault(folder, options):
    ruined.out_of_range(folder)
    result = command(**options | dict(steps=50, workers=1, pictures=1), check=False)
    assert result.exit_code == 1 and "Traceback" not in result.output
    line = result.stderr.splitlines()[-1]
    assert re.match(r"001: labels has a 200 in \d+ pixels.*; there is no earlier checkpoint", line)


@pytest.mark.parametrize("kind", ["below a file", "a file", "read only"])
def test_a_folder_that_cannot_be_written(options, tmp_path, kind, monkeypatch):
    (tmp_path / "file").write_text("as it was")
    out = {"below a file": tmp_path / "file" / "run", "a file": tmp_path / "file"}.get(kind)
    if out is None:
        out = tmp_path / "read only" / "run"
        out.parent.mkdir(mode=0o500)

        def refuse(self, *arguments, **others):  # even as root, who may write anywhere
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(type(out), "mkdir", refuse)
    words = refusal(**options | {"out": out})
    assert words.startswith(f"--out is {out}; it should be a folder that can be written to: ")
    assert (tmp_path / "file").read_text() == "as it was"


def test_tensorboard_needs_a_name_in_utf8(options, tmp_path):
    out = str(tmp_path / os.fsdecode(b"bad\xff"))
    result = command(**options | {"out": out, "tensorboard": True})
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "bad\\udcff, whose name is not UTF-8; it should be for TensorBoard" in result.stderr
    assert command(**options | {"out": out}).exit_code == 0


def test_a_folder_that_contains_a_run(options):
    assert command(**options).exit_code == 0
    assert f"`spade-fast train --resume {options['out']}` continues it" in refusal(**options)


def test_two_processes_in_one_folder(options):
    with Run(options["out"]).held():
        assert "another process is training in" in refusal(**options)
    assert command(**options).exit_code == 0
    with Run(options["out"]).held():
        assert "another process is training in" in refusal(resume=options["out"], steps=2)


def test_a_worker_does_not_hold_the_folder(tmp_path):
    """One that outlives its process: it is forked while the folder is held."""
    forking = multiprocessing.get_context("fork")
    lives = forking.Event()

    def outlive():
        lives.set(), time.sleep(60)

    with Run(tmp_path).held():
        worker = forking.Process(target=outlive)
        worker.start()
        assert lives.wait(60)
    try:
        with Run(tmp_path).held():
            pass
    finally:
        worker.kill(), worker.join()


@pytest.mark.parametrize("again", ["train", "resume"])
def test_a_run_that_ended_before_its_first_checkpoint_starts_again(options, again, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spade_fast.training.trainer.Trainer.step", ends)
        with pytest.raises(KeyboardInterrupt):
            train(Config(**options))
    assert Run(options["out"]).path("config.yaml").exists()
    given = options if again == "train" else {"resume": options["out"]}
    assert command(**given).exit_code == 0
    assert Run(options["out"]).numbers() == [1]


def ends(self, parts):
    raise KeyboardInterrupt


class TestResume:
    @pytest.fixture
    def run(self, options):
        train(Config(**options | dict(steps=2, save_every=1)))
        return Run(options["out"])

    def test_missing_runs(self, tmp_path):
        assert "has no config.yaml; it should be the folder of a run" in refusal(resume=tmp_path)

    @pytest.mark.parametrize(
        "text, words",
        [
            ("a: [", "config.yaml is not YAML: "),
            ("- 1", "config.yaml should have settings"),
            ("ngff: 3", "config.yaml has unknown settings: ngff"),
            ("ngf: many", "config.yaml: ngf is 'many'; it should be a whole number"),
            ("decay: 2.0", "config.yaml: decay is 2.0; it should be 1 or less"),
        ],
    )
    def test_broken_settings(self, run, text, words):
        run.path("config.yaml").write_text(text)
        assert words in refusal(resume=run.folder)

    def test_without_yaml(self, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)
        words = refusal(resume=run.folder)
        assert words.startswith("reading a run's settings needs yaml: pip install pyyaml (")

    def test_numbers_as_people_write_them(self, run):
        path = run.path("config.yaml")
        path.write_text(path.read_text().replace("lr_generator: 0.0001", "lr_generator: 1e-4"))
        assert run.settings().lr_generator == 1e-4 and "1e-4" in path.read_text()
        assert command(resume=run.folder, check=False).exit_code == 0

    def test_damaged_checkpoint(self, run):
        path = run.checkpoint(2)
        path.write_bytes(path.read_bytes()[:1000])
        words = refusal(resume=run.folder)
        assert f"{path} is not a file of weights, or is incomplete" in words
        assert words.endswith("without this file the run continues from step 1")
        path.unlink()
        assert command(resume=run.folder).exit_code == 0 and run.numbers() == [1, 2]
        torch.save({"weight": torch.zeros(1)}, path)
        assert f"{path} is not a checkpoint of a run; without" in refusal(resume=run.folder)

    def test_settings_that_differ(self, run):
        words = refusal(resume=run.folder, ngf=4, use_vae=True, save_every=5)
        assert words == (
            "the run began with other settings: ngf was 2, and is now 4; use_vae was False, and is"
            " now True"
        )

    def test_settings_that_were_edited(self, run):
        run.begin(run.settings().changed(seed=3))
        assert refusal(resume=run.folder).endswith("other settings: seed was 0, and is now 3")

    def test_a_condition_with_other_channels(self, run):
        run.begin(run.settings().changed(instances=None))
        words = refusal(resume=run.folder)
        assert re.match("the state belongs to another generator than this: size mismatch", words)

    def test_contradictions(self, run):
        assert "--preset is 'small' and resume" in refusal(resume=run.folder, preset="small")
        assert "--out is 'other' and resume" in refusal(resume=run.folder, out="other")
        assert "--steps is 1; it should be 2 or more: the run has taken 2 steps" in refusal(
            resume=run.folder, steps=1
        )

    @pytest.mark.parametrize("other", ["cityscapes", "ade20k", "folder"])
    def test_another_convention(self, run, other):
        words = refusal(resume=run.folder, convention=other, steps=3)
        assert words == (
            f"the run began with other settings: convention was 'coco_stuff', and is now {other!r}"
        )

    def test_a_finished_run_says_so(self, run):
        result = command(resume=run.folder)
        words = "the run has taken all its 2 steps already; a larger --steps continues it"
        assert result.exit_code == 0 and words in result.stderr.splitlines()
        assert "resumed" not in result.stderr and run.path("log.txt").read_text().count(words) == 1
        assert words not in command(resume=run.folder, steps=3).output

    @pytest.mark.parametrize("more", [dict(steps=4), dict(epochs=2)])
    def test_more_steps(self, run, more):
        assert command(resume=run.folder, save_every=3, **more).exit_code == 0
        assert run.numbers()[-2:] == [3, 4]
        assert (run.settings().steps, run.settings().save_every) == (4, 3)
        lines = run.path("log.txt").read_text()
        assert "resumed at step 2" in lines and "step 4/4" in lines

    def test_ruined_data(self, run, folder):
        ruined.truncated(folder, "003")
        assert "img/003.png is not an image" in refusal(resume=run.folder, steps=3)
        assert command(resume=run.folder, check=False).exit_code == 0
