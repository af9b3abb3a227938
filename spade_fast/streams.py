"""What is kept from one call to the next was made on one stream of a GPU, and may be read on
another: then that one waits, and the memory is not given away before it has read.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Made(NamedTuple):
    """Where kept tensors were made, and when they are there."""

    device: int
    stream: int  # the stream's own handle
    event: torch.cuda.Event


def made_here(tensors: Iterable[torch.Tensor]) -> Made | None:
    """To be called right after these tensors were made: what `read_here` needs later. None where
    none is on a GPU, or where a graph is captured, whose replays are in order by themselves.
    """
    device = next((tensor.device.index for tensor in tensors if tensor.is_cuda), None)
    if device is None or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(device)
    return Made(device, stream.cuda_stream, stream.record_event())


def read_here(made: Made | None, tensors: Iterable[torch.Tensor]) -> None:
    """To be called before these tensors are read: what reads them from here on waits for them."""
    if made is None:
        return
    if torch._C._cuda_getCurrentRawStream(made.device) == made.stream:
        return
    if torch.cuda.is_current_stream_capturing():
        return  # the device was waited for before the capture
    stream = torch.cuda.current_stream(made.device)
    stream.wait_event(made.event)
    for tensor in tensors:
        tensor.record_stream(stream)
