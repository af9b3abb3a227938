"""Helpers for tests of numbering: conditions, patches, and a guard against waits of the host."""

import random

import pytest
import torch
from conftest import BACKENDS
from label_maps import patches
from torch.utils._python_dispatch import TorchDispatchMode

from spade_fast.kernels import cpu_backend

DEVICE = "cuda" if "cuda" in BACKENDS.values() else "cpu"


HAS_LIBRARY = pytest.mark.skipif(cpu_backend.library is None, reason=str(cpu_backend.failure))


class NothingWaits(TorchDispatchMode):
    """Inside, operators that make the host wait for a GPU raise; only `_read` may wait."""

    WAITS = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "repeat_interleave.Tensor",
        "bincount",
    }

    def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
        name = operator._schema.name.removeprefix("aten::")
        full_name = f"{name}.{operator._overloadname}"
        assert not {name, full_name} & self.WAITS, f"{full_name} waits for the device"
        indices = arguments[1] if name in ("index", "index_put") else ()
        assert all(index is None or index.dtype != torch.bool for index in indices), (
            f"{full_name} with a mask waits for the device"
        )
        return operator(*arguments, **settings or {})


def random_codes(seed):
    """Random codes of a layout and other arguments of `find_windows`, with up to three sizes."""
    choose = random.Random(seed)
    axes, classes = choose.choice([1, 2, 2, 3]), choose.choice([1, 2, 5, 300])
    given = [choose.choice([1, 2, 5, 8, 13]) for _ in range(axes)]
    lengths = [1, 3, 4, 8, 11, 20] if axes < 3 else [1, 3, 4, 6]
    sizes = {tuple(choose.choices(lengths, k=axes)) for _ in range(choose.choice([1, 2, 3]))}
    codes = patches((choose.choice([0, 1, 1, 2, 3]), *given), classes, seed).int()
    dtype = choose.choice([torch.float32, torch.float64])
    return codes, sorted(sizes), choose.choice([1, 3, 3, 5, 7]), classes, dtype


def differences(find_windows, codes, *asked, device=DEVICE):
    """The numbers of the lists of windows that differ from the CPU library's."""
    ours = find_windows(codes.to(device), *asked)
    theirs = cpu_backend.find_windows(codes, *asked)
    flat = [
        [tensor for hidden, table, *places in found for tensor in (*hidden, *table, *places)]
        for found in (ours, theirs)
    ]
    assert len(flat[0]) == len(flat[1]) == 10 * len(asked[0])
    return [
        number
        for number, (one, other) in enumerate(zip(*flat))
        if one.dtype != torch.int32 or not torch.equal(one.cpu(), other)
    ]


CONDITIONS = [
    (2, 3, 17),
    (1, 1, 1, 1),
    (2, 5, 9, 14),
    (1, 20, 4, 5, 6),
    (2, 0, 4, 4),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
]


def condition(shape, dtype):
    """A condition with one of six vectors at each pixel."""
    places = (shape[0], *shape[2:])
    codes = torch.zeros(places).long() if 0 in places else patches(places, 6)
    return torch.randn(6, shape[1]).to(dtype)[codes].movedim(-1, 1)


def random_patches(seed):
    """Random arguments of `find_patches`."""
    choose = random.Random(seed)
    axes, classes = choose.choice([1, 2, 2, 3]), choose.choice([1, 3, 200])
    kernel_size, stride = choose.choice([1, 2, 3, 4, 7]), choose.choice([1, 2, 3])
    padding = choose.choice([0, 1, 2, 5])
    lengths = [1, 2, 5, 9, 13] if axes < 3 else [2, 4, 6]
    least = max(1, kernel_size - 2 * padding)
    shape = (choose.choice([0, 1, 2]), *(max(least, choose.choice(lengths)) for _ in range(axes)))
    return patches(shape, classes, seed).int(), kernel_size, stride, padding, classes


def patches_differ(find_patches, codes, *asked, device=DEVICE):
    """Whether the patches differ from the CPU library's."""
    contents, sums, *places = find_patches(codes.to(device), *asked)
    library_contents, library_sums, *library_places = cpu_backend.find_patches(codes, *asked)
    pairs = zip(
        (contents, *sums, *places), (library_contents, *library_sums, *library_places), strict=True
    )
    return any(one.dtype != torch.int32 or not torch.equal(one.cpu(), two) for one, two in pairs)
