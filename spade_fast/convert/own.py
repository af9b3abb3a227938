"""Finds a call of somebody's forward in which a modulation can be fused, by trying calls out."""

import warnings
from collections.abc import Iterator
from itertools import islice, product

import torch
import torch.nn as nn

from ..nn.modules import CONVOLUTION_TYPES, KINDS
from .copies import Values, copy_of, trying
from .fuse import fusing
from .roles import PIXELS, SIZES, Unlike, random_pair
from .swap import Call, Called, OwnForm, call_own

MOST_ATTEMPTS = 500  # a module that only looks like a SPADE may have many convolutions


def recognise_own(module: nn.Module) -> tuple[OwnForm, str]:
    """The form of a call, and a description in words. Raises Unlike if no modulation was fused in
    any call that was tried.
    """
    call = Call(type(module).forward)
    convolutions = [own for own in module.modules() if isinstance(own, CONVOLUTION_TYPES)]
    norms = [own for own in module.modules() if isinstance(own, tuple(KINDS))]
    if not convolutions or not norms:
        raise Unlike("it has no norm of PyTorch's, or no convolution")
    dims = len(convolutions[0].kernel_size)
    with trying(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that are tried out
        values = Values(module)
        attempts = _attempts(convolutions, norms, call)
        for size, channels, label_nc, called in islice(attempts, MOST_ATTEMPTS):
            copy = copy_of(module, values(torch.float64))
            x, condition = random_pair(module, dims, channels, label_nc, size)
            try:
                with fusing(any_size=True) as mode:
                    result = call_own(type(copy).forward, copy, call, x, condition, called)
                mode.finish(result)
            except Exception:  # the own forward may raise anything
                continue
            if mode.fused:
                kinds = {type(norm).__name__: None for norm in norms}
                words = f"modulation of {channels} channels, {', '.join(kinds)}"
                return OwnForm(channels, label_nc, dims, called, frozenset(mode.kinds)), words
    raise Unlike("no call of its own forward was found in which norm(x) · (1 + γ) + β is computed")


def _attempts(convolutions: list, norms: list, call: Call) -> Iterator[tuple]:
    """The condition's size, the channels of x and of the condition, and a Called."""
    sizes = sorted(SIZES, key=PIXELS.__ne__)
    before = dict.fromkeys(own.in_channels for own in convolutions)
    after = dict.fromkeys(own.out_channels for own in convolutions)
    widths = dict.fromkeys(getattr(own, "num_features", None) or own.num_channels for own in norms)
    further = [name for name in call.neutral if name not in call.names[:2]]
    optional = [name for name in further if name not in call.required]
    beside: list[tuple[int, dict[str, int]]] = [(width, {}) for width in widths]
    for width, less, name in product(widths, {**before, **after}, optional):
        if less < width:
            beside.append((less, {name: width - less}))
    caches = [()] + [tuple(call.required)] * bool(call.required)
    both = (False, True)
    for size, (channels, more), label_nc in product(sizes, beside, before):
        for cached, keyed, swapped in product(caches, both, both):
            yield size, channels, label_nc, Called(swapped, keyed, cached, more, result=None)
