"""Whether a tensor has changed since its state was last taken."""

import operator

import torch

_pointer, _stride = operator.methodcaller("data_ptr"), operator.methodcaller("stride")
_attributes = operator.attrgetter("_version", "shape", "dtype", "device")


def state_of(tensor: torch.Tensor) -> tuple:
    """A tensor's memory and its version counter: equal as long as the tensor is unchanged. The
    state stays equal if the memory moves, as into shared memory when a worker sends the tensor.

    An inference tensor has no version counter, and its state differs each time (`with_version`
    makes a copy that has one). A change that PyTorch does not count leaves the state equal: one
    through `.data` or NumPy, by `apply_` or `map_`, or by a collective of torch.distributed that
    writes into the tensor. `torch.autograd.graph.increment_version` counts it. Whoever keeps a
    state must keep the tensor, too: otherwise another tensor may be allocated in its memory.
    """
    version: object
    try:
        version = tensor._version
    except RuntimeError:
        version = object()
    memory = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return memory, version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def states_of(tensors: list[torch.Tensor]) -> list:
    """The states of several tensors, by address, as one list. There may be many tensors, so no
    Python function is called for each.
    """
    try:
        return [*map(_pointer, tensors), *map(_stride, tensors), *map(_attributes, tensors)]
    except RuntimeError:  # one of them is an inference tensor
        return list(map(state_of, tensors))


def with_version(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; if it was made in inference mode, a copy that has a version counter and that
    autograd may save.
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
