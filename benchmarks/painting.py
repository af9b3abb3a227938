"""A picture for newcomers: a small generator's images of label maps that it was not trained on,
after some seconds of training. It is the generator that `spade-fast paint` trains when no weights
are given.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from spade_fast import Service
from spade_fast.data import paint
from spade_fast.layout import SemanticLayout
from spade_fast.paint.demo import SIZE, demo_classes, train_demo
from spade_fast.paint.scene import draw_scene
from spade_fast.training.pictures import picture

SHOWN = (1001, 1002, 1003, 1004, 1006)  # seeds of scenes that are not used in training
GAP = 8  # white pixels between pictures
LARGER = 2  # how many times each image is enlarged, along each axis


def save_painting(
    path: Path, steps: int, progress: Callable[[Iterable, int], Iterable] = lambda found, _: found
) -> None:
    """Trains the generator for `steps` steps, and writes a PNG with label maps in their classes'
    colours above the generator's images of them.
    """
    classes = demo_classes()
    colours = np.array([one.colour for one in classes.listed], np.uint8)
    scenes = [draw_scene((SIZE, SIZE), seed) for seed in SHOWN]
    with Service(train_demo(steps=steps, progress=progress)) as service:
        images = [
            picture(service.generate(SemanticLayout.from_labels(scene[None], len(colours)))[0])
            for scene in scenes
        ]
    rows = [_side_by_side(row) for row in ([paint(scene, colours) for scene in scenes], images)]
    drawn = np.concatenate([rows[0], np.full_like(rows[0][:GAP], 255), rows[1]])
    Image.fromarray(drawn.repeat(LARGER, 0).repeat(LARGER, 1)).save(path)


def _side_by_side(images):
    between = np.full_like(images[0][:, :GAP], 255)
    return np.concatenate([part for image in images for part in (image, between)][:-1], axis=1)
