"""The strings that published code configures SPADE with, such as "spectralspadesyncbatch3x3"."""

import operator
import re
from typing import NamedTuple

GRAMMAR = (
    "[spectral]spade[spectral][instance|batch|syncbatch|group][KxK], K odd;"
    " by default instance and 3x3"
)
_PATTERN = re.compile(
    r"(spectral)?spade(spectral)?(instance|batch|syncbatch|group)?(?:([0-9]*[13579])x\4)?"
)


class Config(NamedTuple):
    spectral: bool
    norm: str
    kernel_size: int


def parse_config(text, argument):
    """A Config from the text; what does not follow the grammar is a ValueError that names the
    argument and shows the grammar.
    """
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{argument} is {text!r}, it should be {GRAMMAR}")
    before, after, norm, kernel_size = match.groups()
    return Config(bool(before or after), norm or "instance", int(kernel_size or 3))


def whole_number(name: str, value: int, least: int = 1) -> int:
    """The value as an int: any whole number, such as NumPy's. Errors: ValueError, which names it,
    where it is none, or less than `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        kind = "a positive whole number" if least == 1 else f"a whole number from {least} on"
        raise ValueError(f"{name} is {value!r}, it should be {kind}")
    return number
