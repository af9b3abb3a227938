"""The operations that a backend implements, each with its schema, the check of its operands and
its fake; the tensors that pass between them; and the `Backend` that holds all of them.

A backend has three groups of kernels. Those of the modulation include a form of `apply` that writes
to a given tensor, for batch norm what it computes between the others, and for instance norm two
kernels that each do the work of two. Those of the convolutions at distinct windows include their
two gradients, which GPUs compute from sums of listed rows. The third group finds and numbers the
codes and windows of a layout. The kernels of the modulation exchange numbers for each plane (n, c),
in float32, or in float64 if x is float64:

    moments [2, N, C]   mean, sum of squared deviations
    planes  [3, N, C]   shift, scale, offset: x̂ = (x − shift)·scale + offset
    sums    [2, N, C]   Σq, Σq·(x − shift) over the plane, with q = g·f
    terms   [2, N, C]   constant, slope: the part of dx that comes through the statistics
                        is constant + slope·(x − shift)

x, γ, β, y, dy: [N, C, *spatial]. f is the factor of x̂: 1 + γ, or γ if plus_one is False. g is dy
times the activation's derivative, so dβ = g and dγ = g·x̂. With an index, int32 [N, *spatial], γ
and β are tables [K, C], and the index has the row of each pixel; `order`, int32 [N, S], lists each
image's S pixels sorted by their row.
`signs` holds one bit for each element of y, all that the derivatives of ReLU and leaky ReLU need:
bytes [N, C, ⌈S/8⌉], or [N, S, ⌈C/8⌉] if a pixel's channels are adjacent in memory; bit b of byte j
is element 8j + b of its row. SiLU needs β instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..recording import has_values

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEEPS_SIGNS = ("relu", "leaky_relu")
Activation = Literal["relu", "leaky_relu", "silu"]
Lists = tuple[Tensor, Tensor, Tensor, Tensor]  # as `windows.Sums` has them
Result = TypeVar("Result")


class Costs(NamedTuple):
    """What windows cost in float32 and float64, relative to a multiply-add of PyTorch's convolution
    at pixels.
    """

    product: float  # a multiply-add of rows
    addition: float  # of a number to the sum of a window's rows, which memory limits


@dataclass(frozen=True)
class Backend:
    """All kernels of one backend. Their versions in plain PyTorch document what each computes:
    `torch_backend.py`, and `numbering.py` for the last six.
    """

    name: str
    # (x=None, gamma=None): why the kernels cannot run here, or on x and γ; None if they can.
    why_not: Callable[..., str | None]
    plane_moments: Callable[..., Tensor]
    apply: Callable[..., tuple[Tensor, Tensor]]
    apply_out: Callable[..., None]
    backward_sums: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward_input: Callable[..., Tensor]
    running_planes: Callable[..., Tensor]
    batch_planes: Callable[..., tuple[Tensor, Tensor]]
    batch_terms: Callable[..., Tensor]
    instance_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    instance_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    convolve_windows: Callable[..., Tensor]
    convolve_windows_gradients: Callable[..., tuple[Tensor | None, Sequence[Tensor | None]]]
    dtype_at_windows: Callable[[torch.dtype], torch.dtype]
    costs_at_windows: Costs
    # Whether convolve_windows in half precision gathers the rows that each window sees: it then
    # reads rows and weights fastest if their channels are adjacent and a multiple of 16.
    gathers_half: bool
    find_codes: Callable[..., tuple[Tensor, Tensor] | None]
    find_windows: Callable[..., list[tuple[Lists, Lists, Tensor, Tensor]]]
    find_patches: Callable[..., tuple[Tensor, Lists, Tensor, Tensor]]
    number_windows: Callable[..., tuple[Tensor, Tensor]]
    window_sums: Callable[..., Lists]
    sort_pixels: Callable[[Tensor], Tensor]


class Operation(NamedTuple):
    """An entry of the tables below. All three have the same arguments."""

    schema: str
    check: Callable[..., None]  # raises if an operand is not as it should be
    fake: Callable[..., Any]  # returns the kernel's results without values

    def checked(self, kernel: Callable[..., Result]) -> Callable[..., Result]:
        """The kernel, or the fake, preceded by the check. (Compiled kernels make the same checks:
        csrc/common/checks.h.)
        """

        def run(*operands):
            self.check(*operands)
            return kernel(*operands)

        return run


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over elements of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def is_channels_last(x: Tensor) -> bool:
    """Whether a pixel's channels are adjacent in memory, in any number of dimensions. A contiguous
    x whose strides look the same, because an axis has size 1, does not count.
    """
    return not x.is_contiguous() and x.stride(1) == 1


def lies_like(out: Tensor, x: Tensor) -> bool:
    """Whether `out` has the memory layout of a kernel's result for x."""
    return (out.movedim(1, -1) if is_channels_last(x) else out).is_contiguous()


