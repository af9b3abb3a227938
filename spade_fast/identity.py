"""What tells that a tensor is as it was."""

import torch


def state_of(tensor: torch.Tensor) -> tuple:
    """Which memory a tensor is, and how often it was written to: equal as long as it is as it was.

    An inference tensor has no count, and differs from itself each time. A change that PyTorch does
    not see (through `.data`, or NumPy) is not seen here. Whoever keeps this must keep the memory,
    too: another tensor may else come to lie there.
    """
    version = object() if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
