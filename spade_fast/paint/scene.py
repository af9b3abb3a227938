"""Drawn scenes: hills by the sea, with trees and houses under the sun."""

import numpy as np

from .classes import Classes, named

SKY, SUN, HILL, SEA, SAND, GRASS, TREE, HOUSE = range(8)
# The name of each, then words that find a class for it in other data sets, the best first.
WORDS = {
    SKY: ("sky",),
    SUN: ("sun", "clouds", "sky"),
    HILL: ("hill", "mountain", "terrain"),
    SEA: ("sea", "water", "road"),
    SAND: ("sand", "sidewalk", "ground"),
    GRASS: ("grass", "terrain", "ground"),
    TREE: ("tree", "vegetation", "plant"),
    HOUSE: ("house", "building"),
}


def draw_scene(size: tuple[int, int], seed: int) -> np.ndarray:
    """A scene of the numbers above, uint8 [height, width], which depends on the seed."""
    random = np.random.default_rng(seed)
    y, x = _places(size)
    scene = np.full(size, SKY, np.uint8)
    scene[_ball(x, y, random.uniform(0.1, 0.9), random.uniform(0.08, 0.22), 0.07)] = SUN
    horizon = random.uniform(0.45, 0.6)
    scene[y > horizon - _waves(x, random, 0.22)] = HILL
    scene[y > horizon] = SEA
    shore = horizon + random.uniform(0.12, 0.25) + random.uniform(-0.3, 0.3) * (x - 0.5)
    shore = shore + _waves(x, random, 0.05)
    scene[y > shore] = SAND
    scene[y > shore + random.uniform(0.05, 0.12)] = GRASS
    for _ in range(random.integers(0, 3)):
        _draw_house(scene, x, y, random)
    for _ in range(random.integers(1, 5)):
        _draw_tree(scene, x, y, random)
    return scene


def opening_scene(classes: Classes, size: tuple[int, int], seed: int = 7) -> np.ndarray:
    """A scene in a generator's own classes, int64 [height, width]. Each thing gets the class whose
    name fits, or if no name does, one of all the classes in turn.
    """
    others = [one.number for one in classes.listed if one.number != classes.dont_care]
    numbers = [
        _named(classes, words, others[thing % len(others)]) for thing, words in WORDS.items()
    ]
    return np.array(numbers)[draw_scene(size, seed)]


def _named(classes, words, otherwise):
    found = (named(classes.listed, word) for word in words)
    return next((one.number for one in found if one is not None), otherwise)


def _places(size):
    """The row and the column of each pixel's centre, from 0 to 1."""
    return [places / length for places, length in zip(np.mgrid[: size[0], : size[1]] + 0.5, size)]


def _ball(x, y, middle, height, radius):
    return (x - middle) ** 2 + (y - height) ** 2 < radius**2


def _waves(x, random, height):
    """A smooth curve over the width, with values from 0 to about `height`."""
    waves = sum(
        np.sin(2 * np.pi * (often * x + random.random())) / often
        for often in random.uniform(0.6, 3.0, 3)
    )
    return height * (0.5 + waves / 5).clip(0, 1)


def _draw_tree(scene, x, y, random):
    middle, foot = random.uniform(0.05, 0.95), random.uniform(0.75, 0.95)
    height = random.uniform(0.15, 0.35)
    scene[(abs(x - middle) < 0.02) & (y < foot) & (y > foot - height)] = TREE
    for _ in range(4):
        aside, up = random.uniform(-0.06, 0.06), random.uniform(-0.05, 0.05)
        scene[_ball(x, y, middle + aside, foot - height + up, random.uniform(0.06, 0.1))] = TREE


def _draw_house(scene, x, y, random):
    middle, foot = random.uniform(0.15, 0.85), random.uniform(0.7, 0.9)
    width, height = random.uniform(0.08, 0.13), random.uniform(0.1, 0.18)
    is_roof = (y <= foot - height) & (y > foot - 1.7 * height)
    slope = 1.15 * width * (y - (foot - 1.7 * height)) / (0.7 * height)
    is_wall = (abs(x - middle) < width) & (y < foot) & (y > foot - height)
    scene[is_wall | (is_roof & (abs(x - middle) < slope))] = HOUSE