def signs_shape(x: Tensor) -> tuple[int, int, int]:
    batch, channels, pixels = *x.shape[:2], x.shape[2:].numel()
    rows = (pixels, channels) if is_channels_last(x) else (channels, pixels)
    return batch, rows[0], (rows[1] + 7) // 8


def empty_signs(x: Tensor, activation: Activation | None, keep_signs: bool) -> Tensor:
    """Memory for the signs of y; of size 0 unless they are wanted and needed."""
    shape = signs_shape(x) if keep_signs and activation in KEEPS_SIGNS else 0
    return x.new_empty(shape, dtype=torch.uint8)


def check_plane_moments(x: Tensor) -> None:
    _require(3 <= x.dim() <= 5, "x", x, "[N, C, *spatial] with one to three spatial dimensions")
    _check_dtype("x", x, FLOATING)


def check_modulation(
    x: Tensor, gamma: Tensor, beta: Tensor | None, index: Tensor | None, needs_beta: bool = True
) -> None:
    check_plane_moments(x)
    if index is None:
        _check("gamma", gamma, x, FLOATING, x.shape, "x's shape")
    else:
        _check("index", index, x, (torch.int32,), (x.shape[0], *x.shape[2:]), "[N, *spatial]")
        table = (gamma.shape[0] if gamma.dim() else 0, x.shape[1])
        _check("gamma", gamma, x, FLOATING, table, "a table, because index is given")
        has_rows = torch.sym_min(index.numel(), 1) <= table[0]
        _require(has_rows, "gamma", gamma, "a table with a row for every number in index")
    if beta is not None:
        _check("beta", beta, gamma, (gamma.dtype,), gamma.shape, "gamma's shape")
    elif needs_beta:
        raise ValueError("beta is None; it should be a tensor: the derivative of silu needs it")


def check_apply(
    x: Tensor, planes: Tensor, gamma: Tensor, beta: Tensor, index: Tensor | None, *others: object
) -> None:
    check_modulation(x, gamma, beta, index)
    _check_numbers("planes", planes, x, 3)


def check_apply_out(
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    out: Tensor,
    plus_one: bool = True,
) -> None:
    check_apply(x, planes, gamma, beta, index)
    _check("out", out, x, (torch.promote_types(x.dtype, gamma.dtype),), x.shape, "x's shape")
    if not lies_like(out, x):
        raise ValueError(
            f"out has strides {list(out.stride())}; it should be dense and in the same memory"
            f" format as x, which has strides {list(x.stride())}"
        )


def check_backward_input(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    index: Tensor | None,
    signs: Tensor,
    terms: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool = True,
) -> None:
    check_modulation(x, gamma, beta, index, activation == "silu")
    _check("dy", dy, x, (torch.promote_types(x.dtype, gamma.dtype),), x.shape, "x's shape")
    _check_numbers("planes", planes, x, 3)
    if activation not in KEEPS_SIGNS:
        _check("signs", signs, x, (torch.uint8,), (0,), "the activation needs no signs")
    elif has_values(x):
        # A compiler tries other memory layouts for x, and at run time copies x to its original one.
        _check("signs", signs, x, (torch.uint8,), signs_shape(x), "a bit per element")
    if terms is not None:
        _check_numbers("terms", terms, x, 2)


