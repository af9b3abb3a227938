"""A convolution at the distinct windows of a map alone: each is computed once, wherever it occurs.

A window sees rows through its taps. With T taps, result i is bias + Σ_t weight[:, :, t] · rows[row(i, t)]: a matrix product makes
weight[:, :, t] · row for every row and tap, and sums of those make the results. There are fewer rows than windows, so that the
product is the smallest that there can be. It is made for a block of output channels at a time, and never held whole.
"""

import torch
import torch.nn.functional as F

PRODUCT_BYTES = 4 << 20  # of a block of the product: it stays in the cache until it is summed


def convolve_windows(rows, weight, bias, sums):
    """rows [R, in] convolved with weight [out, in, *kernel] and bias [out] at the windows of a `layout.Sums`: [windows, out].

    In float32, or float64 where the weight is, whatever autocast says; differentiable in rows, weight and bias, twice.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return ConvolveWindows.apply(rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *sums)


class ConvolveWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, *sums):
        ctx.save_for_backward(rows, weight, bias, *sums)
        offsets, listed, _, _ = sums
        result = rows.new_empty(len(offsets) - 1, len(weight))
        for channels in _blocks(rows, weight):
            product = _product(rows, _by_tap(weight[channels]))
            result[:, channels] = _sum_rows(product.view(-1, len(weight[channels])), listed, offsets)
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, bias, *sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(gradient, rows, weight, bias, sums), *[None] * 4
        _, _, back_offsets, back_rows = sums
        rows_gradient = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.empty_like(weight)
        for channels in _blocks(rows, weight):
            product_gradient = _sum_rows(gradient[:, channels].contiguous(), back_rows, back_offsets).view(len(rows), -1)
            block_gradient, by_tap = _product_backward(product_gradient, rows, _by_tap(weight[channels]), rows_gradient is not None)
            by_tap = by_tap.view(-1, len(weight[channels]), rows.shape[1])
            weight_gradient[channels] = by_tap.permute(1, 2, 0).reshape(weight[channels].shape)
            if rows_gradient is not None:
                rows_gradient += block_gradient
        return rows_gradient, weight_gradient, None if bias is None else gradient.sum(0), *[None] * 4


def _product(rows, matrix):
    """rows · matrixᵀ. On a CPU as a convolution of one tap: oneDNN's is up to twice as fast as MKL's matrix product (on AMD's)."""
    if not _convolves(rows):
        return rows @ matrix.t()
    return _from_pixels(F.conv2d(_as_pixels(rows), matrix[:, :, None, None]))


def _product_backward(gradient, rows, matrix, wants_rows):
    """The gradients of rows (None where not wanted) and of the matrix."""
    if not _convolves(rows):
        return gradient @ matrix if wants_rows else None, gradient.t() @ rows
    found = torch.ops.aten.convolution_backward(_as_pixels(gradient), _as_pixels(rows), matrix[:, :, None, None], None, [1, 1], [0, 0],
                                                [1, 1], False, [0, 0], 1, [wants_rows, True, False])
    return _from_pixels(found[0]) if wants_rows else None, found[1][:, :, 0, 0]


def _convolves(rows):
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.numel() > 20480  # PyTorch gives oneDNN no less


def _as_pixels(rows):
    """rows [R, D] as one channels-last image of R pixels with D channels."""
    return rows.t()[None, :, :, None]


def _from_pixels(image):
    return image[0, :, :, 0].t().contiguous()


def _blocks(rows, weight):
    """Slices of output channels."""
    taps = weight[0, 0].numel()
    step = max(16, PRODUCT_BYTES // max(1, len(rows) * taps * rows.element_size()) // 16 * 16)
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def _by_tap(weight):
    """weight [out, in, *kernel] as a matrix [taps · out, in]."""
    return weight.flatten(2).permute(2, 0, 1).reshape(-1, weight.shape[1])


def _sum_rows(x, listed, offsets):
    """x [R, D] to [len(offsets) − 1, D]: sum i is over x[listed[offsets[i]:offsets[i + 1]]], in that order."""
    return F.embedding_bag(listed, x, offsets, mode="sum", include_last_offset=True)


def _differentiable_backward(gradient, rows, weight, bias, sums):
    """The same gradients through plain PyTorch, for second derivatives."""
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in (rows, weight, bias)]
    rows, weight, bias = inputs
    offsets, listed, _, _ = sums
    windows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=rows.device), offsets.diff())
    products = (rows @ _by_tap(weight).t()).view(-1, len(weight))[listed.long()]
    result = products.new_zeros(len(offsets) - 1, len(weight)).index_add(0, windows, products)
    result = result if bias is None else result + bias
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    gradients = iter(torch.autograd.grad(result, wanted, gradient, create_graph=True))
    return [next(gradients) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
