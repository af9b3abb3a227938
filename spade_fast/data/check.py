"""The checks of `spade-fast check-data`: they find faults in the data before they ruin a run."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..arguments import counted, whole_number
from ..writing import check_writable
from .allowed import Allowed, counts_of
from .faults import words_of
from .files import Palette, read_labels, read_orientation, read_photograph
from .pairs import MOST_LISTED, Pair, convention_of, match
from .sheet import MOST_SHOWN, Shown, draw

FILLED = (255, 65535)  # all bits set: data sets mark pixels without a class with these
RARE = 0.001  # the share of all pixels up to which labels far above the others may be mistakes


@dataclass
class Report:
    """The contents of the folders.

    pairs: how many complete pairs there are.
    faults: a line for each fault.
    notes: a line for each thing that is unusual but may be right.
    pixels, images: the number of pixels and of label maps with each label, by the label as it is
        in the files.
    num_classes, dont_care: as given, or as the labels suggest, without those that may be mistakes;
        label_shift: the convention's.
    sizes: each width and height that photographs have, with the first such file.
    """

    pairs: int
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pixels: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    num_classes: int = 1
    dont_care: int | None = None
    label_shift: int = 0
    sizes: dict[tuple[int, int], Path] = field(default_factory=dict)

    @property
    def shortest(self) -> int:
        """The shortest side of any photograph in pixels, 0 if none can be read."""
        return min(map(min, self.sizes), default=0)

    @property
    def classes(self) -> dict[int, tuple[int, int]]:
        """The pixels and images of each class that occurs; "don't care" is num_classes."""
        found = {}
        for number in sorted(self.pixels):
            place = number + self.label_shift
            if number == self.dont_care:
                place = self.num_classes
            elif not 0 <= place < self.num_classes:
                continue
            found[place] = self.pixels[number], self.images[number]
        return dict(sorted(found.items()))

    @property
    def outside(self) -> list[int]:
        """The labels that occur, but are neither a class nor "don't care"."""
        allowed = Allowed(self.num_classes, self.dont_care, self.label_shift)
        return sorted(number for number in self.pixels if number not in allowed)


class Seen(NamedTuple):
    """The contents of the files of one pair."""

    faults: list[str]
    counts: dict[int, int]
    size: tuple[int, int] | None
    shown: Shown | None


def check_data(
    labels: str | os.PathLike,
    images: str | os.PathLike,
    instances: str | os.PathLike | Literal[False] | None = None,
    *,
    convention: str = "folder",
    palette: Palette | None = None,
    num_classes: int | None = None,
    dont_care: int | None = None,
    sheet: str | os.PathLike | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda found, count: found,
) -> Report:
    """Reads all files of a data set and reports every fault.

    Args:
        labels, images, instances, convention: as in `find_pairs`.
        palette: the class of each colour, if label maps are colour-coded.
        num_classes, dont_care: by default the convention's, or else suggested by the labels.
        sheet: a PNG to write, with some of the photographs beside their labels in colours.
        progress: called with the pairs and their number, returns the same pairs: a progress bar.

    Errors: ValueError if a folder does not exist or has no files, an argument is not as described,
        or the sheet cannot be written.
    """
    rules = convention_of(convention)
    if num_classes is not None:
        num_classes = whole_number("num_classes", num_classes, least=1)
    if dont_care is not None:
        dont_care = whole_number("dont_care", dont_care)
    if sheet is not None:
        sheet = Path(sheet)
        if sheet.suffix.lower() != ".png":
            raise ValueError(f"sheet is {sheet}; it should be a file whose name ends with .png")
        check_writable("sheet", sheet)
    num_classes = rules.num_classes if num_classes is None else num_classes
    dont_care = rules.dont_care if dont_care is None else dont_care
    pairs, faults = match(labels, images, instances, convention)
    report = Report(len(pairs), faults, label_shift=rules.label_shift)
    spread = np.linspace(0, len(pairs) - 1, min(len(pairs), MOST_SHOWN)).round()
    shown = set(spread.astype(int).tolist()) if sheet is not None else set()
    allowed = Allowed(num_classes, dont_care, rules.label_shift)

    def look(number):
        return _look(pairs[number], palette, allowed, number in shown)

    pictures = []
    with ThreadPoolExecutor() as pool:
        found = progress(pool.map(look, range(len(pairs))), len(pairs))
        for pair, seen in zip(pairs, found):
            report.faults += seen.faults
            report.pixels.update(seen.counts)
            report.images.update(seen.counts.keys())
            pictures += [seen.shown] if seen.shown else []
            if seen.size is not None and pair.image is not None:
                report.sizes.setdefault(seen.size, pair.image)
    wrong = [number for number in report.pixels if number not in allowed]
    report.num_classes, report.dont_care = num_classes or 1, dont_care
    if report.pixels and (num_classes is None or wrong):
        suggested, report.dont_care, strays = _suggested(report.pixels, dont_care, allowed.shift)
        report.num_classes = suggested if num_classes is None else num_classes
        suggested = max(suggested, num_classes or 1)
        if (suggested, report.dont_care) != (num_classes, dont_care):
            care = "" if report.dont_care is None else f" --dont-care {report.dont_care}"
            report.notes.append(f"these label maps suggest --num-classes {suggested}{care}")
        if strays:
            report.notes.append(_words_of_strays(strays, report))
    classes = report.classes
    absent = [label for label in range(report.num_classes) if label not in classes]
    if absent and report.pixels:
        report.notes.append(
            f"{len(absent)} of {report.num_classes} classes never occur: {_ranges(absent)}"
        )
    if sheet is not None:
        draw(sheet, pictures, report)
    return report


def _look(pair: Pair, palette: Palette | None, allowed: Allowed, is_shown: bool) -> Seen:
    faults: list[str] = []

    def tried(read, *arguments):
        try:
            return read(*arguments)
        except (ValueError, OSError) as error:
            faults.append(words_of(error))

    labels = tried(read_labels, pair.labels, palette)
    photograph = tried(read_photograph, pair.image)
    instances = None if pair.instances is None else tried(read_labels, pair.instances)
    if photograph is not None:
        for path, numbers in ((pair.labels, labels), (pair.instances, instances)):
            if numbers is not None and numbers.shape[::-1] != photograph.size:
                faults.append(
                    f"{path} is {numbers.shape[1]} × {numbers.shape[0]}, {pair.image} is"
                    f" {photograph.width} × {photograph.height}: they should have the same size"
                )
        orientation = tried(read_orientation, pair.image)
        if orientation not in (1, None):
            faults.append(
                f"{pair.image} has the EXIF orientation {orientation}: viewers rotate it, training"
                " does not; rotate its pixels, or remove the tag if they match the labels"
            )
    counts = {} if labels is None else counts_of(labels)
    if labels is not None and (wrong := allowed.fault(labels, counts)):
        faults.append(f"{pair.labels} has {wrong}")
    shown = None
    if is_shown and labels is not None and photograph is not None:
        shown = Shown.of(pair.name, photograph, labels, instances)
    return Seen(faults, counts, None if photograph is None else photograph.size, shown)


def _suggested(pixels, dont_care, shift):
    """num_classes and dont_care for the labels, and the labels that may be mistakes, which these do
    not include. Unless it is given, dont_care is a largest label with all bits set and a gap below
    it. Labels may be mistakes if they are rare and more than twice as large as the others.
    """
    labels = sorted(number for number in pixels if number != dont_care)
    if dont_care is None and labels[-1] in FILLED and labels[-1] - 1 not in pixels:
        dont_care = labels.pop()
    classes = [number + shift for number in labels]
    for place in range(1, len(labels)):
        is_far = classes[place] > 2 * (classes[place - 1] + 1)
        if is_far and sum(map(pixels.get, labels[place:])) <= RARE * sum(pixels.values()):
            return max(classes[place - 1] + 1, 1), dont_care, labels[place:]
    return max([0, *classes]) + 1, dont_care, []


def _words_of_strays(strays, report):
    listed = ", ".join(
        f"{number} ({counted(report.pixels[number], 'pixel')} in"
        f" {counted(report.images[number], 'label map')})"
        for number in strays[:MOST_LISTED]
    )
    more = ", …" if len(strays) > MOST_LISTED else ""
    others = f"--num-classes {strays[-1] + report.label_shift + 1}"
    if len(strays) == 1 and report.dont_care is None:
        others += f" or --dont-care {strays[0]}"
    return f"rare labels far above the others may be mistakes: {listed}{more}; else give {others}"


def _ranges(numbers):
    """Sorted whole numbers in words, such as "1, 3 to 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in runs)
