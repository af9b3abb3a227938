"""The argument checks of `spade_modulate`, made before any kernel runs. Each error names the
argument, what it is and what it should be.
"""

import math
import operator
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import contract
from ..kernels.contract import Activation
from ..recording import is_recorded
from .norms import Kind, Norm

NORMS = (*get_args(Kind), None)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
ACTIVATIONS = (None, *get_args(Activation))


def check_x(x: Tensor) -> None:
    _check_tensor("x", x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"x has shape {list(x.shape)}; it should be [N, C, *spatial] with one to three spatial"
            " dimensions"
        )


def check_modulate(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    order: Tensor | None,
    *,
    norm: Kind | None,
    num_groups: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    process_group: "dist.ProcessGroup | None",
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool,
    moments: Tensor | None,
    out: Tensor | None = None,
) -> None:
    check_x(x)
    if index is not None and not isinstance(index, torch.Tensor):
        raise TypeError(f"index is a {type(index).__name__}; it should be a torch.Tensor")
    _check_tensor("gamma", gamma)
    _check_tensor("beta", beta)
    for name, tensor in {"gamma": gamma, "beta": beta}.items():
        if index is None and tensor.shape != x.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; it should be x's shape, {list(x.shape)}"
            )
        if index is not None and (
            tensor.dim() != 2 or tensor.shape[1] != x.shape[1] or tensor.shape[0] != gamma.shape[0]
        ):
            rows = "K" if name == "gamma" else gamma.shape[0]
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, with an index it should be a table,"
                f" [{rows}, {x.shape[1]}]"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device}; it should be on x's device, {x.device}"
            )
    if beta.dtype != gamma.dtype:
        raise TypeError(f"beta has dtype {beta.dtype}; it should be gamma's dtype, {gamma.dtype}")
    if index is not None:
        _check_index(index, x, gamma.shape[0])
    if order is not None:
        _check_order(order, x)
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it should be one of {NORMS}")
    check_activation(activation, negative_slope)
    _check_number("momentum", momentum), _check_number("eps", eps)
    if not isinstance(plus_one, bool):
        raise TypeError(f"plus_one is {plus_one!r}; it should be True or False")
    per_channel = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, numbers in per_channel.items():
        check_channels(name, numbers, x)
    running = (running_mean, running_var, training, process_group)
    _check_norm(x, norm, num_groups, weight, bias, *running)
    if moments is not None:
        check_moments(moments, x)
    if out is not None:
        _check_out(out, x, torch.promote_types(x.dtype, gamma.dtype))
        read = {"x": x, "gamma": gamma, "beta": beta, "index": index}
        if not torch.compiler.is_compiling() and not is_recorded(out, *read.values()):
            _check_overlaps(out, read)


def check_moments(moments: Tensor, x: Tensor) -> None:
    _check_tensor("moments", moments)
    if moments.shape != (2, *x.shape[:2]):
        raise ValueError(
            f"moments has shape {list(moments.shape)}; it should be [2, N, C], {[2, *x.shape[:2]]}"
        )
    if moments.dtype != (dtype := contract.sum_dtype(x.dtype)):
        raise TypeError(
            f"moments has dtype {moments.dtype}; it should be {dtype}, as plane_moments(x) has"
        )
    if moments.device != x.device:
        raise ValueError(f"moments is on {moments.device}; it should be on x's device, {x.device}")


def check_activation(activation: Activation | None, negative_slope: float) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it should be one of {ACTIVATIONS}")
    _check_number("negative_slope", negative_slope)


def _check_tensor(name, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it should be a torch.Tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; it should be a floating-point tensor of 16, 32 or"
            " 64 bits"
        )


def _check_number(name, value):
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r}; it should be a number") from None


def _check_out(out, x, dtype):
    _check_tensor("out", out)
    if out.shape != x.shape or out.device != x.device:
        raise ValueError(
            f"out has shape {list(out.shape)} on {out.device}; it should be as x is,"
            f" {list(x.shape)} on {x.device}"
        )
    if out.dtype != dtype:
        raise TypeError(
            f"out has dtype {out.dtype}; it should be the one that x and gamma promote to, {dtype}"
        )
    if not contract.lies_like(out, x):
        raise ValueError(
            f"out has strides {list(out.stride())}; it should be contiguous, or channels-last if x"
            f" is, which has strides {list(x.stride())}"
        )


