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
from ..kernels import contract, torch_backend
from ..layout import Sums
from ..recording import gradients_of, is_transformed


def convolve_windows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, sums: Sums, dtype: torch.dtype
) -> Tensor:
    """rows [R, in] convolved with weight [out, in, *kernel] and bias [out] at the windows of a
    `layout.Sums`: [windows, out].

    The arithmetic is that of a convolution in `dtype`, whatever autocast says: half precision where
    the kernels sum its products in float32, otherwise at least float32. The result has the dtype
    of the computation, and is twice differentiable in rows, weight and bias.
    """
    if torch.is_grad_enabled():
        return convolve_beside(rows, [weight], [bias], sums, dtype)
    backend, (rows, weight, bias) = _in_dtype((rows, weight, bias), weight, dtype)
    with _without_autocast(rows):
        return backend.convolve_windows(rows, weight, bias, *sums[:2])


def convolve_beside(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sums: Sums,
    dtype: torch.dtype,
    relu: bool = False,
) -> Tensor:
    """Several convolutions of the same rows, each as convolve_windows computes it, side by side:
    [windows, sum of out]. A bias may be None. With `relu`, ReLU follows.
    """
    backend, (rows, *both) = _in_dtype((rows, *weights, *biases), weights[0], dtype)
    with _without_autocast(rows):
        if torch.is_grad_enabled():
            results = ConvolveWindows.apply(rows, *sums, *both)
            return torch.relu(results) if relu else results
        return backend.convolve_gathered(rows, *_halves(both), *sums[:2], relu)


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


class ConvolveWindows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        offsets: Tensor,
        listed: Tensor,
        back_offsets: Tensor,
        back_listed: Tensor,
        *both: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(rows, offsets, listed, back_offsets, back_listed, *both)
        ctx.backend = kernels.select(rows)
        weights, biases = _halves(both)
        if len(weights) == 1:
            return ctx.backend.convolve_windows(rows, *both, offsets, listed)
        return ctx.backend.convolve_gathered(rows, weights, biases, offsets, listed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, offsets, listed, back_offsets, back_listed, *both = ctx.saved_tensors
        weights, biases = _halves(both)
        if is_transformed(gradient):
            of_rows, *of_both = _differentiable_backward(
                gradient, rows, weights, biases, offsets, listed
            )
            return of_rows, *[None] * 4, *of_both
        wants_weights, wants_biases = map(any, _halves(ctx.needs_input_grad[5:]))
        of_rows, of_weights = ctx.backend.convolve_windows_gradients(
            gradient,
            rows,
            weights,
            back_offsets,
            back_listed,
            ctx.needs_input_grad[0],
            wants_weights,
        )
        of_biases: list[Tensor | None] = [None] * len(biases)
        if wants_biases:
            sizes = [weight.shape[0] for weight in weights]
            parts = gradient.sum(0).split_with_sizes(sizes)
            of_biases = [None if bias is None else part for part, bias in zip(parts, biases)]
        return of_rows, *[None] * 4, *of_weights, *of_biases


def _differentiable_backward(gradient, rows, weights, biases, offsets, listed):
    """The same gradients in plain PyTorch, for second derivatives and for transforms of backward,
    with sums in at least float32.
    """
    with torch.enable_grad():
        inputs = [
            None if tensor is None else tensor.view_as(tensor)
            for tensor in (rows, *weights, *biases)
        ]
        rows, *both = (
            None if tensor is None else tensor.to(contract.sum_dtype(tensor.dtype))
            for tensor in inputs
        )
        weight, bias = torch_backend.joined(*_halves(both))
        windows = torch.repeat_interleave(
            torch.arange(len(offsets) - 1, device=rows.device), offsets.diff()
        )
        by_tap = weight.flatten(2).permute(2, 0, 1).reshape(-1, weight.shape[1])
        products = (rows @ by_tap.t()).view(-1, len(weight))[listed.long()]
        result = products.new_zeros(len(offsets) - 1, len(weight)).index_add(0, windows, products)
        result = result if bias is None else result + bias
    return gradients_of(result, inputs, gradient.to(result.dtype))
