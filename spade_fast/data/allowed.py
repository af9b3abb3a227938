"""Which labels the files of a data set may have, and where they have others."""

from typing import NamedTuple

import numpy as np


class Allowed(NamedTuple):
    """The labels that files may have: with num_classes None, every class from 0 up."""

    num_classes: int | None
    dont_care: int | None
    shift: int

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        label = number + self.shift
        is_class = label >= 0 and (self.num_classes is None or label < self.num_classes)
        return is_class or number == self.dont_care

    @property
    def words(self) -> str:
        last = "" if self.num_classes is None else f" to {self.num_classes - 1 - self.shift}"
        other = "" if self.dont_care is None else f", or {self.dont_care} for don't care"
        return f"{-self.shift}{last or ' or more'}{other}"

    def fault(self, labels: np.ndarray, counts: dict[int, int] | None = None) -> str | None:
        """Describes the first label out of range: its pixels, its first place, and the rest's
        count. None if there is none.

        counts: `counts_of` the labels, if they are known.
        """
        counts = counts_of(labels) if counts is None else counts
        wrong = [number for number in counts if number not in self]
        if not wrong:
            return None
        row, column = np.argwhere(labels == wrong[0])[0].tolist()
        more = ""
        if len(wrong) > 1:
            pixels = sum(counts[number] for number in wrong)
            more = f"; {len(wrong)} labels in {pixels} pixels are out of range"
        return (
            f"a {wrong[0]} in {counts[wrong[0]]} pixels, first at row {row}, column {column}; it"
            f" should have {self.words}{more}"
        )


def counts_of(labels: np.ndarray) -> dict[int, int]:
    """The number of pixels with each label."""
    numbers, counts = np.unique(labels, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist()))
