"""Inputs for `spade_modulate`, and the comparison of all its outputs with the float64 reference and
with eager PyTorch.
"""

import torch

import spade_fast
from spade_fast import reference
from spade_fast.agreement import excess


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x):
    """The same values inside a larger tensor, at an odd offset in every dimension."""
    larger = x.new_full([size + 2 for size in x.shape], float("nan"))
    inner = larger[tuple(slice(1, -1) for _ in x.shape)]
    return inner.copy_(x)


def sliced_channels(x):
    """The first channels of a channels-last tensor with more channels."""
    return channels_last(torch.cat([x, torch.full_like(x, float("nan"))], dim=1))[:, : x.shape[1]]


def transposed(x):
    """A tensor whose last dimension is not the innermost in memory."""
    return x.transpose(-1, 2).contiguous().transpose(-1, 2)


def misaligned(x):
    """A contiguous tensor at an address that is aligned only to its element size."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = [contiguous, channels_last, sliced, sliced_channels, transposed, misaligned]


def sample(
    shape,
    norm="instance",
    activation=None,
    *,
    dtype=torch.float32,
    gamma_dtype=None,
    layout=contiguous,
    gamma_layout=None,
    dy_layout=contiguous,
    affine=False,
    training=True,
    mean=0.0,
    num_groups=2,
    rows=None,
    plus_one=True,
):
    """Arguments of spade_modulate by name, and dy, in the given dtypes and memory layouts.

    rows: γ and β are the two halves of a table with this number of rows; no pixel has the last row.
    """
    gamma_dtype, gamma_layout = gamma_dtype or dtype, gamma_layout or layout
    x = layout((torch.randn(shape) + mean).to(dtype))
    if rows is None:
        gamma, beta = (gamma_layout(torch.randn(shape).to(gamma_dtype)) for _ in range(2))
        index = {}
    else:
        gamma, beta = torch.randn(rows, 2 * shape[1]).to(gamma_dtype).chunk(2, dim=1)
        index = {"index": torch.randint(max(1, rows - 1), (shape[0], *shape[2:]))}
    arguments = index | {
        "x": x,
        "gamma": gamma,
        "beta": beta,
        "norm": norm,
        "activation": activation,
        "training": training,
        "plus_one": plus_one,
    }
    if norm == "group":
        arguments["num_groups"] = num_groups
    if affine:
        arguments |= {name: (torch.randn(shape[1]) + 1).to(dtype) for name in ("weight", "bias")}
    if norm in ("batch", "syncbatch"):
        arguments["running_mean"] = torch.randn(shape[1]).to(dtype)
        arguments["running_var"] = (torch.rand(shape[1]) + 0.5).to(dtype)
    dy = dy_layout(torch.randn(shape).to(torch.promote_types(dtype, gamma_dtype)))
    return arguments, dy


def results(modulate, arguments, dy, dtype=None):
    """y, the gradient of every tensor, and the running statistics, by name."""

    def copy(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype or value.dtype)

    given = {name: copy(value) for name, value in arguments.items()}
    running = {
        name: given[name].clone() for name in ("running_mean", "running_var") if name in given
    }
    given |= running
    wanted = {
        name: given[name].requires_grad_()
        for name in ("x", "gamma", "beta", "weight", "bias")
        if name in given
    }
    x, gamma, beta = given.pop("x"), given.pop("gamma"), given.pop("beta")
    y = modulate(x, gamma, beta, **given)
    gradients = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return (
        {"y": y.detach()}
        | {f"d{name}": gradient for name, gradient in zip(wanted, gradients)}
        | running
    )


def eager_modulate(x, gamma, beta, *, index=None, **settings):
    """The reference, which does not know tables."""
    if index is not None:
        gamma, beta = (rows[index].movedim(-1, 1) for rows in (gamma, beta))
    return reference.spade_modulate(x, gamma, beta, **settings)


def running_statistics(dtype, statistics_dtype, affine):
    """Arguments for a batch norm in eval mode, whose numbers have a dtype of their own."""
    arguments, _ = sample(
        (2, 6, 9, 7), "batch", "leaky_relu", dtype=dtype, affine=affine, training=False
    )
    names = ("running_mean", "running_var", *(("weight", "bias") if affine else ()))
    return arguments | {name: arguments[name].to(statistics_dtype) for name in names}


@torch.no_grad()
def excess_without_gradients(arguments):
    """The excess of y where no gradient is wanted, beside the truth in float64 rounded to y's
    dtype.
    """
    ours = spade_fast.spade_modulate(**arguments)
    in_double = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    truth = eager_modulate(**in_double)
    eps = torch.finfo(ours.dtype).eps
    return excess(ours, truth.to(ours.dtype), truth, eps=eps)


def disagreements(arguments, dy, truth_arguments=None):
    """The outputs that disagree with the reference, by name, with their excess. Empty if all agree.

    truth_arguments: other arguments for the truth, with the same result in exact arithmetic, and a
    more accurate one in float64.
    """
    eps = max(torch.finfo(arguments[name].dtype).eps for name in ("x", "gamma"))
    ours = results(spade_fast.spade_modulate, arguments, dy)
    eager = results(eager_modulate, arguments, dy)
    truth = results(eager_modulate, truth_arguments or arguments, dy, torch.float64)
    found = {name: excess(ours[name], eager[name], truth[name], eps=eps) for name in truth}
    return {name: number for name, number in found.items() if number > 1}
