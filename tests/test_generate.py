"""`spade-fast generate`: its images, and its refusals of label maps and options."""

import hashlib
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import ruined
import torch
from drawn_data import draw_folder, on_its_side, save, settings_for
from PIL import Image
from typer.testing import CliRunner

from spade_fast import (
    ConvEncoder,
    SemanticLayout,
    SPADEGenerator,
    checkpoint,
    frozen,
    generation,
    writing,
)
from spade_fast.cli import app
from spade_fast.data import Preparation, read_labels, read_photograph
from spade_fast.evaluation.pictures import origin
from spade_fast.training import Config, train
from spade_fast.training.run import Run
from spade_fast.writing import UNFINISHED

SIZE, SCENES = 32, 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("scenes"), SCENES)


@pytest.fixture
def folder(tmp_path):
    return draw_folder(tmp_path / "own", SCENES)


def generator_of(**settings):
    torch.manual_seed(0)
    wiring = {"crop_size": SIZE, "ngf": 2, "nhidden": 4, "z_dim": 3}
    return SPADEGenerator.official("coco", **wiring | settings).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return written_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def weights_with_z(tmp_path_factory):
    return written_weights(tmp_path_factory.mktemp("weights"), use_vae=True)


def written_weights(folder, **settings):
    checkpoint.write(generator_of(**settings), folder / "generator.pth")
    return folder / "generator.pth"


def run(*arguments, code=0):
    """Runs the command, and returns its output."""
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def coco(weights, folder, out, *more, code=0):
    options = ["--labels", folder / "label", "--instances", folder / "inst", "--out", out]
    return run(weights, *options, "--convention", "coco_stuff", *more, code=code)


