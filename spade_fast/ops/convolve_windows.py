"""A convolution at the distinct windows of a map: each window is computed once, wherever it occurs.

A window sees rows through its taps. With T taps, result i is bias + Σ_t weight[:, :, t] ·
rows[row(i, t)]. A matrix product computes weight[:, :, t] · row for every row and tap, and each
result is a sum of such products. There are fewer rows than windows, so this matrix product is as
small as possible. It is computed for some output channels at a time and never held in full. (In
half precision on a GPU, computing products again costs less than passing them through memory: see
`csrc/cuda/convolve_windows.cu` and `triton_kernels/convolve_windows.py`.)
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import contract
from ..recording import gradients_of, is_transformed
from ..windows import Sums


def convolve_windows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, sums: Sums, dtype: torch.dtype
) -> Tensor:
    """rows [R, in] convolved with weight [out, in, *kernel] and bias [out] at the windows of a
    `windows.Sums`: [windows, out].

    The arithmetic is that of a convolution in `dtype`, whatever autocast says: half precision where
    the kernels sum its products in float32, otherwise at least float32. The result has the dtype
    of the computation, and is twice differentiable in rows, weight and bias.
    """
    return convolve_beside(rows, [weight], [bias], sums, dtype)[0]


def convolve_beside(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sums: Sums,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Several convolutions of the same rows, each as convolve_windows computes it. A bias may be
    None.
    """
    backend, (rows, *both) = _in_dtype((rows, *weights, *biases), weights[0], dtype)
    with _without_autocast(rows):
        if torch.is_grad_enabled():
            return ConvolveWindows.apply(rows, *sums, *both)
        return _convolved(backend, rows, both, sums[:2])


