"""The files that are evaluated, read one after another, and what the protocol says of them."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.check import Allowed, counts_of, words_of_wrong
from ..data.files import Palette, read_labels, read_photograph
from ..data.pairs import MOST_LISTED
from ..generation import ORIGIN
from .segmentation import IGNORED

SAYS = ("average", "seed")  # what it may say: "ema" or "raw", and a number


class Seen:
    """The facts about a folder while its files are read: how many there are, their names, their
    sizes, and a SHA-256 of names and values as they are evaluated.
    """

    def __init__(self) -> None:
        self.names, self.sizes = hashlib.sha256(), Counter[str]()
        self.values, self.count = hashlib.sha256(), 0

    def add(self, name: str, size: tuple[int, int], values: np.ndarray) -> None:
        self.count += 1
        self.names.update(f"{name}\n".encode())
        self.sizes[f"{size[0]} × {size[1]}"] += 1
        self.values.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        self.values.update(np.ascontiguousarray(values).data)

    @property
    def sha256(self) -> str:
        return self.values.hexdigest()

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "images": self.count,
            "names_sha256": self.names.hexdigest(),
            "sizes": [f"{size}: {count}" for size, count in sorted(self.sizes.items())],
        }


def images(
    files: dict[str, Path], size: tuple[int, int] | None, seen: Seen
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names, and images as uint8 [3, H, W]; size is a width and a height that they are resized to,
    bicubically as Pillow does. Errors: ValueError, which names the file.
    """
    for name, path in files.items():
        image = read_photograph(path)
        own = image.size
        if size is not None and own != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        values = np.asarray(image)
        seen.add(name, own, values)
        yield name, torch.from_numpy(values.transpose(2, 0, 1).copy())


class LabelMaps:
    """Label maps as int64 [H, W], from 0 to num_classes − 1, or IGNORED for "don't care".

    files: the label map of each generated image, by the image's name.
    size: a width and a height that they are resized to, by nearest neighbour as Pillow does.
    """

    def __init__(
        self,
        files: dict[str, Path],
        allowed: Allowed,
        palette: Palette | None,
        size: tuple[int, int] | None,
    ) -> None:
        self.files, self.allowed, self.palette, self.size = files, allowed, palette, size
        self.seen = Seen()

    def __call__(self, name: str, image: Path, shape: tuple[int, int]) -> torch.Tensor:
        """The label map of an image with that height and width. Errors: ValueError, which names the
        file.
        """
        path = self.files[name]
        numbers = read_labels(path, self.palette)
        counts = counts_of(numbers)
        wrong = [number for number in counts if number not in self.allowed]
        if wrong:
            raise ValueError(f"{path} has {words_of_wrong(numbers, counts, wrong, self.allowed)}")
        labels = numbers + self.allowed.shift
        labels[numbers == self.allowed.dont_care] = IGNORED
        own = labels.shape[::-1]
        if self.size is not None and own != self.size:
            resized = Image.fromarray(labels.astype(np.int32))
            labels = np.asarray(resized.resize(self.size, Image.Resampling.NEAREST), np.int64)
        if labels.shape != tuple(shape):
            raise ValueError(
                f"{image} is {shape[1]} × {shape[0]}, {path} is {own[0]} × {own[1]}: they should be"
                " of one size, or size should be one to resize both to"
            )
        self.seen.add(name, own, labels)
        return torch.tensor(labels)


def partners(
    generated: dict[str, Path], labels: dict[str, Path], images_in: Path, labels_in: Path
) -> dict[str, str]:
    """The name of the label map of each generated image, which is its own, or the one before "-K"
    where it is one of several samples. Errors: ValueError where one has no partner.
    """
    found = {name: _partner(name, labels) for name in generated}
    faults = [
        f"{generated[name]} has no label map in {labels_in}"
        for name, label in found.items()
        if label is None
    ]
    faults += [
        f"{labels[name]} has no image in {images_in}"
        for name in sorted(labels.keys() - set(found.values()))
    ]
    if faults:
        more = len(faults) - MOST_LISTED
        raise ValueError(
            f"{len(faults)} files have no partner: {'; '.join(faults[:MOST_LISTED])}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return found


def origin(files: dict[str, Path]) -> dict[str, Any]:
    """What generated images say of their generator in PNG's text "spade_fast", a JSON object:
    "average", "ema" or "raw", and "seed"; None each where they say nothing.

    Errors: ValueError where they say different things.
    """
    first, said = None, None
    for path in files.values():
        found = _origin(path)
        if said not in (None, found):
            raise ValueError(
                f"generated has images of several generators: {first} says {json.dumps(said)} and"
                f" {path} {json.dumps(found)}"
            )
        first, said = first or path, found
    return said or dict.fromkeys(SAYS)


def _origin(path):
    try:
        with Image.open(path) as image:
            said = json.loads(image.info.get(ORIGIN, "{}"))
        return {name: said.get(name) for name in SAYS}
    except (OSError, ValueError, TypeError, AttributeError):
        return dict.fromkeys(SAYS)  # reading refuses it if it is no image


def _partner(name, labels):
    """The label map that an image with this name was made of, or None."""
    if name in labels:
        return name
    stem = re.sub(r"-\d+$", "", name)
    return stem if stem in labels else None