def images_in(folder):
    """uint8 [height, width, 3] of each PNG by its name. Asserts that there are no other files."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in paths}


def by_hand(weights, folder, name, z=None):
    """One image as README computes it, rounded as in an image file."""
    generator = checkpoint.load(weights).fold_spectral_norm()
    maps = (Image.open(folder / kind / f"{name}.png") for kind in ("label", "inst"))
    labels, instances = (
        torch.from_numpy(np.array(one.resize((SIZE, SIZE), Image.Resampling.NEAREST))).long()[None]
        for one in maps
    )
    layout = SemanticLayout.from_labels(labels, 182, instances, dont_care=255)
    with torch.no_grad(), frozen(generator):
        image = generator(layout, z)[0]
    return ((image.movedim(0, -1) + 1) * 127.5).round().byte().numpy()


def names(samples=1):
    endings = [""] if samples == 1 else [f"-{number}" for number in range(samples)]
    return {f"{number:03}{ending}.png" for number in range(SCENES) for ending in endings}


def test_images_equal_those_of_a_direct_call(scenes, weights, tmp_path):
    words = coco(weights, scenes, tmp_path / "out")
    assert words == f"{SCENES} images in {tmp_path / 'out'}."
    found = images_in(tmp_path / "out")
    assert set(found) == names() and len({image.tobytes() for image in found.values()}) == SCENES
    for name, image in found.items():
        expected = by_hand(weights, scenes, name.removesuffix(".png"))
        assert np.array_equal(image, expected) and image.std() > 1


def test_weights_that_do_not_determine_the_network(scenes, weights, tmp_path):
    one, other = (dict(generator_of(ngf=ngf).state_dict()) for ngf in (2, 3))
    torch.save({"ema": one, "raw": other}, tmp_path / "both.pth")
    options = ("--crop-size", SIZE)
    words = coco(tmp_path / "both.pth", scenes, tmp_path / "out", *options, code=2)
    assert "there are several networks; key should name one of them" in words
    coco(tmp_path / "both.pth", scenes, tmp_path / "out", *options, "--key", "ema")
    found = images_in(tmp_path / "out")
    assert np.array_equal(found["003.png"], by_hand(weights, scenes, "003"))


def test_batches_differ_by_at_most_a_rounding(scenes, weights_with_z, tmp_path):
    for batch in (1, 4):
        coco(weights_with_z, scenes, tmp_path / str(batch), "--batch", batch, "--samples", 2)
    one, four = (images_in(tmp_path / batch) for batch in ("1", "4"))
    assert set(one) == set(four) == names(2)
    for name, image in one.items():
        assert np.abs(image.astype(int) - four[name]).max() <= 1


def test_samples_depend_on_seed_and_name_alone(scenes, weights_with_z, tmp_path):
    coco(weights_with_z, scenes, tmp_path / "three", "--samples", 3, "--seed", 5)
    three = images_in(tmp_path / "three")
    assert set(three) == names(3) and len({image.tobytes() for image in three.values()}) == 12
    styles = generation.Styles(3, (SIZE, SIZE), 3, seed=5)
    for number in range(3):
        expected = by_hand(weights_with_z, scenes, "002", styles("002", [number]))
        assert np.array_equal(three[f"002-{number}.png"], expected)
    alone = draw_folder(tmp_path / "alone", 1, first=2)
    coco(weights_with_z, alone, tmp_path / "two", "--samples", 2, "--seed", 5)
    for name, image in images_in(tmp_path / "two").items():
        assert np.array_equal(image, three[name])
    coco(weights_with_z, alone, tmp_path / "other", "--seed", 6)
    assert not np.array_equal(images_in(tmp_path / "other")["002.png"], three["002-0.png"])


def test_names_that_are_not_utf8(scenes, weights_with_z, tmp_path):
    name = os.fsdecode(b"bad\xff")
    for kind in ("label", "inst"):
        (tmp_path / kind).mkdir()
        for new in ("002.png", f"{name}.png"):
            shutil.copy(scenes / kind / "002.png", tmp_path / kind / new)
    coco(weights_with_z, tmp_path, tmp_path / "out", "--seed", 5)
    found = images_in(tmp_path / "out")
    assert set(found) == {"002.png", f"{name}.png"}
    assert not np.array_equal(found["002.png"], found[f"{name}.png"])  # their names give their z
    # The z of a name in UTF-8, of whatever letters, is that of its bytes.
    styles, random = generation.Styles(3, (SIZE, SIZE), seed=5), torch.Generator()
    digest = hashlib.blake2b("5 0 straße/☃".encode(), digest_size=7).digest()
    expected = torch.randn(3, generator=random.manual_seed(int.from_bytes(digest, "big")))
    assert torch.equal(styles("straße/☃", [0])[0], expected)


def test_an_encoder_in_train_mode_is_left_alone():
    encoder = ConvEncoder(2, 3).train()
    before, photograph = encoder.state_dict(), Image.new("RGB", (SIZE, SIZE), "red")
    before = {name: value.clone() for name, value in before.items()}
    first, again = (
        generation.moments_of(generation.encoder_of(encoder, 3), photograph, (SIZE, SIZE))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, again)) and encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_the_style_of_a_photograph(scenes, weights_with_z, tmp_path):
    torch.manual_seed(1)
    encoder, style = ConvEncoder(2, 3).eval(), scenes / "img" / "001.png"
    checkpoint.write(encoder, tmp_path / "encoder.pth")
    options = ("--style", style, "--encoder", tmp_path / "encoder.pth")
    coco(weights_with_z, scenes, tmp_path / "out", *options, "--samples", 2)
    found = images_in(tmp_path / "out")
    preparation = Preparation(182, 255, mode="fixed", crop_size=SIZE)
    _, photograph = preparation(read_labels(scenes / "label" / "001.png"), read_photograph(style))
    with torch.no_grad():
        z, _ = encoder(photograph)
    for name in ("000", "003"):
        expected = by_hand(weights_with_z, scenes, name, z)
        assert np.array_equal(found[f"{name}-0.png"], expected)
        assert not np.array_equal(found[f"{name}-1.png"], expected)
    lying, exif = on_its_side(Image.open(style))
    lying = save(lying, tmp_path / "lying.png", exif=exif)
    coco(weights_with_z, scenes, tmp_path / "upright", "--style", lying, *options[2:])
    assert np.array_equal(images_in(tmp_path / "upright")["000.png"], found["000-0.png"])
    words = coco(weights_with_z, scenes, tmp_path / "none", "--style", style, code=2)
    assert "style is given and encoder is not, both should be" in words
    options = ("--style", style, "--encoder", weights_with_z)
    words = coco(weights_with_z, scenes, tmp_path / "none", *options, code=2)
    assert "encoder is the weights of a SPADEGenerator" in words
    checkpoint.write(ConvEncoder(2, 4), tmp_path / "long.pth")
    options = ("--style", style, "--encoder", tmp_path / "long.pth")
    words = coco(weights_with_z, scenes, tmp_path / "none", *options, code=2)
    assert "encoder makes z of length 4, and the generator has z_dim 3" in words
    checkpoint.write(ConvEncoder(2, 3, input_nc=1), tmp_path / "grey.pth")
    options = ("--style", style, "--encoder", tmp_path / "grey.pth")
    words = coco(weights_with_z, scenes, tmp_path / "none", *options, code=2)
    assert "encoder takes 1 channels; it should take a photograph's 3" in words


def test_wrong_label_maps_are_named_and_the_others_generated(weights, tmp_path):
    folder = draw_folder(tmp_path / "own", 7)
    faults = [
        *ruined.truncated_labels(folder, "000"),
        *ruined.text(folder, "001"),
        *ruined.coloured(folder, "005"),
        *ruined.missing_instances(folder, "006"),
        "003.png: labels has a 200 in 2 pixels, first at row 3, column 5; it should have 0 to 181",
        "004.png: instances is 52 × 40, labels is 52 × 41: they should have the same size",
    ]
    ruined.out_of_range(folder, "003"), ruined.larger(folder, "004")
    words = coco(weights, folder, tmp_path / "out", code=1)
    assert all(fault in words for fault in faults) and f"{len(faults)} faults." in words
    assert "1 image in" in words and set(images_in(tmp_path / "out")) == {"002.png"}


def test_values_that_are_not_finite_are_refused(scenes, tmp_path):
    generator = generator_of()
    torch.nn.init.constant_(generator.conv_img.bias, float("nan"))
    checkpoint.write(generator, tmp_path / "generator.pth")
    words = coco(tmp_path / "generator.pth", scenes, tmp_path / "out", "--all-faults", code=1)
    assert "002.png: its image has values that are not finite" in words
    assert not images_in(tmp_path / "out")


def test_resume_skips_existing_images(scenes, weights_with_z, tmp_path):
    out = tmp_path / "out"
    coco(weights_with_z, scenes, out, "--samples", 2)
    before = images_in(out)
    (out / "001-1.png").unlink()
    Image.new("RGB", (1, 1)).save(out / "002-0.png")
    words = coco(weights_with_z, scenes, out, "--samples", 2, "--resume")
    assert words == f"1 image in {out}; 7 existed already."
    after = images_in(out)
    assert after.pop("002-0.png").shape == (1, 1, 3)
    assert all(np.array_equal(image, before[name]) for name, image in after.items())
    words = coco(weights_with_z, scenes, out, "--samples", 2)
    assert words == f"8 images in {out}."
    assert all(np.array_equal(image, before[name]) for name, image in images_in(out).items())


def generate_until_killed(weights, folder, out):
    """Generates in a process that is killed while the third file is written, before it has its
    final name.
    """
    torch.set_num_threads(1)
    replaced, replace = [], os.replace

    def killing(unfinished, path):
        replaced.append(path)
        if len(replaced) == 3:
            with open(unfinished, "rb+") as file:
                file.truncate(20)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(unfinished, path)

    writing.os.replace = killing
    coco(weights, folder, out)


def test_a_killed_process_leaves_no_partial_image(scenes, weights, tmp_path):
    out = tmp_path / "out"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["spade_fast.training", "drawn_data"])
    process = processes.Process(target=generate_until_killed, args=(weights, scenes, out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert any(UNFINISHED in path.name for path in out.iterdir())
    there = [path for path in out.glob("*") if not path.name.startswith(".")]
    assert len(there) >= 2 and all(np.asarray(Image.open(path)).size for path in there)
    words = coco(weights, scenes, out, "--resume")
    assert f"{len(there)} existed already" in words and set(images_in(out)) == names()


def test_a_full_disk_ends_the_command(scenes, weights, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in coco(weights, scenes, tmp_path / "out", code=2)
    assert not images_in(tmp_path / "out")


def test_a_runs_folder_provides_the_settings(scenes, folder, tmp_path):
    settings = settings_for(scenes, out=str(tmp_path / "run"), steps=1)
    path = train(Config(**settings))
    run(tmp_path / "run", "--labels", scenes / "label", "--out", tmp_path / "out")
    found = images_in(tmp_path / "out")
    assert set(found) == names()
    for name, image in found.items():
        assert np.array_equal(image, by_hand(path, scenes, name.removesuffix(".png")))
    options = ("--labels", folder / "label", "--out", tmp_path / "other")
    words = run(tmp_path / "run", *options, code=2)
    assert "instances should be given if it was trained with them" in words
    run(tmp_path / "run", *options, "--instances", folder / "inst")
    assert set(images_in(tmp_path / "other")) == names()
    path.unlink()
    words = run(tmp_path / "run", *options, code=2)
    assert "run has no generator.safetensors yet" in words
    words = run(scenes, *options, code=2)
    assert "has no config.yaml; it should be the folder of a run" in words
    files = {path.stem: path for path in (tmp_path / "out").iterdir()}
    assert origin(files) == {"average": "ema", "seed": 0}


def test_a_runs_encoder_is_used(scenes, tmp_path):
    settings = settings_for(scenes, out=str(tmp_path / "run"), steps=1, use_vae=True, z_dim=3)
    path, style = train(Config(**settings)), scenes / "img" / "001.png"
    options = ("--labels", scenes / "label", "--style", style)
    run(tmp_path / "run", *options, "--out", tmp_path / "out")
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000001.pt", weights_only=True)
    encoder = ConvEncoder(4, 3).eval()
    encoder.load_state_dict(state["trainer"]["networks"]["encoder"])
    z = generation.Styles(3, (SIZE, SIZE), style=style, encoder=encoder)("002", [0])
    assert np.array_equal(images_in(tmp_path / "out")["002.png"], by_hand(path, scenes, "002", z))
    settings = settings_for(scenes, out=str(tmp_path / "plain"), steps=1)
    train(Config(**settings))
    words = run(tmp_path / "plain", *options, "--out", tmp_path / "none", code=2)
    assert "style is given and encoder is not, both should be" in words


@pytest.mark.parametrize(
    "label_nc, maps, found",
    [
        (184, ("coco_stuff", 182, 255, "inst"), 182),
        (7, ("folder", None, None, None), 7),
        (7, ("folder", None, 255, None), 6),
        (7, ("folder", None, 255, "inst"), 5),
        (7, ("folder", 6, None, "inst"), 6),
        (151, ("ade20k", 150, 0, None), 150),
        (36, ("cityscapes", 35, None, None), 35),
        (35, ("cityscapes", 35, None, None), 35),
        (184, ("coco_stuff", 182, 255, None), "182 classes and don't care make 183: instances"),
        (182, ("coco_stuff", 182, 255, None), "make 183: num_classes, dont_care"),
        (2, ("folder", None, 255, "inst"), "don't care and edges of instances make 2"),
        (7, ("folder", 9, None, None), "the generator has 7 channels, and 9 classes make 9"),
    ],
)
def test_the_number_of_classes_follows_from_the_generator(label_nc, maps, found):
    convention, num_classes, dont_care, instances = maps
    maps = generation.Maps(convention, None, num_classes, dont_care, instances)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            generation.with_classes(maps, label_nc)
        return
    made = generation.with_classes(maps, label_nc)
    assert made.num_classes == found
    assert made.instances == (None if label_nc == 36 else instances or False)


def test_a_runs_numbers_are_those_of_its_convention(tmp_path):
    """In maps of another convention its don't care, 0, may be a class."""
    Config(convention="ade20k", num_classes=150, dont_care=0).save(tmp_path / "config.yaml")
    for convention, numbers in ((None, (150, 0)), ("ade20k", (150, 0)), ("folder", (None, None))):
        maps = generation._maps_of(Run(tmp_path), tmp_path, None, convention, None)
        assert (maps.num_classes, maps.dont_care) == numbers
        assert maps.convention == (convention or "ade20k")


