"""Convolutions at lists of windows, with random numbers."""

import torch
from modulations import contiguous

from spade_fast.kernels import numbering

# The first, the second and both of the weights, biases and gradients of `convolution`.
CHOICES = [slice(0, 1), slice(1, 2), slice(2)]


def convolution(shape, kernel, rows, windows, dtype=torch.float64, layout=contiguous):
    """rows; the weights and the biases of two convolutions, the second without a bias and with 5
    output channels; lists of windows with up to all of their taps, the reverse lists, and the
    gradients of both results.
    """
    outputs, channels = (shape[0], 5), shape[1]
    taps = torch.Size(kernel).numel()
    contents = torch.randint(-1, rows, (windows, taps), dtype=torch.int32)
    lists = numbering.list_windows(contents, rows, int((contents >= 0).sum()))
    weights = [layout(torch.randn(out, channels, *kernel)).to(dtype) for out in outputs]
    biases = [torch.randn(outputs[0]).to(dtype), None]
    gradients = [torch.randn(windows, out).to(dtype) for out in outputs]
    return torch.randn(rows, channels).to(dtype), weights, biases, lists[:2], lists[2:], gradients


CONVOLUTIONS = [
    ((1, 1), (1,), 1, 1),
    ((5, 3), (3, 3), 7, 20),
    ((16, 16), (3,), 40, 9),
    ((70, 33), (3, 3, 3), 31, 50),
    ((33, 128), (5, 5), 300, 150),
    ((48, 7), (7,), 8, 0),
]


def listed(choose_lists, rows):
    """Lists of these lengths, of random row numbers."""
    offsets = torch.tensor([0, *choose_lists]).cumsum(0).int()
    return offsets, torch.randint(rows, (int(offsets[-1]),), dtype=torch.int32)


def in_double(x):
    """A floating-point tensor in float64; anything else unchanged."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
