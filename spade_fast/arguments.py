"""Checks of arguments, and numbers in words."""

import operator
from typing import SupportsIndex, cast


def counted(number: int, noun: str) -> str:
    """A number with its noun, which has an s unless the number is 1: "3 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """value, a Python or NumPy integer or an integer tensor of one element, as an int.

    Errors: TypeError if it is not a whole number (a bool is not); ValueError if it is smaller than
        `least`.
    """
    if type(value) is int:
        number = value
    else:
        import numpy as np

        try:
            if isinstance(value, (bool, np.bool_)):
                raise TypeError
            number = operator.index(cast(SupportsIndex, value))
        except TypeError:
            raise TypeError(f"{name} is {value!r}; it should be a whole number") from None
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}; it should be {least} or more")
    return number
