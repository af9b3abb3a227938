"""What arguments are given as, checked in one place for layouts and data."""

import operator
from typing import SupportsIndex, cast


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """value as an int: Python's, NumPy's, or a tensor of one.

    Errors: TypeError where it is no whole number, and a bool is none; ValueError where it is
        smaller than `least`.
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
            raise TypeError(f"{name} is {value!r}, it should be a whole number") from None
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}, it should be {least} or more")
    return number
