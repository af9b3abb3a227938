"""The kernels in plain PyTorch, for any device and memory layout; torch.export, ONNX and second
derivatives go through them. `contract.py` describes their arguments.
"""

from collections.abc import Callable, Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import numbering
from .contract import KEEPS_SIGNS, Activation, Backend, Costs, is_channels_last, sum_dtype

PIECE = 256  # numbers of a list that one GPU thread adds: one window may have half of a map
# Bytes of products that a convolution at windows holds at a time: they stay in a GPU's cache, and
# the products never all exist at once.
PRODUCTS = 2**25


def why_not(x: Tensor | None = None, gamma: Tensor | None = None) -> str | None:
    """Plain PyTorch runs everywhere."""
    return None


def plane_moments(x: Tensor) -> Tensor:
    pixels = x.flatten(2).to(sum_dtype(x.dtype))
    if x.numel() == 0:
        return pixels.new_zeros(2, *x.shape[:2])
    mean = pixels.mean(2, keepdim=True)
    deviations = pixels - mean
    correction = deviations.mean(2, keepdim=True)  # of the mean's rounding, largest for large means
    squares = deviations.square().sum(2) - pixels.shape[2] * correction.square().squeeze(2)
    return torch.stack([(mean + correction).squeeze(2), squares])


@overload
def look_up(rows: Tensor, index: Tensor | None) -> Tensor: ...
@overload
def look_up(rows: None, index: Tensor | None) -> None: ...
def look_up(rows: Tensor | None, index: Tensor | None) -> Tensor | None:
    """The rows of a table [K, C] at an index, as [N, C, *spatial]; without an index, `rows`."""
    if index is None or rows is None:
        return rows
    return rows.index_select(0, index.flatten()).view(*index.shape, rows.shape[1]).movedim(-1, 1)


def dtype_at_windows(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a convolution at windows uses for a layer that convolves in `dtype`: each
    product is rounded to it.
    """
    return sum_dtype(dtype)


def convolve_windows(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Tensor,
    listed: Tensor,
    relu: bool = False,
) -> Tensor:
    """rows [R, in] convolved with each of the weights [out, in, *kernel] and its bias [out] or None
    at the windows of a `windows.Sums`, followed by ReLU if asked for. The results are side by side,
    [windows, sum of out], each summed in at least float32 and rounded once.
    """
    weight, bias = joined(weights, biases)
    wide, results = sum_dtype(rows.dtype), []
    weight, wide_rows = weight.to(wide), rows.to(wide)
    for part in weight.split(_channels_at_a_time(len(rows), weight)):
        products = wide_rows @ _by_tap(part).t()
        taps = part.shape[2:].numel()
        results.append(_sum_listed(products.view(len(rows) * taps, len(part)), offsets, listed))
    result = torch.cat(results, dim=1)
    if bias is not None:
        result = result + bias.to(wide)  # not in place: see `apply`
    return (torch.relu(result) if relu else result).to(rows.dtype)


def joined(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Several convolutions of the same rows as one: its weight, and its bias if any has a bias."""
    if len(weights) == 1:
        return weights[0], biases[0]
    if all(bias is None for bias in biases):
        return torch.cat(list(weights)), None
    parts = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias
        for weight, bias in zip(weights, biases)
    ]
    return torch.cat(list(weights)), torch.cat(parts)