def convolve_through_relu(
    rows: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    hidden: Sums,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sums: Sums,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """convolve_beside of relu(convolve_windows(rows, first, first_bias, hidden)), in one step of
    autograd: in small networks, the steps take longer than the arithmetic.
    """
    tensors = (rows, first, first_bias, *weights, *biases)
    backend, (rows, first, first_bias, *both) = _in_dtype(tensors, first, dtype)
    with _without_autocast(rows):
        if torch.is_grad_enabled():
            return ConvolveThroughReLU.apply(rows, first, first_bias, *hidden, *sums, *both)
        (between,) = _convolved(backend, rows, (first, first_bias), hidden[:2], relu=True)
        return _convolved(backend, between, both, sums[:2])


def _halves(both):
    """The weights and the biases in a list of all weights followed by all biases."""
    return list(both[: len(both) // 2]), list(both[len(both) // 2 :])


def _in_dtype(tensors, weight, dtype):
    """The backend that computes, and the tensors in the dtype that it computes in."""
    backend = kernels.select(weight)
    dtype = backend.dtype_at_windows(dtype)
    if all(given is None or given.dtype == dtype for given in tensors):
        return backend, tensors
    tensors = [None if given is None else given.to(dtype) for given in tensors]
    return kernels.select(tensors[0]), tensors


def _without_autocast(rows):
    kind = rows.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _convolved(backend, rows, both, lists, relu=False):
    """The convolutions of rows with these weights and biases, followed by ReLU if asked for."""
    weights, biases = _halves(both)
    joint = backend.convolve_windows(rows, weights, biases, *lists, relu)
    if len(weights) == 1:
        return (joint,)  # not a view, because an activation may write to it in place
    return joint.split_with_sizes([weight.shape[0] for weight in weights], dim=1)


def _gradients(backend, gradients, rows, both, lists, wants_rows, wants_both):
    """The gradients of rows, and those of the weights and biases, from the gradients of the results
    of `_convolved`; None for those that are not wanted.
    """
    weights, biases = _halves(both)
    wants_weights, wants_biases = map(any, _halves(wants_both))
    of_rows, of_weights = backend.convolve_windows_gradients(
        gradients, rows, weights, *lists, wants_rows, wants_weights
    )
    of_biases = [
        None if bias is None or not wants_biases else gradient.sum(0)
        for gradient, bias in zip(gradients, biases)
    ]
    return of_rows, [*of_weights, *of_biases]


class ConvolveWindows(torch.autograd.Function):
    """`convolve_beside` of rows with the weights and biases in `both`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        offsets: Tensor,
        listed: Tensor,
        back_offsets: Tensor,
        back_listed: Tensor,
        *both: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows, offsets, listed, back_offsets, back_listed, *both)
        ctx.backend = kernels.select(rows)
        return _convolved(ctx.backend, rows, both, (offsets, listed))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, offsets, listed, back_offsets, back_listed, *both = ctx.saved_tensors
        if is_transformed(gradients[0]):
            with torch.enable_grad():
                inputs = _aliases((rows, *both))
                results = _plainly(inputs[0], inputs[1:], offsets, listed)
            of_rows, *of_both = gradients_of(torch.cat(results, 1), inputs, _joint(gradients))
            return of_rows, *[None] * 4, *of_both
        wants_rows, *wants_both = ctx.needs_input_grad[:1] + ctx.needs_input_grad[5:]
        of_rows, of_both = _gradients(
            ctx.backend, gradients, rows, both, (back_offsets, back_listed), wants_rows, wants_both
        )
        return of_rows, *[None] * 4, *of_both


class ConvolveThroughReLU(torch.autograd.Function):
    """`convolve_through_relu`, with the second step's weights and biases in `both`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, first: Tensor, first_bias: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        hidden, sums, both = others[:4], others[4:8], others[8:]
        ctx.backend = kernels.select(rows)
        (between,) = _convolved(ctx.backend, rows, (first, first_bias), hidden[:2], relu=True)
        ctx.save_for_backward(rows, first, first_bias, between, *others)
        return _convolved(ctx.backend, between, both, sums[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, first, first_bias, between, *others = ctx.saved_tensors
        hidden, sums, both = others[:4], others[4:8], others[8:]
        if is_transformed(gradients[0]):
            with torch.enable_grad():
                inputs = _aliases((rows, first, first_bias, *both))
                (again,) = _plainly(inputs[0], inputs[1:3], *hidden[:2])
                results = _plainly(torch.relu(again), inputs[3:], *sums[:2])
            found = gradients_of(torch.cat(results, 1), inputs, _joint(gradients))
            return *found[:3], *[None] * 8, *found[3:]
        wants, wants_both = ctx.needs_input_grad[:3], ctx.needs_input_grad[11:]
        of_between, of_both = _gradients(
            ctx.backend, gradients, between, both, sums[2:], any(wants), wants_both
        )
        of_rows, of_first = None, (None, None)
        if any(wants):
            of_hidden = torch.ops.aten.threshold_backward(of_between, between, 0)
            of_rows, of_first = _gradients(
                ctx.backend,
                (of_hidden,),
                rows,
                (first, first_bias),
                hidden[2:],
                wants[0],
                wants[1:],
            )
        return of_rows, *of_first, *[None] * 8, *of_both


def _aliases(tensors):
    """Aliases, because autograd.grad would also follow a path from one tensor back to another."""
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def _joint(gradients):
    gradient = torch.cat(gradients, dim=1)
    return gradient.to(contract.sum_dtype(gradient.dtype))


def _plainly(rows, both, offsets, listed):
    """`_convolved` in plain PyTorch, for second derivatives and for transforms of backward, with
    sums in at least float32.
    """
    rows, *both = (
        None if tensor is None else tensor.to(contract.sum_dtype(tensor.dtype))
        for tensor in (rows, *both)
    )
    windows = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=rows.device), offsets.diff()
    )
    results = []
    for weight, bias in zip(*_halves(both)):
        by_tap = weight.flatten(2).permute(2, 0, 1).reshape(-1, weight.shape[1])
        products = (rows @ by_tap.t()).view(-1, len(weight))[listed.long()]
        result = products.new_zeros(len(offsets) - 1, len(weight)).index_add(0, windows, products)
        results.append(result if bias is None else result + bias)
    return results
