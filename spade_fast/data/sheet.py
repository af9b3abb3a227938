"""The contact sheet of `check-data`: photographs beside their labels in colours."""

import math
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import ImageDraw, ImageFont

from ..codes import instance_edges
from ..writing import written
from .colours import colours, paint
from .files import Image

MOST_SHOWN = 12
SIDE, GAP, LINE = 240, 12, 18  # pixels: a picture's longer side, a gap, a line of text
KEY = 120  # pixels: the width of an entry of the key
WHITE, GREY, BLACK, RED = (255,) * 3, (238,) * 3, (0,) * 3, (255, 0, 0)
LEAST_NUMBERED = 0.01  # share of a picture above which a class gets its number


class Shown(NamedTuple):
    """A pair at the size of its picture; edges is None without instances."""

    name: str
    photograph: Image.Image
    labels: np.ndarray
    edges: np.ndarray | None

    @classmethod
    def of(
        cls,
        name: str,
        photograph: Image.Image,
        labels: np.ndarray,
        instances: np.ndarray | None,
    ) -> "Shown":
        """Resizes a pair's photograph, labels and instances to the size of a picture."""
        maps = [labels] if instances is None else [labels, instances]
        labels, *others = (_small(numbers) for numbers in maps)
        edges = None
        if others:
            edges = instance_edges(torch.from_numpy(others[0])[None])[0].numpy() > 0
        if edges is not None and edges.shape != labels.shape:
            edges = None  # the sizes differ, which the check reports as a fault
        scale = SIDE / max(photograph.size)
        width, height = (max(1, round(length * scale)) for length in photograph.size)
        size = width, height
        return cls(name, photograph.resize(size, Image.Resampling.LANCZOS), labels, edges)


class Counted(Protocol):
    """The facts of a data set that the sheet shows."""

    pairs: int
    num_classes: int
    dont_care: int | None
    label_shift: int


def draw(path: Path, pictures: list[Shown], report: Counted) -> None:
    """Writes the sheet: two pairs in each row, and a key with the colour of each class in them."""
    shade = np.concatenate([colours(report.num_classes), [BLACK, RED]]).astype(np.uint8)
    painted, present = [], set[int]()
    for picture in pictures:
        places = _places(picture.labels, report)
        present.update(np.unique(places).tolist())
        painted.append(paint(places, shade))
        if picture.edges is not None:
            painted[-1][picture.edges] = WHITE
    entries = [(shade[place], _words(place, report)) for place in sorted(present)]
    if any(picture.edges is not None for picture in pictures):
        entries.append((np.array(WHITE), "edge of an instance"))
    cell = 2 * SIDE + GAP
    width = 2 * cell + 3 * GAP
    across = (width - GAP) // KEY
    tops = [2 * LINE + GAP]  # of each row of pairs, and of the key
    for number in range(0, len(pictures), 2):
        tallest = max(picture.photograph.height for picture in pictures[number : number + 2])
        tops.append(tops[-1] + LINE + tallest + GAP)
    height = tops[-1] + LINE * (1 + math.ceil(len(entries) / across)) + GAP
    sheet = Image.new("RGB", (width, height), GREY)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    pen.text(
        (GAP, GAP),
        f"{len(pictures)} of {report.pairs} pairs: each photograph, and on its right its label map"
        " with a colour and a number for each class",
        BLACK,
        font,
    )
    for number, (picture, image) in enumerate(zip(pictures, painted)):
        left, above = GAP + number % 2 * (cell + GAP), tops[number // 2]
        pen.text((left, above), picture.name[-70:], BLACK, font)
        sheet.paste(picture.photograph, (left, above + LINE))
        left, above = left + SIDE + GAP, above + LINE
        sheet.paste(Image.fromarray(image), (left, above))
        for label, (row, column) in _middles(_places(picture.labels, report), report).items():
            place = left + column, above + row
            pen.text(place, str(label), BLACK, font, "mm", stroke_width=2, stroke_fill=WHITE)
    pen.text((GAP, tops[-1]), "The classes in these label maps:", BLACK, font)
    for number, (colour, words) in enumerate(entries):
        left, above = GAP + number % across * KEY, tops[-1] + LINE * (1 + number // across)
        pen.rectangle((left, above, left + 14, above + 12), tuple(colour.tolist()), BLACK)
        pen.text((left + 20, above), words, BLACK, font)
    with written(path) as unfinished:
        sheet.save(unfinished)


def _middles(places, report):
    """A pixel in the middle of each class that is large enough in a picture to be numbered."""
    found = {}
    for label, count in zip(*np.unique(places, return_counts=True)):
        if label < report.num_classes and count > LEAST_NUMBERED * places.size:
            pixels = np.argwhere(places == label)
            nearest = ((pixels - pixels.mean(0)) ** 2).sum(1).argmin()
            found[int(label)] = pixels[nearest].tolist()
    return found


def _places(labels, report):
    """Each pixel's row in the colours: its class, then "don't care", then "out of range"."""
    places = labels + report.label_shift
    places[(places < 0) | (places >= report.num_classes)] = report.num_classes + 1
    if report.dont_care is not None:
        places[labels == report.dont_care] = report.num_classes
    return places


def _words(place, report):
    if place == report.num_classes:
        return "don't care"
    return "out of range" if place > report.num_classes else f"{place}"


def _small(numbers):
    """A map resized by nearest neighbour to a longer side of SIDE."""
    scale = SIDE / max(numbers.shape)
    size = [max(1, round(length * scale)) for length in numbers.shape]
    rows, columns = (
        ((np.arange(wanted) + 0.5) * length / wanted).astype(int)
        for wanted, length in zip(size, numbers.shape)
    )
    return numbers[np.ix_(rows, columns)]
