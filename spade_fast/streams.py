"""Synchronisation for tensors that are computed on one CUDA stream, kept, and read on another: the
reading stream waits, and the memory is not reused before it has read. In the graphs of a capture,
replays keep the order.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Made(NamedTuple):
    """Where kept tensors are computed, and the event after which they are ready."""

    device: int
    stream: int  # the stream's raw handle
    event: torch.cuda.Event


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether operations on it are captured into a CUDA graph, so that results do not exist yet."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def made_here(tensors: Iterable[torch.Tensor]) -> Made | None:
    """Call this right after launching the computation of these tensors; `read_here` takes the
    result. None if none of them is on a GPU, if a compiler is tracing, or while a graph is
    captured, whose replays keep their order anyway.
    """
    device = next((tensor.device.index for tensor in tensors if tensor.is_cuda), None)
    if device is None or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(device)
    return Made(device, stream.cuda_stream, stream.record_event())


def read_here(made: Made | None, tensors: Iterable[torch.Tensor]) -> None:
    """Call this before these tensors are read: the current stream then waits for them."""
    if made is None:
        return
    if torch._C._cuda_getCurrentRawStream(made.device) == made.stream:
        return
    if torch.cuda.is_current_stream_capturing():
        return  # the device was synchronised before the capture
    stream = torch.cuda.current_stream(made.device)
    stream.wait_event(made.event)
    for tensor in tensors:
        tensor.record_stream(stream)
