"""Whether a tensor is still what it was: for whatever is kept that was made of it."""

import torch


def state_of(tensor: torch.Tensor) -> tuple:
    """What is equal as long as nothing was written to a tensor: (data_ptr, version or None, shape,
    stride, dtype, device).

    The version counts what PyTorch writes in place, in any view of the memory. It cannot see what
    is written through `.data` or NumPy, nor by kernels that do not tell PyTorch. A tensor that was
    made in inference mode has no version: with None there, equal states say nothing. The pointer is
    None for a tensor without memory (fake, or wrapped by torch.func).

    Memory that is freed is used again: whoever keeps a state keeps the tensor too, or a new tensor
    in the old one's place looks like it. Not for tensors of a graph that is traced.
    """
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:
        pointer = None
    version = None if tensor.is_inference() else tensor._version
    return pointer, version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def with_version(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that has a version and that backward may keep, of one that was made in
    inference mode.
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
