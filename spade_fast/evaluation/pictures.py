"""Reads the files that are evaluated, one after another, and records them in the protocol."""

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

from ..arguments import counted
from ..data.allowed import Allowed
from ..data.files import Palette, opened, read_labels, read_photograph
from ..data.pairs import MOST_LISTED, encoded
from ..generation import ORIGIN
from .segmentation import IGNORED

SAYS = ("average", "seed")  # the keys of an origin: "ema" or "raw", and a number


class Seen:
    """Collects facts about a folder while its files are read: their number, names and sizes, and a
    SHA-256 of names and values as they are evaluated.
    """

    def __init__(self) -> None:
        self.names, self.sizes = hashlib.sha256(), Counter[str]()
        self.values, self.count = hashlib.sha256(), 0

    def add(self, name: str, size: tuple[int, int], values: np.ndarray) -> None:
        self.count += 1
        self.names.update(encoded(f"{name}\n"))
        self.sizes[f"{size[0]} × {size[1]}"] += 1
        self.values.update(encoded(f"{name} {values.dtype} {list(values.shape)}\n"))
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
    """Names, and images as uint8 [3, H, W]. With a size, a width and a height, Pillow resizes them
    bicubically. Errors: ValueError, which names the file.
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
    size: the width and the height that Pillow resizes them to, by nearest neighbour, or None.
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
        """The label map of an image with the given height and width. Errors: ValueError, which
        names the file.
        """
        path = self.files[name]
        numbers = read_labels(path, self.palette)
        if wrong := self.allowed.fault(numbers):
            raise ValueError(f"{path} has {wrong}")
        labels = numbers + self.allowed.shift
        labels[numbers == self.allowed.dont_care] = IGNORED
        own = labels.shape[::-1]
        if self.size is not None and own != self.size:
            resized = Image.fromarray(labels.astype(np.int32))
            labels = np.asarray(resized.resize(self.size, Image.Resampling.NEAREST), np.int64)
        if labels.shape != tuple(shape):
            raise ValueError(
                f"{image} is {shape[1]} × {shape[0]}, {path} is {own[0]} × {own[1]}: they should"
                " have the same size, or size should be given, to resize both"
            )
        self.seen.add(name, own, labels)
        return torch.tensor(labels)


def partners(
    generated: dict[str, Path], labels: dict[str, Path], images_in: Path, labels_in: Path
) -> dict[str, str]:
    """The name of each generated image's label map: the image's name, or the part before "-K" if
    the image is one of several samples. Errors: ValueError if a file has no partner.
    """
    # Sample 0 of "a" has the name of a label map "a-0".
    are_samples = not labels.keys() <= generated.keys()
    found = {name: _partner(name, labels, are_samples) for name in generated}
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
            f"{counted(len(faults), 'file')} without a partner: {'; '.join(faults[:MOST_LISTED])}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return found


def origin(files: dict[str, Path]) -> dict[str, Any]:
    """What generated images say about their generator, in the PNG text "spade_fast", a JSON object:
    "average" ("ema" or "raw") and "seed", each None if it is not there.

    Errors: ValueError if the images say different things.
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
        said = json.loads(opened(path, lambda image: image.info.get(ORIGIN, "{}")))
        return {name: said.get(name) for name in SAYS}
    except (OSError, ValueError, TypeError, AttributeError):
        return dict.fromkeys(SAYS)  # a file that is not an image is refused when it is read


def _partner(name, labels, are_samples):
    """The name of the label map that an image with this name was generated from, or None.

    are_samples: whether a name that can be read in both ways is that of a sample.
    """
    stem = re.sub(r"-\d+$", "", name)
    names = (stem, name) if are_samples else (name, stem)
    return next((one for one in names if one in labels), None)