def check_backward_sums(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    index: Tensor | None,
    order: Tensor | None,
    signs: Tensor,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool = True,
) -> None:
    check_backward_input(dy, x, planes, gamma, beta, index, signs, None, activation, negative_slope)
    if index is not None:
        if order is None:
            raise ValueError(
                "order is None; it should be the sorted pixels [N, pixels], because index is given"
            )
        shape = (x.shape[0], x.shape[2:].numel())
        _check("order", order, x, (torch.int32,), shape, "[N, pixels]")


def check_running_planes(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    check_plane_moments(x)
    _check_channels(x, mean=mean, variance=variance, weight=weight, bias=bias)


def check_batch_planes(
    x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    check_plane_moments(x)
    _check_numbers("moments", moments, x, 2)
    _check_channels(x, weight=weight, bias=bias)


def check_batch_terms(
    x: Tensor, sums: Tensor, inverse_deviation: Tensor, weight: Tensor | None
) -> None:
    check_plane_moments(x)
    _check_numbers("sums", sums, x, 2)
    shape, meaning = (1, *x.shape[1:2]), "a number for each channel"
    _check("inverse_deviation", inverse_deviation, x, (sum_dtype(x.dtype),), shape, meaning)
    _check_channels(x, weight=weight)


def check_instance_forward(
    x: Tensor, gamma: Tensor, beta: Tensor, index: Tensor | None, *others: object
) -> None:
    check_modulation(x, gamma, beta, index)


def check_convolve_windows(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Tensor,
    listed: Tensor,
    relu: bool = False,
) -> None:
    _check_dtype("rows", rows, FLOATING)
    _check_convolution(weights, "biases", biases, rows, offsets, listed)
    for weight, bias in zip(weights, biases):
        if bias is not None:
            _check("biases", bias, rows, (rows.dtype,), weight.shape[:1], "[out]")
    shape = (*rows.shape[:1], weights[0].shape[1])
    _check("rows", rows, rows, FLOATING, shape, "[rows, in]")


def check_convolve_windows_rows(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
) -> None:
    if not gradients:
        raise ValueError("gradients has length 0; it should have a tensor for each weight")
    first = gradients[0]
    _check_dtype("gradients", first, FLOATING)
    _check_convolution(weights, "gradients", gradients, first, back_offsets, back_listed)
    for gradient, weight in zip(gradients, weights):
        shape = (*first.shape[:1], weight.shape[0])
        _check("gradients", gradient, first, (first.dtype,), shape, "[windows, out]")


def check_convolve_windows_weights(
    gradients: Sequence[Tensor],
    rows: Tensor,
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
) -> None:
    check_convolve_windows_rows(gradients, weights, back_offsets, back_listed)
    shape = ((back_offsets.shape[0] - 1) // weights[0].shape[2:].numel(), weights[0].shape[1])
    _check("rows", rows, gradients[0], (gradients[0].dtype,), shape, "[rows, in]")


def check_sum_lists(x: Tensor, offsets: Tensor, listed: Tensor) -> None:
    _require(x.dim() == 2, "x", x, "[rows, columns]")
    _check_dtype("x", x, FLOATING)
    _check_lists(x, offsets, listed)


def _check_convolution(weights, name, given, other, *lists):
    """Checks the weights and the lists of an operator that convolves at windows. `given`, with this
    name, should have a tensor for each weight; the device and dtype of `other` are right.
    """
    if not weights or len(weights) != len(given):
        raise ValueError(
            f"{name} has length {len(given)} and weights has length {len(weights)}; they should"
            " have the same length, at least 1"
        )
    shape = weights[0].shape
    for weight in weights:
        _require(weight.dim() >= 3, "weights", weight, "[out, in, *kernel]")
        own = (*weight.shape[:1], *shape[1:])
        _check("weights", weight, other, (other.dtype,), own, "like the first weight")
    wanted = "[out, in, *kernel] with at least one tap"
    _require(shape[2:].numel() > 0, "weights", weights[0], wanted)
    _check_lists(other, *lists)


def _check_lists(other, *lists):
    for name, given in zip(("offsets", "listed"), lists):
        _check(name, given, other, (torch.int32,), (given.numel(),), "a list")


def _check_channels(x, **numbers):
    for name, given in numbers.items():
        if given is not None:
            _check(name, given, x, FLOATING, x.shape[1:2], "a number for each channel")


def _check_numbers(name, given, x, count):
    _check(name, given, x, (sum_dtype(x.dtype),), (count, *x.shape[:2]), "values per plane")


def _check(name, given, other, dtypes, shape, meaning):
    """Raises unless an operand has this shape, one of these dtypes, and the device of `other`,
    which is known to be on the right one.
    """
    if given.device != other.device:
        raise ValueError(f"{name} is on {given.device}; it should be on {other.device}")
    _check_dtype(name, given, dtypes)
    _require(given.dim() == len(shape), name, given, f"{list(shape)} ({meaning})")
    for size, wanted in zip(given.shape, shape):
        _require(size == wanted, name, given, f"{list(shape)} ({meaning})")


def _check_dtype(name, given, dtypes):
    if given.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(f"{name} has dtype {given.dtype}; it should be {wanted}")


def _require(holds, name, given, wanted):
    # In a compiled graph, a condition that is known only at run time is checked then.
    if holds is not True:
        torch._check_value(
            holds, lambda: f"{name} has shape {list(given.shape)}; it should be {wanted}"
        )


def fake_plane_moments(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(2, *x.shape[:2], dtype=sum_dtype(x.dtype))


def fake_apply(
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    activation: Activation | None,
    negative_slope: float,
    keep_signs: bool,
    plus_one: bool = True,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, gamma.dtype))
    return y, empty_signs(x, activation, keep_signs)


def fake_apply_out(*operands: object) -> None:
    pass


def fake_backward_sums(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    index: Tensor | None,
    order: Tensor | None,
    signs: Tensor,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = planes.new_empty(2, *x.shape[:2])
    if index is not None:
        return gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape), sums
    dgamma = torch.empty_like(x, dtype=gamma.dtype)
    dbeta = gamma.new_empty(0) if activation is None else torch.empty_like(x, dtype=gamma.dtype)
    return dgamma, dbeta, sums


def fake_backward_input(dy: Tensor, x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)


def fake_running_planes(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(3, *x.shape[:2], dtype=sum_dtype(x.dtype))


def fake_batch_planes(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    dtype = sum_dtype(x.dtype)
    return x.new_empty(3, *x.shape[:2], dtype=dtype), x.new_empty(3, x.shape[1], dtype=dtype)


def fake_instance_forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    index: Tensor | None,
    eps: float,
    activation: Activation | None,
    negative_slope: float,
    keep_signs: bool,
    plus_one: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    planes = x.new_empty(3, *x.shape[:2], dtype=sum_dtype(x.dtype))
    results = fake_apply(x, planes, gamma, beta, index, activation, negative_slope, keep_signs)
    return *results, planes


def fake_instance_backward(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dgamma, dbeta, _ = fake_backward_sums(dy, x, *others)
    return dgamma, dbeta, torch.empty_like(x)


def fake_convolve_windows(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Tensor,
    listed: Tensor,
    relu: bool = False,
) -> Tensor:
    return rows.new_empty(offsets.shape[0] - 1, sum(weight.shape[0] for weight in weights))


def fake_convolve_windows_rows(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
) -> Tensor:
    channels, *kernel = weights[0].shape[1:]
    return gradients[0].new_empty((back_offsets.shape[0] - 1) // math.prod(kernel), channels)


def fake_convolve_windows_weights(
    gradients: Sequence[Tensor],
    rows: Tensor,
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
) -> list[Tensor]:
    return [weight.new_empty(weight.shape) for weight in weights]


def fake_sum_lists(x: Tensor, offsets: Tensor, listed: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1])


FORWARD = "Tensor gamma, Tensor beta, Tensor? index"
BACKWARD = "Tensor dy, Tensor x, Tensor planes, Tensor gamma, Tensor? beta, Tensor? index"
ACTIVATION = "str? activation, float negative_slope"
PLUS_ONE = "bool plus_one=True"
BACK_LISTS = "Tensor back_offsets, Tensor back_listed"

MODULATION = {
    "plane_moments": Operation("(Tensor x) -> Tensor", check_plane_moments, fake_plane_moments),
    "apply": Operation(
        f"(Tensor x, Tensor planes, {FORWARD}, {ACTIVATION}, bool keep_signs, {PLUS_ONE})"
        " -> (Tensor, Tensor)",
        check_apply,
        fake_apply,
    ),
    "apply_out": Operation(
        f"(Tensor x, Tensor planes, {FORWARD}, {ACTIVATION}, Tensor(a!) out, {PLUS_ONE}) -> ()",
        check_apply_out,
        fake_apply_out,
    ),
    "backward_sums": Operation(
        f"({BACKWARD}, Tensor? order, Tensor signs, {ACTIVATION}, {PLUS_ONE})"
        " -> (Tensor, Tensor, Tensor)",
        check_backward_sums,
        fake_backward_sums,
    ),
    "backward_input": Operation(
        f"({BACKWARD}, Tensor signs, Tensor? terms, {ACTIVATION}, {PLUS_ONE}) -> Tensor",
        check_backward_input,
        fake_backward_input,
    ),
    "running_planes": Operation(
        "(Tensor x, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, float eps)"
        " -> Tensor",
        check_running_planes,
        fake_running_planes,
    ),
    "batch_planes": Operation(
        "(Tensor x, Tensor moments, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
        check_batch_planes,
        fake_batch_planes,
    ),
    "batch_terms": Operation(
        "(Tensor x, Tensor sums, Tensor inverse_deviation, Tensor? weight) -> Tensor",
        check_batch_terms,
        fake_plane_moments,
    ),
    "instance_forward": Operation(
        f"(Tensor x, {FORWARD}, float eps, {ACTIVATION}, bool keep_signs, {PLUS_ONE})"
        " -> (Tensor, Tensor, Tensor)",
        check_instance_forward,
        fake_instance_forward,
    ),
    "instance_backward": Operation(
        f"({BACKWARD}, Tensor? order, Tensor signs, {ACTIVATION}, {PLUS_ONE})"
        " -> (Tensor, Tensor, Tensor)",
        check_backward_sums,
        fake_instance_backward,
    ),
}
CONVOLUTION = {
    "convolve_windows": Operation(
        "(Tensor rows, Tensor[] weights, Tensor?[] biases, Tensor offsets, Tensor listed,"
        " bool relu=False) -> Tensor",
        check_convolve_windows,
        fake_convolve_windows,
    ),
    "convolve_windows_rows": Operation(
        f"(Tensor[] gradients, Tensor[] weights, {BACK_LISTS}) -> Tensor",
        check_convolve_windows_rows,
        fake_convolve_windows_rows,
    ),
    "convolve_windows_weights": Operation(
        f"(Tensor[] gradients, Tensor rows, Tensor[] weights, {BACK_LISTS}) -> Tensor[]",
        check_convolve_windows_weights,
        fake_convolve_windows_weights,
    ),
}
# What GPUs have kernels for: sums of listed rows are what the gradients need.
GATHERING = {
    "convolve_windows": CONVOLUTION["convolve_windows"],
    "sum_lists": Operation(
        "(Tensor x, Tensor offsets, Tensor listed) -> Tensor", check_sum_lists, fake_sum_lists
    ),
}
OPERATIONS = MODULATION | CONVOLUTION | GATHERING
NUMBERING = {
    "find_patches": (
        "(Tensor codes, int kernel_size, int stride, int padding, int rows, int hash_mask)"
        " -> Tensor[]"
    ),
    "find_codes": "(Tensor segmap, int hash_mask) -> Tensor[]",
    "find_windows": (
        "(Tensor codes, int[] sizes, int kernel_size, int rows, int hash_mask) -> Tensor[]"
    ),
}
