"""Convolutions at lists of windows, with random numbers."""

import torch
from modulations import contiguous

from spade_fast.kernels import numbering


def convolution(shape, kernel, rows, windows):
    """rows, weight, bias, lists of windows with up to all of their taps, the reverse lists, and a
    gradient.
    """
    out, given = shape
    weight = torch.randn(out, given, *kernel, dtype=torch.float64)
    taps = weight[0, 0].numel()
    contents = torch.randint(-1, rows, (windows, taps), dtype=torch.int32)
    lists = numbering.list_windows(contents, rows, int((contents >= 0).sum()))
    bias, gradient = (
        torch.randn(out, dtype=torch.float64),
        torch.randn(windows, out, dtype=torch.float64),
    )
    return (
        torch.randn(rows, given, dtype=torch.float64),
        weight,
        bias,
        lists[:2],
        lists[2:],
        gradient,
    )


CONVOLUTIONS = [
    ((1, 1), (1,), 1, 1),
    ((5, 3), (3, 3), 7, 20),
    ((16, 16), (3,), 40, 9),
    ((70, 33), (3, 3, 3), 31, 50),
    ((33, 128), (5, 5), 300, 400),
    ((48, 7), (7,), 8, 0),
]


def listed(choose_lists, rows):
    """Lists of these lengths, of random row numbers."""
    offsets = torch.tensor([0, *choose_lists]).cumsum(0).int()
    return offsets, torch.randint(rows, (int(offsets[-1]),), dtype=torch.int32)


def gathered_sample(shape, kernel, rows, windows, dtype, layout=contiguous):
    """rows, weights, biases and lists for two convolutions, one of them without a bias."""
    outputs, channels = shape
    taps = torch.Size(kernel).numel()
    contents = torch.randint(-1, rows, (windows, taps), dtype=torch.int32)
    lists = numbering.list_windows(contents, rows, int((contents >= 0).sum()))[:2]
    weights = [layout(torch.randn(out, channels, *kernel)).to(dtype) for out in (outputs, 5)]
    biases = [torch.randn(outputs).to(dtype), None]
    return torch.randn(rows, channels).to(dtype), weights, biases, lists