def _check_overlaps(out, read):
    """Raises ValueError where writing `out` could overwrite elements of an input before they are
    read: where the two overlap in memory without being the same elements at the same addresses.
    """
    for name, other in read.items():
        if other is None or is_same_memory(out, other):
            continue
        (begin, end), (other_begin, other_end) = memory_of(out), memory_of(other)
        if begin < other_end and other_begin < end:
            raise ValueError(
                f"out overlaps {name} in memory; it should be {name} itself, element for element,"
                " or have memory of its own"
            )


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """The addresses at which a tensor begins and ends."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    length = (reach + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + length


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have each element at the same address."""
    return (one.data_ptr(), one.dtype, one.shape) == (
        other.data_ptr(),
        other.dtype,
        other.shape,
    ) and all(
        size == 1 or steps == other_steps
        for size, steps, other_steps in zip(one.shape, one.stride(), other.stride())
    )


def _check_index(index, x, rows):
    if index.dtype not in INTEGERS:
        raise TypeError(f"index has dtype {index.dtype}; it should be a tensor of whole numbers")
    expected = (x.shape[0], *x.shape[2:])
    if index.shape != expected:
        raise ValueError(
            f"index has shape {list(index.shape)}; it should be [N, *spatial], {list(expected)}"
        )
    if index.device != x.device:
        raise ValueError(f"index is on {index.device}; it should be on x's device, {x.device}")
    if torch.compiler.is_compiling() or is_recorded(index) or not index.numel():
        return
    if rows == 0:
        raise ValueError("gamma has no rows; it should have one for each number in index")
    if index.is_cpu:
        least, most = (bound.item() for bound in index.aminmax())
        if least < 0 or most >= rows:
            raise ValueError(
                f"index has numbers from {least} to {most}; they should be rows of the table, 0 to"
                f" {rows - 1}"
            )


def _check_order(order, x):
    if not isinstance(order, torch.Tensor) or order.dtype != torch.int32:
        kind = getattr(order, "dtype", type(order).__name__)
        raise TypeError(f"order is {kind}; it should be an int32 tensor")
    expected = (x.shape[0], math.prod(x.shape[2:]))
    if order.shape != expected:
        raise ValueError(
            f"order has shape {list(order.shape)}; it should be [N, pixels], {list(expected)}"
        )
    if order.device != x.device:
        raise ValueError(f"order is on {order.device}; it should be on x's device, {x.device}")


def check_channels(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    _check_tensor(name, tensor)
    if tensor.shape != (x.shape[1],):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it should be [C], [{x.shape[1]}]")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; it should be on x's device, {x.device}")


def is_divisor(number: Any, whole: int) -> bool:
    try:
        number = operator.index(number)
    except TypeError:
        return False
    return number > 0 and whole % number == 0


def _check_norm(x, norm, num_groups, weight, bias, running_mean, running_var, training, group):
    batch, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var should be given together or not at all")
    if running_mean is not None and norm not in ("batch", "syncbatch"):
        raise ValueError(
            f"running_mean is given; it should be None for norm={norm!r}, which keeps no running"
            " statistics"
        )
    if running_mean is None and norm in ("batch", "syncbatch") and not training:
        raise ValueError(
            f"running_mean is None; it should be a tensor [C] for norm={norm!r} with training=False"
        )
    if norm is None and (weight is not None or bias is not None):
        raise ValueError("weight and bias belong to the norm; they should be None for norm=None")
    # These rules and messages are torch's own: a single value has no variance.
    if norm == "instance" and pixels == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {x.shape}"
        )
    alone = norm == "batch" or (
        norm == "syncbatch" and Norm(norm, process_group=group).processes == 1
    )
    if alone and training and batch * pixels == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )
    if norm == "group":
        if not is_divisor(num_groups, channels):
            raise ValueError(
                f"num_groups is {num_groups!r}; it should be a positive number that divides C,"
                f" {channels}"
            )
        if batch * channels // num_groups * pixels == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size"
                f" {list(x.shape)}"
            )
