"""Colours for classes: a class has the same colour in every picture."""

import functools

import numpy as np
import torch

LEVELS = 16  # values of each channel among the candidate colours
DARKEST = 0.45  # lightness in OKLab: darker colours look like black
# From linear RGB to the responses of the eye's cones, and from their cube roots to lightness and
# two opponent axes: OKLab (Ottosson 2020), where distances are roughly as the eye perceives them.
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
AXES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def colours(count: int) -> np.ndarray:
    """A colour for each of `count` classes, uint8 [count, 3]; a smaller count gives the first rows
    of a larger one. Each colour looks as different as possible from those before it and from white.
    Dark colours are not used. After some thousand classes the colours repeat.
    """
    return np.resize(_chosen(count), (count, 3))


def paint(labels: np.ndarray | torch.Tensor, colours: np.ndarray) -> np.ndarray:
    """The picture, uint8 [height, width, 3], of whole numbers [height, width] that are rows of
    colours. Errors: ValueError if a number is not a row.
    """
    labels = np.asarray(labels)
    if labels.size and not (0 <= labels.min() and labels.max() < len(colours)):
        raise ValueError(
            f"labels has numbers from {labels.min()} to {labels.max()}; they should be 0 to"
            f" {len(colours) - 1}: colours has a row for each of these"
        )
    return colours[labels]


@functools.lru_cache(maxsize=8)
def _chosen(count):
    steps = np.linspace(0, 255, LEVELS).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    seen = _seen(candidates)
    candidates, seen = (colours[seen[:, 0] > DARKEST] for colours in (candidates, seen))
    places, distances = [len(seen) - 1], np.inf  # white
    while len(places) <= min(count, len(seen) - 1):
        distances = np.minimum(distances, ((seen - seen[places[-1]]) ** 2).sum(1))
        places.append(int(distances.argmax()))
    return candidates[places[1:]]


def _seen(colours):
    """Colours, uint8 [count, 3], in OKLab."""
    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ CONES.T) @ AXES.T
