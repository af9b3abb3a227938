"""Codes of label maps: a number for each class, with and without an instance edge."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np


def label_map_of(name: str, values: "torch.Tensor | np.ndarray") -> torch.Tensor:
    """values as an int64 tensor [N, *spatial]."""
    import numpy as np

    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; it should have a number everywhere: fill it")
    if isinstance(values, np.ndarray):
        try:  # a copy in native byte order: torch takes no other order, and no negative strides
            values = torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise TypeError(
                f"{name} has dtype {values.dtype}; it should hold whole numbers"
            ) from None
    if not isinstance(values, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(values).__name__}; it should be a torch.Tensor or a numpy.ndarray"
        )
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {values.dtype}; it should hold whole numbers")
    if not 2 <= values.dim() <= 4:
        raise ValueError(
            f"{name} has shape {list(values.shape)}; it should be [N, *spatial] with 1 to 3"
            " spatial dimensions"
        )
    check_has_values(name, values)
    signed = values.as_subclass(torch.Tensor).long()
    if values.dtype == torch.uint64 and (signed < 0).any():
        raise ValueError(f"{name} has numbers of 2**63 or more; they should be smaller")
    return signed


def classes_of(
    labels: torch.Tensor, num_classes: int, dont_care: int | None
) -> tuple[torch.Tensor, int]:
    """The class of each label, int64, and the number of classes. A label that is neither a class
    nor dont_care becomes negative, and stays so if the number of classes is added.
    """
    channels = num_classes + (dont_care is not None)
    codes = torch.where((labels >= 0) & (labels < num_classes), labels, -1 - channels)
    if dont_care is not None:
        codes = torch.where(labels == dont_care, num_classes, codes)
    return codes, channels


def refuse_labels(labels: torch.Tensor, num_classes: int, dont_care: int | None) -> None:
    """Raises a ValueError about labels, some of which are neither a class nor dont_care."""
    codes, _ = classes_of(labels, num_classes, dont_care)
    wrong = codes < 0
    place = wrong.nonzero()[0].tolist()
    value = labels[tuple(place)].item()
    allowed = f"0 to {num_classes - 1}" + (
        "" if dont_care is None else f", or {dont_care} for don't care"
    )
    raise ValueError(
        f"labels has a {value} in {int((labels == value).sum())} pixels, first at {place}; it"
        f" should have {allowed}"
        f" ({int(wrong.sum())} pixels are out of range)"
    )


def instance_edges(instances: torch.Tensor) -> torch.Tensor:
    """1 where a direct neighbour along any axis has another instance number, else 0: int64
    [N, *spatial].
    """
    edges = torch.zeros_like(instances, dtype=torch.bool)
    for dim in range(1, instances.dim()):
        length = instances.shape[dim]
        before, after = (
            edges.narrow(dim, 0, max(0, length - 1)),
            edges.narrow(dim, min(1, length), max(0, length - 1)),
        )
        differ = instances.narrow(dim, 0, max(0, length - 1)) != instances.narrow(
            dim, min(1, length), max(0, length - 1)
        )
        before |= differ
        after |= differ
    return edges.long()


def compact(numbers: torch.Tensor, bound: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Renumbers numbers from 0 to bound − 1 without gaps, in the same order. Returns them as int32;
    the number that each of them stands for, int64 on the CPU; and whether all were in that range.
    A GPU is waited for once.
    """
    numbers = numbers.long()
    numbers = torch.where((numbers >= 0) & (numbers < bound), numbers, bound)
    is_present = torch.zeros(bound + 1, dtype=torch.bool, device=numbers.device)
    is_present.index_fill_(0, numbers.flatten(), True)
    ranks = is_present.cumsum(0, dtype=torch.int32) - 1
    found = is_present.cpu()
    return ranks[numbers], found[:bound].nonzero().squeeze(1), not found[bound]


def check_has_values(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} is {description(tensor)}; it should be a dense tensor with values"
        )


def description(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {list(value.shape)}, {value.layout}, on {value.device}"
