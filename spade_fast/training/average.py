"""The running average of a network's weights over its training steps. The finished generator has
these weights.
"""

import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..nn.modules import Model
from ..nn.spectral import converge


def average(network: nn.Module, decay: float) -> AveragedModel:
    """The running average of a network's parameters and buffers, an exponential moving average that
    begins as a copy of the network. The first call of its `update_parameters(network)` copies the
    network again; each later call sets the average to decay · average + (1 − decay) · network.

    Whole numbers, such as `num_batches_tracked`, are copied from the network at each call: a
    rounded average of a counter would stop increasing. Save the average by its state_dict;
    `settled` turns it into a network that can run.

    Args:
        network: a module, at any time, even between a forward and its backward.
        decay: at least 0 and less than 1.

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network is a {type(network).__name__}; it should be an nn.Module")
    is_number = isinstance(decay, numbers.Real) and not isinstance(decay, bool)
    if not is_number or math.isnan(decay) or not 0 <= decay < 1:
        raise ValueError(f"decay is {decay!r}; it should be a number of at least 0 and less than 1")
    move = get_ema_multi_avg_fn(float(decay))

    @torch.no_grad()
    def update(averages, values, count):
        if averages[0].is_floating_point():
            move(averages, values, count)
        else:
            torch._foreach_copy_(averages, values)

    with _attributes_detached(network):
        return AveragedModel(network, multi_avg_fn=update, use_buffers=True)


def settled(averaged: AveragedModel, into: Model) -> Model:
    """Copies the average into the network `into`, in eval mode, and returns it. The average itself
    does not change.

    Averages of spectral norm's vectors do not have length one and belong to no weight: `into` gets
    the vectors of the averaged weights instead (`nn.spectral.converge`).

    Args:
        averaged: a result of `average`.
        into: a network constructed with the same arguments as the averaged one; its parameters and
            buffers are overwritten.

    Raises:
        TypeError, ValueError: an argument is not as described above; `into` is then unchanged.
    """
    if not isinstance(averaged, AveragedModel):
        raise TypeError(
            f"averaged is a {type(averaged).__name__}; it should be a result of `average`"
        )
    network = averaged.module
    kind = type_before_parametrizations(into)
    wanted = type_before_parametrizations(network)
    if kind is not wanted:
        raise TypeError(
            f"into is a {kind.__name__}; it should be a {wanted.__name__} like the averaged network"
        )
    given, own = _tensors_of(network), _tensors_of(into)
    for name in given | own:
        shapes = [list(of[name].shape) if name in of else "absent" for of in (own, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"into has {name} {shapes[0]}; it should be {shapes[1]} as in the averaged network"
            )
    if any(tensor is given[name] for name, tensor in own.items()):
        raise ValueError("into is the averaged network itself; it should be another one")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
    converge(into)
    return into.eval()


def _tensors_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


@contextmanager
def _attributes_detached(network: nn.Module) -> Iterator[None]:
    """Inside, the network can be copied: attributes that autograd computed, such as the weight that
    spectral norm sets in each forward, are detached.
    """
    made = [
        (module, name, value)
        for module in network.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    for module, name, value in made:
        vars(module)[name] = value.detach()
    try:
        yield
    finally:
        for module, name, value in made:
            vars(module)[name] = value