def convolve_windows_gradients(
    gradients: Sequence[Tensor],
    rows: Tensor | None,
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
    wants_rows: bool = True,
    wants_weights: bool = True,
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """The gradients of rows and of each weight, from the gradient of each weight's results,
    [windows, out]; None for gradients that are not wanted.
    """
    lists = _in_pieces(back_offsets, back_listed)

    def sum_lists(part):
        return _sum_pieces(part, *lists)

    return gradients_of_sums(
        sum_lists, gradients, rows, weights, back_offsets, wants_rows, wants_weights
    )


def gradients_of_sums(
    sum_lists: Callable[[Tensor], Tensor],
    gradients: Sequence[Tensor],
    rows: Tensor | None,
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    wants_rows: bool = True,
    wants_weights: bool = True,
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """convolve_windows_gradients with the given sum_lists(part), which sums columns of the
    gradients, [windows, D], over the windows that see each row through each tap: [rows · taps, D].
    """
    gradient = gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), dim=1)
    shape = weights[0].shape[1:]
    taps, channels = shape[1:].numel(), shape[0]
    count, weight_parts, row_parts, end = (len(back_offsets) - 1) // taps, [], [], 0
    if wants_rows:
        each = [weight.flatten(2).permute(2, 0, 1) for weight in weights]
        by_tap = each[0] if len(each) == 1 else torch.cat(each, dim=1)
    for part in gradient.split(_channels_at_a_time(count, weights[0]), dim=1):
        begin, end = end, end + part.shape[1]
        sums = sum_lists(part).view(count, taps * part.shape[1])
        if wants_weights:
            assert rows is not None
            product = (sums.t() @ rows).view(taps, part.shape[1], channels)
            weight_parts.append(product.permute(1, 2, 0))
        if wants_rows:
            matrix = by_tap[:, begin:end].reshape(taps * part.shape[1], channels)
            row_parts.append(sums @ matrix)
    of_weights: Sequence[Tensor | None] = [None] * len(weights)
    if wants_weights:
        joint = torch.cat(weight_parts).reshape(gradient.shape[1], *shape)
        of_weights = joint.split_with_sizes([weight.shape[0] for weight in weights])
    return _added(row_parts) if wants_rows else None, of_weights


def _added(products):
    """The sum of products, rounded once."""
    if len(products) == 1:
        return products[0]
    total = sum(product.to(sum_dtype(product.dtype)) for product in products)
    return total.to(products[0].dtype)


def sum_lists(x: Tensor, offsets: Tensor, listed: Tensor) -> Tensor:
    """Sums of listed rows of x [R, D]: [len(offsets) − 1, D]. Sum i is over
    x[listed[offsets[i]:offsets[i + 1]]].
    """
    return _sum_pieces(x, *_in_pieces(offsets, listed))


def convolve_windows_rows(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
) -> Tensor:
    of_rows, _ = convolve_windows_gradients(
        gradients, None, weights, back_offsets, back_listed, wants_weights=False
    )
    assert of_rows is not None
    return of_rows


def convolve_windows_weights(
    gradients: Sequence[Tensor],
    rows: Tensor,
    weights: Sequence[Tensor],
    back_offsets: Tensor,
    back_listed: Tensor,
) -> list[Tensor]:
    _, of_weights = convolve_windows_gradients(
        gradients, rows, weights, back_offsets, back_listed, wants_rows=False
    )
    # An operator's results may not share memory.
    return [of_weight.clone() for of_weight in of_weights if of_weight is not None]


