"""The strings that published code configures SPADE with, such as "spectralspadesyncbatch3x3"."""

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
