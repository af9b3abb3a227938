"""Objects with many tensors as one tensor, for the way from a worker to the process that trains.

There each tensor of a worker is a file that is opened, and a batch has about a hundred.
"""

import io
import math
import pickle
from typing import Any

import torch

ALIGNMENT = 64  # bytes


def pack(value: object) -> tuple:
    """A pickle of the value, the bytes of its tensors, and dtype, shape and place of each: the
    arguments of `unpack`. Tensors on other devices stay in the pickle.
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
    """The value; its tensors are those bytes, without a copy."""
    unpacker = pickle.Unpickler(io.BytesIO(pickled))
    tensors = [_tensor_at(memory, *place) for place in places]
    setattr(unpacker, "persistent_load", tensors.__getitem__)
    return unpacker.load()


class _Packer(pickle.Pickler):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        # By id, which no other tensor gets as long as this one is held.
        self.tensors: dict[int, torch.Tensor] = {}
        self.numbers: dict[int, int] = {}

    def persistent_id(self, value):
        if type(value) is not torch.Tensor or not value.is_cpu or value.requires_grad:
            return None
        self.tensors.setdefault(id(value), value)
        return self.numbers.setdefault(id(value), len(self.numbers))


def _tensor_at(memory, dtype, shape, place):
    """A tensor in this memory that counts its own versions: a change of another is none of it."""
    start = place // dtype.itemsize
    empty: Any = torch.empty(0, dtype=dtype)  # set_ is declared without its default stride
    return empty.set_(memory.untyped_storage(), start, shape)
