"""A convolution at the distinct windows of a map alone: each is computed once, wherever it occurs.

A window sees rows through its taps. With T taps, result i is bias + Σ_t weight[:, :, t] ·
rows[row(i, t)]: a matrix product makes weight[:, :, t] · row for every row and tap, and sums of
those make the results. There are fewer rows than windows, so that the product is the smallest that
there can be. It is made for some output channels at a time, and never held whole. (In half
precision on a GPU products cost less than the memory that they would pass through:
`csrc/cuda/convolve_windows.cu` and `triton_kernels/convolve_windows.py`.)
"""

from contextlib import nullcontext

import torch

from .. import kernels
from ..kernels import contract
from ..recording import gradients_of, is_transformed


def convolve_windows(rows, weight, bias, sums, dtype):
    """rows [R, in] convolved with weight [out, in, *kernel] and bias [out] at the windows of a
    `layout.Sums`: [windows, out].

    As a convolution in `dtype`, whatever autocast says: half precision where the kernels sum its
    products in float32, else at least float32, and the result is what it was computed in.
    Differentiable in rows, weight and bias, twice.
    """
    dtype = kernels.select(weight).dtype_at_windows(dtype)
    operands = _in_dtype((rows, weight, bias), dtype)
    with _without_autocast(rows):
        if torch.is_grad_enabled():
            return ConvolveWindows.apply(*operands, *sums)
        return kernels.select(operands[0]).convolve_windows(*operands, *sums[:2])


def convolve_beside(rows, weights, biases, sums, dtype):
    """Several convolutions of the same rows, [windows, out of all]; a bias may be None. As
    convolve_windows does each, but without gradients.
    """
    dtype = kernels.select(weights[0]).dtype_at_windows(dtype)
    rows, *weights = _in_dtype((rows, *weights), dtype)
    with _without_autocast(rows):
        return kernels.select(rows).convolve_gathered(
            rows, list(weights), list(_in_dtype(biases, dtype)), *sums[:2]
        )


def _in_dtype(tensors, dtype):
    if any(given is not None and given.dtype != dtype for given in tensors):
        return [None if given is None else given.to(dtype) for given in tensors]
    return tensors


def _without_autocast(rows):
    kind = rows.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class ConvolveWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, *sums):
        ctx.save_for_backward(rows, weight, bias, *sums)
        ctx.backend = kernels.select(rows)
        offsets, listed, _, _ = sums
        return ctx.backend.convolve_windows(rows, weight, bias, offsets, listed)

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, bias, *sums = ctx.saved_tensors
        if is_transformed(gradient):
            return *_differentiable_backward(gradient, rows, weight, bias, sums), *[None] * 4
        *wanted, wants_bias = ctx.needs_input_grad[:3]
        _, _, *back = sums
        of_rows, of_weight = ctx.backend.convolve_windows_gradients(
            gradient, rows, weight, *back, *wanted
        )
        return of_rows, of_weight, gradient.sum(0) if wants_bias else None, *[None] * 4


def _differentiable_backward(gradient, rows, weight, bias, sums):
    """The same gradients through plain PyTorch, for second derivatives and transformed backwards,
    with sums in no less than float32.
    """
    with torch.enable_grad():
        inputs = [
            None if tensor is None else tensor.view_as(tensor) for tensor in (rows, weight, bias)
        ]
        rows, weight, bias, gradient = (
            None if tensor is None else tensor.to(contract.sum_dtype(tensor.dtype))
            for tensor in (*inputs, gradient)
        )
        offsets, listed, _, _ = sums
        windows = torch.repeat_interleave(
            torch.arange(len(offsets) - 1, device=rows.device), offsets.diff()
        )
        by_tap = weight.flatten(2).permute(2, 0, 1).reshape(-1, weight.shape[1])
        products = (rows @ by_tap.t()).view(-1, len(weight))[listed.long()]
        result = products.new_zeros(len(offsets) - 1, len(weight)).index_add(0, windows, products)
        result = result if bias is None else result + bias
    return gradients_of(result, inputs, gradient)