def test_maps_in_colours_and_folders_of_folders(tmp_path):
    labels = tmp_path / "label" / "night"
    labels.mkdir(parents=True)
    numbers = np.arange(40 * 52).reshape(40, 52) // 700
    colours = np.array([[0, 0, 255], [9, 9, 9], [255, 0, 0]], np.uint8)
    Image.fromarray(colours[numbers]).save(labels / "a.png")
    (tmp_path / "palette.txt").write_text("0 0 255 0\n9 9 9 1\n255 0 0 2\n")
    generator = SPADEGenerator.official(3, crop_size=64, aspect_ratio=2.0, ngf=2, nhidden=4).eval()
    checkpoint.write(generator, tmp_path / "generator.pth")
    options = ("--labels", tmp_path / "label", "--palette", tmp_path / "palette.txt")
    run(tmp_path / "generator.pth", *options, "--out", tmp_path / "out")
    (image,) = images_in(tmp_path / "out").values()
    resized = np.asarray(
        Image.fromarray(numbers.astype(np.uint8)).resize((64, 32), Image.Resampling.NEAREST)
    )
    layout = SemanticLayout.from_labels(torch.from_numpy(resized.astype(int))[None], 3)
    generator.fold_spectral_norm()
    with torch.no_grad(), frozen(generator):
        expected = generator(layout)[0]
    expected = ((expected.movedim(0, -1) + 1) * 127.5).round().byte().numpy()
    assert (tmp_path / "out" / "night" / "a.png").is_file() and np.array_equal(image, expected)


