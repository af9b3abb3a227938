"""Constructor arguments: numbers, and the strings that configure SPADE in published code, such as
"spectralspadesyncbatch3x3".
"""

import re
from typing import Any, NamedTuple

from ..arguments import whole_number
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


def dimensions(spatial_dims: object) -> int:
    """spatial_dims as an int. Errors: TypeError, ValueError if it is not 1, 2 or 3."""
    number = whole_number("spatial_dims", spatial_dims)
    if number not in (1, 2, 3):
        raise ValueError(f"spatial_dims is {number}; it should be 1, 2 or 3")
    return number


def odd_number(name: str, value: object) -> int:
    """An argument's value as an int. Errors: TypeError, ValueError if it is not a positive odd
    number.
    """
    number = whole_number(name, value)
    if number < 1 or number % 2 == 0:
        raise ValueError(f"{name} is {number}; it should be a positive odd number")
    return number
