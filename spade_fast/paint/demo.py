"""A small generator that learns to paint drawn scenes in seconds, for users without weights."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..data.dataset import Example, collate
from ..layout import SemanticLayout
from ..nn import SPADEGenerator
from ..training import Config, Trainer
from ..training.average import settled
from .classes import NATURAL, Class, Classes
from .scene import GRASS, HILL, HOUSE, SAND, SEA, SKY, SUN, TREE, WORDS, draw_scene

SIZE = 128
SCENES = 24
# The colour of each class in photographs, at the top and at the bottom of the picture.
LOOKS = {
    SKY: ((60, 120, 215), (235, 215, 200)),
    SUN: ((255, 246, 200), (255, 225, 150)),
    HILL: ((105, 125, 160), (70, 95, 90)),
    SEA: ((110, 165, 190), (15, 60, 110)),
    SAND: ((240, 220, 170), (190, 150, 95)),
    GRASS: ((150, 180, 80), (50, 95, 35)),
    TREE: ((65, 115, 50), (20, 50, 25)),
    HOUSE: ((170, 60, 45), (245, 225, 205)),
}
# The strength of the noise in each class, of 255.
GRAIN = {SKY: 3, SUN: 0, HILL: 8, SEA: 14, SAND: 8, GRASS: 16, TREE: 22, HOUSE: 5}


def demo_classes() -> Classes:
    """The classes of the drawn scenes."""
    listed = tuple(Class(each, words[0], NATURAL[words[0]]) for each, words in WORDS.items())
    return Classes(listed, len(listed))


def train_demo(
    *,
    size: int = SIZE,
    steps: int = 140,
    seed: int = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda found, count: found,
) -> SPADEGenerator:
    """A generator in eval mode, trained on drawn scenes in memory: nothing is written.

    Args:
        size: the height and the width of its images, in pixels.
        steps: the number of training steps.
        seed: the seed of the scenes and the networks.
        progress: a progress bar: a function of an iterable of steps and of their number, that
            returns the iterable.

    Errors: ModuleNotFoundError if Accelerate is not installed.
    """
    config = Config(
        num_classes=len(WORDS),
        crop_size=size,
        ngf=6,
        ndf=8,
        nhidden=16,
        norm_G="spectralspadeinstance3x3",
        init_gain=1.0,
        perceptual=False,
        scales=1,
        lr_generator=2e-3,
        lr_discriminator=2e-4,
        weight_adversarial=0.1,
        ema=0.9,
        batch=2,
        steps=steps,
        seed=seed,
    )
    trainer = Trainer(config)
    generator = trainer.networks.generator
    examples = [_example(size, seed * SCENES + number) for number in range(SCENES)]
    numbers = np.random.default_rng(seed).integers(0, SCENES, (2 * steps + 2, trainer.images))
    batches = (
        collate(
            [examples[number] for number in chosen],
            generator.sizes,
            generator.kernel_size,
            config.scales,
        )
        for chosen in numbers
    )
    for _ in progress(trainer.fit(batches), steps):
        pass
    return settled(trainer.average, generator)


def photograph(scene: np.ndarray, seed: int) -> np.ndarray:
    """A photograph of a drawn scene, uint8 [height, width, 3]. Each class has a colour that changes
    from the top of the picture to the bottom, and grain.
    """
    random = np.random.default_rng(seed)
    top, foot, grain = (
        np.array([table[each] for each in WORDS], float)[scene]
        for table in (
            {each: look[0] for each, look in LOOKS.items()},
            {each: look[1] for each, look in LOOKS.items()},
            GRAIN,
        )
    )
    height = np.linspace(0, 1, len(scene))[:, None, None]
    noise = random.standard_normal(scene.shape)
    noise += np.roll(noise, 1, axis=1)  # grain is wider than high
    shade = np.roll(scene != np.roll(scene, 2, axis=1), 1, axis=1) * (scene > SUN) * 25
    painted = top + (foot - top) * height + (noise * grain - shade)[..., None]
    return painted.clip(0, 255).astype(np.uint8)


def _example(size, seed):
    scene = draw_scene((size, size), seed)
    image = torch.from_numpy(photograph(scene, seed)).movedim(-1, 0)[None].float() / 127.5 - 1
    return Example(SemanticLayout.from_labels(scene[None], len(WORDS)), image, str(seed))
