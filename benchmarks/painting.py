"""A picture for a newcomer: what a generator makes of layouts that it has never seen, after a
minute of training.

No photographs come with the project, so it learns to paint: a colour for each class, lighter
towards the top, and dark outlines.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F

from spade_fast import SemanticLayout, SPADEGenerator

from . import layouts
from .picture import CLASSES, INK

SIZE = 128
LEARNT = 1000  # scenes that it learns from, over and over
SHOWN = (1001, 1002, 1003)  # and others


def save_painting(path, seconds, progress=lambda step, loss: None):
    """Trains a small generator for these seconds, and draws three layouts above what it makes of
    them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generator = train(seconds, progress)
    figure, panels = plt.subplots(
        2, len(SHOWN), figsize=(9, 6.2), facecolor="white", layout="constrained"
    )
    for seed, (above, below) in zip(SHOWN, panels.T):
        layout, _ = example(seed)
        with torch.no_grad():
            image = generator(layout)[0]
        for panel, pixels in (
            (above, random_colours(layout)),
            (below, image.movedim(0, -1).numpy() / 2 + 0.5),
        ):
            panel.imshow(pixels, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
    for panel, text in zip(panels[:, 0], ("layout", "image")):
        panel.set_ylabel(text, fontsize=11, weight="bold", color=INK)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def train(seconds, progress):
    torch.manual_seed(0)
    generator = SPADEGenerator.official(
        CLASSES + 2, ngf=8, nhidden=32, crop_size=SIZE, norm_G="spadeinstance3x3"
    )
    optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
    began, step = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        layout, image = example(step % LEARNT)
        loss = F.l1_loss(generator(layout), image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress(step, loss.item())
    return generator.eval()


def example(seed):
    """A drawn scene's layout, and the painting of it, [1, 3, SIZE, SIZE] between −1 and 1."""
    labels, instances = layouts.resized(*layouts.draw_scene(seed), (SIZE, SIZE))
    layout = SemanticLayout.from_labels(labels[None], CLASSES, instances[None], dont_care=255)
    painting = class_colours()[np.where(labels == 255, CLASSES, labels)]
    painting = painting * np.linspace(1.15, 0.75, SIZE)[:, None, None]  # light comes from above
    edges = layout.palette[layout.codes[0].long(), CLASSES + 1].numpy()
    painting = np.clip(painting * (1 - 0.7 * edges[..., None]), 0, 1)
    return layout, torch.from_numpy(painting).float().movedim(-1, 0)[None] * 2 - 1


def class_colours():
    """A colour for each class, and grey for no label: [classes + 1, 3], from 0 to 1."""
    from matplotlib.colors import hsv_to_rgb

    generator = np.random.default_rng(3)
    hue, saturation, value = (
        generator.random(CLASSES),
        generator.uniform(0.3, 0.7, CLASSES),
        generator.uniform(0.55, 0.95, CLASSES),
    )
    return np.concatenate(
        [hsv_to_rgb(np.stack([hue, saturation, value], axis=1)), np.full((1, 3), 0.8)]
    )


def random_colours(layout):
    """The layout's numbers as shades that say nothing of the painting: [SIZE, SIZE, 3]."""
    shades = np.random.default_rng(0).permutation(len(layout.palette)) / max(
        1, len(layout.palette) - 1
    )
    return np.repeat(0.25 + 0.7 * shades[layout.codes[0].numpy()][..., None], 3, axis=-1)
