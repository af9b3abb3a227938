"""What tells that a tensor is as it was."""

import operator

import torch

_pointer, _stride = operator.methodcaller("data_ptr"), operator.methodcaller("stride")
_attributes = operator.attrgetter("_version", "shape", "dtype", "device")


def state_of(tensor: torch.Tensor) -> tuple:
    """Which memory a tensor is, and how often it was written to: equal as long as it is as it was.
    Memory that is moved, as into shared memory when a worker sends a tensor, is the same.

    An inference tensor has no count, and differs from itself each time (`with_version` makes one
    that has). A change that PyTorch does not see (through `.data`, or NumPy) is not seen here.
    Whoever keeps this must keep the memory, too: another tensor may else come to lie there.
    """
    version: object
    try:
        version = tensor._version
    except RuntimeError:
        version = object()
    memory = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return memory, version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def states_of(tensors: list[torch.Tensor]) -> list:
    """The same of each, by addresses, as one list; without a call in Python for each, which many of
    them are.
    """
    try:
        return [*map(_pointer, tensors), *map(_stride, tensors), *map(_attributes, tensors)]
    except RuntimeError:  # one is an inference tensor
        return list(map(state_of, tensors))


def with_version(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; a copy that counts how often it is written to, and that training may keep, of one
    that was made in inference mode.
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