def apply(
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
    """y, in the dtype that x and γ promote to and x's memory layout; and signs, of size 0 unless
    they are wanted and needed.
    """
    gamma, beta = look_up(gamma, index), look_up(beta, index)
    normalised = _normalise(x, planes, gamma)
    y = normalised.mul_(_factor(gamma, normalised, plus_one)).add_(beta)
    signs = x.new_empty(0, dtype=torch.uint8)
    if keep_signs and activation == "leaky_relu":
        signs = _pack(y > 0, is_channels_last(x))
    elif keep_signs and activation == "relu":
        # At NaN, PyTorch's ReLU passes the gradient on.
        signs = _pack(~(y <= 0), is_channels_last(x))
    if activation == "relu":
        y = F.relu_(y)
    elif activation == "leaky_relu":
        y = F.leaky_relu_(y, negative_slope)
    elif activation == "silu":
        y = F.silu(y)
    y = y.to(torch.promote_types(x.dtype, gamma.dtype))
    # In torch 2.11 a compiled result that is an alias loses its gradient; compilers drop the copy.
    return y.clone() if torch.compiler.is_compiling() else y, signs


def apply_out(
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
    """Writes the y of `apply` to `out`, which has y's shape and dtype and x's memory layout without
    gaps; `out` may be x, γ or β itself.
    """
    y, _ = apply(x, planes, gamma, beta, index, activation, negative_slope, False, plus_one)
    out.copy_(y)


def backward_sums(
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
    """dγ, dβ and sums. Without an activation and an index, dβ is dy itself, and has size 0 here."""
    table, gamma, beta = gamma, look_up(gamma, index), look_up(beta, index)
    normalised = _normalise(x, planes, gamma)
    g = through_activation(
        dy, x, normalised, gamma, beta, signs, activation, negative_slope, plus_one
    )
    q = _factor(gamma, normalised, plus_one).mul_(g)
    dgamma = normalised.mul_(g)
    pixels = tuple(range(2, x.dim()))
    sums = torch.stack([q.sum(pixels), q.mul_(x - _per_plane(planes, x)[0]).sum(pixels)]).to(
        planes.dtype
    )
    if index is not None:
        return _sum_rows(dgamma, index, table), _sum_rows(g, index, table), sums
    return (
        dgamma.to(gamma.dtype),
        gamma.new_empty(0) if activation is None else g.to(gamma.dtype),
        sums,
    )


def backward_input(
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
) -> Tensor:
    """dx = scale·q + constant + slope·(x − shift), in x's dtype and memory layout; only scale·q if
    terms is None.
    """
    gamma, beta = look_up(gamma, index), look_up(beta, index)
    normalised = _normalise(x, planes, gamma)
    g = through_activation(
        dy, x, normalised, gamma, beta, signs, activation, negative_slope, plus_one
    )
    shift, scale, _ = _per_plane(planes, x)
    scale_q = _factor(gamma, normalised, plus_one).mul_(scale).mul_(g)
    if terms is None:
        return normalised.copy_(scale_q).to(x.dtype)
    constant, slope = _per_plane(terms, x)
    return normalised.copy_(x).sub_(shift).mul_(slope).add_(constant).add_(scale_q).to(x.dtype)


def running_planes(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The planes of x [N, C, *spatial] for a batch norm in eval mode, from its running statistics
    and its own parameters, [C].
    """
    dtype = sum_dtype(x.dtype)
    scale = torch.rsqrt(variance.to(dtype) + eps)
    scale = scale if weight is None else scale * weight.to(dtype)
    offset = torch.zeros_like(scale) if bias is None else bias.to(dtype)
    planes = torch.stack([mean.to(dtype), scale, offset])
    return planes[:, None].expand(3, *x.shape[:2]).contiguous()


def batch_planes(
    x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The planes of x [N, C, *spatial] for a batch norm in train mode, from x's moments and the
    norm's own parameters, [C]; and the statistics [3, C]: mean, 1/sqrt(variance + eps), and the
    unbiased variance, all over the batch.
    """
    mean, squares = moments
    images, pixels = x.shape[0], x.shape[2:].numel()
    total = images * pixels
    pooled_mean = mean.sum(0) / max(images, 1)
    # Squared deviations combine exactly (Chan et al., 1979); E[x²] − E[x]² would lose them where
    # the mean is large.
    deviations = mean - pooled_mean
    pooled_squares = torch.addcmul(squares, pixels * deviations, deviations).sum(0)
    inverse_deviation = torch.rsqrt(pooled_squares / max(total, 1) + eps)
    scale = inverse_deviation if weight is None else inverse_deviation * weight.to(mean.dtype)
    offset = torch.zeros_like(scale) if bias is None else bias.to(mean.dtype)
    planes = torch.stack([pooled_mean, scale, offset])[:, None].expand(3, *mean.shape).contiguous()
    return planes, torch.stack([pooled_mean, inverse_deviation, pooled_squares / (total - 1)])


def batch_terms(
    x: Tensor, sums: Tensor, inverse_deviation: Tensor, weight: Tensor | None
) -> Tensor:
    """The terms of dx for a batch norm in train mode, from the sums of x's planes, 1/sqrt(variance
    + eps) [1, C], and the norm's own weight, [C].
    """
    total = max(x.shape[0] * x.shape[2:].numel(), 1)
    scale = inverse_deviation if weight is None else inverse_deviation * weight.to(sums.dtype)
    constant, slope = sums.sum(1, keepdim=True) * (scale / -total)
    slope = slope * inverse_deviation * inverse_deviation
    return torch.stack([constant, slope]).expand(sums.shape).contiguous()


def instance_forward(
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
    """plane_moments and apply for instance norm: y, signs, and the planes that `apply` used."""
    mean, squares = plane_moments(x)
    inverse_deviation = torch.rsqrt(squares / max(x.shape[2:].numel(), 1) + eps)
    planes = torch.stack([mean, inverse_deviation, torch.zeros_like(mean)])
    settings = (activation, negative_slope, keep_signs, plus_one)
    return *apply(x, planes, gamma, beta, index, *settings), planes


def instance_backward(
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
    """backward_sums and backward_input for instance norm: dγ, dβ (of size 0 if it is dy itself) and
    dx.
    """
    settings = (activation, negative_slope, plus_one)
    dgamma, dbeta, sums = backward_sums(dy, x, planes, gamma, beta, index, order, signs, *settings)
    scale = planes[1]
    terms = sums * (scale / -max(x.shape[2:].numel(), 1))
    terms[1].mul_(scale).mul_(scale)
    return (
        dgamma,
        dbeta,
        backward_input(dy, x, planes, gamma, beta, index, signs, terms, *settings),
    )


def through_activation(
    dy: Tensor,
    x: Tensor,
    normalised: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    signs: Tensor,
    activation: Activation | None,
    negative_slope: float,
    plus_one: bool = True,
) -> Tensor:
    """g: dy times the activation's derivative, in the dtype of x̂."""
    dy = dy.to(normalised.dtype)
    if activation is None:
        return dy
    if activation == "silu":
        y = normalised * _factor(gamma, normalised, plus_one) + beta
        sigmoid = torch.sigmoid(y)
        return dy * (sigmoid * (1 + y * (1 - sigmoid)))
    if activation not in KEEPS_SIGNS:
        raise ValueError(f"activation is {activation!r}, whose derivative is not implemented here")
    positive = _unpack(signs, dy.shape, is_channels_last(x))
    return torch.where(positive, dy, dy * negative_slope if activation == "leaky_relu" else 0)


def _by_tap(weight):
    """weight [out, in, *kernel] as a matrix [taps · out, in]."""
    out, channels, taps = weight.flatten(2).shape
    return weight.flatten(2).permute(2, 0, 1).reshape(taps * out, channels)


def _channels_at_a_time(rows, weight):
    """The number of a convolution's output channels whose products with `rows` rows take at most
    PRODUCTS bytes, but at least 16. It is a multiple of 16, so that a GPU can read several numbers
    of a row of products in one access.
    """
    if torch.compiler.is_compiling():
        return 64  # a graph may not depend on the number of rows
    fitting = PRODUCTS // (weight.element_size() * max(1, rows * weight.shape[2:].numel()))
    return max(16, fitting // 16 * 16)


def _sum_listed(x, offsets, listed):
    """`sum_lists` in one step, which adds the rows of each list in their order."""
    return F.embedding_bag(listed, x.contiguous(), offsets, mode="sum", include_last_offset=True)


def _in_pieces(offsets, listed):
    """Cuts lists at every PIECE-th number. Returns `listed`, where each piece begins, and which
    pieces each list has. The host does not wait for a GPU.
    """
    cuts = torch.arange(0, len(listed), PIECE, dtype=offsets.dtype, device=offsets.device)
    begins, end = offsets.split([len(offsets) - 1, 1])
    # If a list begins at a cut, one piece is empty.
    begins = torch.cat([begins, cuts]).sort().values
    return listed, torch.cat([begins, end]), torch.searchsorted(begins, offsets, out_int32=True)


def _sum_pieces(x, listed, begins, lists):
    """The sums over lists that `_in_pieces` cut."""
    pieces = torch.arange(len(begins) - 1, dtype=lists.dtype, device=lists.device)
    return _sum_listed(_sum_listed(x, begins, listed), lists, pieces)


def _sum_rows(x, index, table):
    """x [N, C, *spatial] summed over the pixels of each row of the table, always in the same
    order.
    """
    windows, order = index.flatten().sort(stable=True)
    first_pixels = torch.searchsorted(windows, torch.arange(len(table) + 1, device=x.device))
    pixels = x.movedim(1, -1).flatten(0, -2)[order]
    return torch.segment_reduce(
        pixels, "sum", offsets=first_pixels, axis=0, unsafe=True, initial=0
    ).to(table.dtype)


def _factor(gamma, normalised, plus_one):
    """1 + γ, or a copy of γ, in the dtype of x̂: a γ in half precision would round the sum."""
    return int(plus_one) + gamma.to(normalised.dtype)


def _per_plane(numbers, x):
    """numbers [k, N, C] as k tensors that broadcast against x."""
    return numbers.reshape(*numbers.shape, *[1] * (x.dim() - 2)).unbind(0)


def _normalise(x, planes, gamma):
    """x̂, in the dtype that planes and γ promote to. x is the first operand of every operation,
    because the first operand decides the memory layout.
    """
    shift, scale, offset = _per_plane(planes, x)
    x = x.to(torch.promote_types(planes.dtype, gamma.dtype))
    return (x - shift).mul_(scale).add_(offset)


def _pack(bits, channels_last):
    rows = bits.flatten(2)
    rows = rows.transpose(1, 2) if channels_last else rows
    rows = F.pad(rows, (0, -rows.shape[2] % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (rows.unflatten(2, (rows.shape[2] // 8, 8)) * weights).sum(3, dtype=torch.uint8)


def _unpack(signs, shape, channels_last):
    rows = (
        (signs[..., None] >> torch.arange(8, dtype=torch.uint8, device=signs.device) & 1)
        .bool()
        .flatten(2)
    )
    rows = (
        rows[:, :, : shape[1]].transpose(1, 2) if channels_last else rows[:, :, : shape[2:].numel()]
    )
    return rows.reshape(shape)


# The other backends replace some of these kernels by their own.
BACKEND = Backend(
    name="torch",
    why_not=why_not,
    plane_moments=plane_moments,
    apply=apply,
    apply_out=apply_out,
    backward_sums=backward_sums,
    backward_input=backward_input,
    running_planes=running_planes,
    batch_planes=batch_planes,
    batch_terms=batch_terms,
    instance_forward=instance_forward,
    instance_backward=instance_backward,
    convolve_windows=convolve_windows,
    convolve_windows_gradients=convolve_windows_gradients,
    dtype_at_windows=dtype_at_windows,
    # On two cores with AVX2, with these costs the dearer one of windows and pixels was chosen, by
    # more than 3%, in 1 of 70 layers with random layouts (it was 5% dearer).
    costs_at_windows=Costs(1.1, 16),
    gathers_half=False,
    find_codes=numbering.find_codes,
    find_windows=numbering.find_windows,
    find_patches=numbering.find_patches,
    number_windows=numbering.number_windows,
    window_sums=numbering.window_sums,
    sort_pixels=numbering.sort_pixels,
)