def test_files_named_as_in_cityscapes(scenes, tmp_path):
    """Instance maps are beside the label maps, and names have other endings."""
    generator = SPADEGenerator.official(36, crop_size=32, ngf=2, nhidden=4)
    checkpoint.write(generator, tmp_path / "generator.pth")
    labels, instances = (tmp_path / kind / "aachen" for kind in ("label", "inst"))
    beside = tmp_path / "beside" / "aachen"
    for folder in (labels, instances, beside):
        folder.mkdir(parents=True)
    numbers = np.arange(40 * 52, dtype=np.uint16).reshape(40, 52)
    for folder, ending in ((labels, ""), (beside, "_gtFine_labelIds")):
        Image.fromarray((numbers // 80).astype(np.uint8)).save(folder / f"a{ending}.png")
    for folder, ending in ((instances, ""), (beside, "_gtFine_instanceIds")):
        Image.fromarray(numbers // 500 * 1000).save(folder / f"a{ending}.png")
    Image.fromarray(numbers.astype(np.uint8)).save(beside / "a_gtFine_color.png")
    options = (tmp_path / "generator.pth", "--out")
    run(*options, tmp_path / "one", "--labels", tmp_path / "beside", "--convention", "cityscapes")
    inst = ("--instances", tmp_path / "inst")
    run(*options, tmp_path / "two", "--labels", tmp_path / "label", *inst)
    one, two = (images_in(tmp_path / out) for out in ("one", "two"))
    assert set(one) == set(two) == {"aachen/a.png"}
    assert np.array_equal(one["aachen/a.png"], two["aachen/a.png"])
    run(*options, tmp_path / "none", "--labels", tmp_path / "label")
    assert not np.array_equal(images_in(tmp_path / "none")["aachen/a.png"], two["aachen/a.png"])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dtype", "float8"], "--dtype is 'float8'; it should be one of float32"),
        (["--device", "meta"], "--device is 'meta'; it should be a device of this machine"),
        (["--device", "toaster"], "--device is 'toaster'; it should be a device of this machine"),
        (["--preprocess", "shrink"], "--preprocess is 'shrink'; it should be one of"),
        (["--convention", "mapillary"], "--convention is 'mapillary'; it should be one of"),
        (["--samples", "2"], "--samples is 2; it should be 1: this generator begins with the cond"),
        (["--num-classes", "7"], "make 9: --num-classes, --dont-care and --instances should be as"),
        (["--palette", "/nowhere"], "--palette is /nowhere, which does not exist"),
    ],
)
def test_wrong_options_are_refused_before_any_work(scenes, weights, tmp_path, options, words):
    assert words in coco(weights, scenes, tmp_path / "out", *options, code=2)
    assert not (tmp_path / "out").exists()


def test_wrong_paths(scenes, weights, tmp_path):
    assert "does not exist" in coco(tmp_path / "none.pth", scenes, tmp_path / "out", code=2)
    (tmp_path / "text.pth").write_text("no weights")
    assert "not a file of weights" in coco(tmp_path / "text.pth", scenes, tmp_path / "out", code=2)
    checkpoint.write(ConvEncoder(2, 3), tmp_path / "encoder.pth")
    words = coco(tmp_path / "encoder.pth", scenes, tmp_path / "out", code=2)
    assert "weights are those of a ConvEncoder; they should be a generator's" in words
    words = coco(weights, tmp_path, tmp_path / "out", code=2)
    assert "label, which does not exist; it should be a folder" in words
    words = coco(weights, scenes, scenes / "label" / "out", code=2)
    assert "it should not be in the folder of labels" in words
    assert not (tmp_path / "out").exists() and not (scenes / "label" / "out").exists()


def test_half_precision_and_double(scenes, weights, tmp_path):
    for dtype in ("float32", "float64", "bfloat16"):
        coco(weights, scenes, tmp_path / dtype, "--dtype", dtype)
    single, double, half = (
        images_in(tmp_path / dtype)["001.png"].astype(int)
        for dtype in ("float32", "float64", "bfloat16")
    )
    assert np.abs(single - double).max() <= 1 and np.abs(half - double).mean() < 8
