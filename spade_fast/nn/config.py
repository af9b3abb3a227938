"""Constructor arguments: whole numbers, and the strings that configure SPADE in published code,
such as "spectralspadesyncbatch3x3".
"""

import operator
import re
from typing import Any, NamedTuple, SupportsIndex

from ..ops.norms import Kind

GRAMMAR = (
    "[spectral]spade[spectral][instance|batch|syncbatch|group][KxK], K odd;"
    " by default instance and 3x3"
)
_PATTERN = re.compile(
    r"(spectral)?spade(spectral)?(instance|batch|syncbatch|group)?(?:([0-9]*[13579])x\4)?"
)


class Config(NamedTuple):
    spectral: bool
    norm: Kind
    kernel_size: int


def parse_config(text: object, argument: str) -> Config:
    """A Config from the text. If the text does not follow the grammar, raises a ValueError that
    names the argument and shows the grammar.
    """
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{argument} is {text!r}; it should be {GRAMMAR}")
    found: tuple[Any, ...] = match.groups()
    before, after, norm, kernel_size = found
    return Config(bool(before or after), norm or "instance", int(kernel_size or 3))


def whole_number(name: str, value: object, least: int = 1) -> int:
    """An argument's value as an int. NumPy's integers are accepted, bools are not. Raises
    ValueError if the value is not a whole number or is smaller than `least`.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        bound = {0: "a non-negative whole number", 1: "a positive whole number"}
        raise ValueError(
            f"{name} is {value!r}; it should be"
            f" {bound.get(least, f'a whole number of at least {least}')}"
        )
    return number


def dimensions(spatial_dims: object) -> int:
    """spatial_dims as an int. Raises ValueError if it is not 1, 2 or 3."""
    try:
        number = whole_number("spatial_dims", spatial_dims)
    except ValueError:
        number = 0
    if number not in (1, 2, 3):
        raise ValueError(f"spatial_dims is {spatial_dims!r}; it should be 1, 2 or 3")
    return number


def odd_number(name: str, value: object) -> int:
    """An argument's value as an int. Raises ValueError if it is not a positive odd number."""
    try:
        number = whole_number(name, value)
    except ValueError:
        number = 0
    if number % 2 == 0:
        raise ValueError(f"{name} is {value!r}; it should be a positive odd number")
    return number
