"""A folder of drawn scenes to train on: label maps, instance maps, and photographs painted in the
classes' colours.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from benchmarks import layouts
from spade_fast.cli import app

HEIGHT, WIDTH = 40, 52
CLASSES, DONT_CARE = 12, 255  # of `drawn`


def draw_folder(folder, count=4, first=0):
    """Writes `count` scenes to the folder's subfolders label, inst and img. Returns its path."""
    folder = Path(folder)
    for kind in ("label", "inst", "img"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(3).integers(40, 216, (256, 3))
    light = np.linspace(1.15, 0.8, HEIGHT)[:, None, None]
    for seed in range(first, first + count):
        labels, instances = layouts.resized(*layouts.draw_scene(seed), (HEIGHT, WIDTH))
        painted = np.clip(colours[labels] * light, 0, 255).astype(np.uint8)
        Image.fromarray(labels.astype(np.uint8)).save(folder / "label" / f"{seed:03}.png")
        Image.fromarray(instances.astype(np.uint8)).save(folder / "inst" / f"{seed:03}.png")
        Image.fromarray(painted).save(folder / "img" / f"{seed:03}.png")
    return folder


def settings_for(folder, **others):
    """Settings of a run on such a folder that takes seconds."""
    small = dict(
        labels=str(folder / "label"),
        images=str(folder / "img"),
        instances=str(folder / "inst"),
        convention="coco_stuff",
        crop_size=32,
        ngf=2,
        ndf=4,
        nhidden=4,
        perceptual=False,
        tensorboard=False,
        workers=0,
        batch=2,
        steps=4,
        pictures=2,
    )
    return small | others


def words_of(**settings):
    """The options of `train` for these settings. None leaves a setting out."""
    words = ["train"]
    for name, value in settings.items():
        name = name.lower().replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def command(**settings):
    """Runs `spade-fast train` with these settings as options, and returns its result."""
    return CliRunner().invoke(app, words_of(**settings))


def save(array, path, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **settings)
    return path


def drawn(height, width, seed=0):
    """Draws rectangles: labels, a photograph, instances."""
    numbers = np.random.default_rng(seed)
    labels = np.full((height, width), DONT_CARE, np.uint8)
    instances = np.zeros((height, width), np.uint8)
    for number in range(6):
        top, left = numbers.integers(height - 4), numbers.integers(width - 4)
        part = np.s_[top : top + height // 2, left : left + width // 2]
        labels[part], instances[part] = numbers.integers(CLASSES), number + 1
    return labels, numbers.integers(0, 256, (height, width, 3), np.uint8), instances
