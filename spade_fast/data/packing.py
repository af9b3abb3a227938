"""Packs objects with many tensors into one tensor, to pass them from a worker to the training
process: each tensor that is passed costs an open file, and a batch has about a hundred.
"""

import io
import math
import pickle
from typing import Any

import torch

ALIGNMENT = 64  # bytes


def pack(value: object) -> tuple:
    """The arguments of `unpack`: a pickle of the value, the bytes of its tensors, and the dtype,
    shape and offset of each tensor. Tensors on devices other than the CPU stay in the pickle.
    """
    file = io.BytesIO()
    packer = _Packer(file, protocol=pickle.HIGHEST_PROTOCOL)
    packer.dump(value)
    places, end = [], 0
    tensors = list(packer.tensors.values())
    for tensor in tensors:
        places.append((tensor.dtype, tensor.shape, end))
        end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8)
    for tensor, place in zip(tensors, places):
        _tensor_at(memory, *place).copy_(tensor)
    return file.getvalue(), memory, places


def unpack(pickled: bytes, memory: torch.Tensor, places: list) -> Any:
    """The value that was packed; its tensors share `memory`."""
    unpacker = pickle.Unpickler(io.BytesIO(pickled))
    tensors = [_tensor_at(memory, *place) for place in places]
    setattr(unpacker, "persistent_load", tensors.__getitem__)
    return unpacker.load()


class _Packer(pickle.Pickler):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        # By id, which stays unique as long as the tensor is kept.
        self.tensors: dict[int, torch.Tensor] = {}
        self.numbers: dict[int, int] = {}

    def persistent_id(self, value):
        if type(value) is not torch.Tensor or not value.is_cpu or value.requires_grad:
            return None
        self.tensors.setdefault(id(value), value)
        return self.numbers.setdefault(id(value), len(self.numbers))


def _tensor_at(memory, dtype, shape, place):
    """A tensor in this memory with a version counter of its own, which other tensors' in-place
    changes do not advance.
    """
    start = place // dtype.itemsize
    empty: Any = torch.empty(0, dtype=dtype)  # set_ is declared without its default stride
    return empty.set_(memory.untyped_storage(), start, shape)
