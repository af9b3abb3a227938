"""The kernels as PyTorch operators: schemas, fakes, and plain PyTorch where no compiled kernel is
registered.

Compiled backends register their kernels for these (csrc/cpu for CPU, csrc/cuda for CUDA); with
nothing compiled the operators still exist and can be checked. What the arguments are is said in
`torch_backend.py`.
"""

import torch

from ..recording import has_values
from . import torch_backend

SCHEMAS = {
    "plane_moments": "(Tensor x) -> Tensor",
    "apply": "(Tensor x, Tensor planes, Tensor gamma, Tensor beta, Tensor? index, str? activation,"
    " float negative_slope,"
    " bool keep_signs) -> (Tensor, Tensor)",
    "apply_out": "(Tensor x, Tensor planes, Tensor gamma, Tensor beta, Tensor? index, str?"
    " activation, float negative_slope,"
    " Tensor(a!) out) -> ()",
    "backward_sums": "(Tensor dy, Tensor x, Tensor planes, Tensor gamma, Tensor? beta, Tensor?"
    " index, Tensor? order, Tensor signs,"
    " str? activation, float negative_slope) -> (Tensor, Tensor, Tensor)",
    "backward_input": "(Tensor dy, Tensor x, Tensor planes, Tensor gamma, Tensor? beta, Tensor?"
    " index, Tensor signs, Tensor? terms,"
    " str? activation, float negative_slope) -> Tensor",
    "instance_forward": "(Tensor x, Tensor gamma, Tensor beta, Tensor? index, float eps, str?"
    " activation, float negative_slope,"
    " bool keep_signs) -> (Tensor, Tensor, Tensor)",
    "instance_backward": "(Tensor dy, Tensor x, Tensor planes, Tensor gamma, Tensor? beta, Tensor?"
    " index, Tensor? order,"
    " Tensor signs, str? activation, float negative_slope) -> (Tensor, Tensor, Tensor)",
    "convolve_windows": "(Tensor rows, Tensor weight, Tensor? bias, Tensor offsets, Tensor listed)"
    " -> Tensor",
    "convolve_windows_weight": "(Tensor gradient, Tensor rows, Tensor weight, Tensor back_offsets,"
    " Tensor back_listed) -> Tensor",
    "convolve_windows_rows": "(Tensor gradient, Tensor weight, Tensor back_offsets, Tensor"
    " back_listed) -> Tensor",
}


FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SUMS = (torch.float32, torch.float64)


def check_plane_moments(x):
    _require(3 <= x.dim() <= 5, "x", x, "[N, C, *spatial] with one to three spatial dimensions")
    _check_dtype("x", x, FLOATING)


def check_modulation(x, gamma, beta, index, needs_beta=True):
    check_plane_moments(x)
    if index is None:
        _check("gamma", gamma, x, FLOATING, x.shape, "x's shape")
    else:
        _check("index", index, x, (torch.int32,), (x.shape[0], *x.shape[2:]), "[N, *spatial]")
        table = (gamma.shape[0] if gamma.dim() else 0, x.shape[1])
        _check("gamma", gamma, x, FLOATING, table, "with an index a table, [K, C]")
    if beta is not None:
        _check("beta", beta, gamma, (gamma.dtype,), gamma.shape, "gamma's shape")
    elif needs_beta:
        raise ValueError("beta is None, silu's derivative needs it")


def check_apply(x, planes, gamma, beta, index, activation, negative_slope, keep_signs):
    check_modulation(x, gamma, beta, index)
    _check_numbers("planes", planes, x, 3)


def check_apply_out(x, planes, gamma, beta, index, activation, negative_slope, out):
    check_apply(x, planes, gamma, beta, index, activation, negative_slope, False)
    _check("out", out, x, (torch.promote_types(x.dtype, gamma.dtype),), x.shape, "x's shape")
    if not torch_backend.lies_like(out, x):
        raise ValueError(
            f"out has strides {list(out.stride())}, it should lie without gaps as x does, with"
            f" strides {list(x.stride())}"
        )


def check_backward_input(
    dy, x, planes, gamma, beta, index, signs, terms, activation, negative_slope
):
    check_modulation(x, gamma, beta, index, activation == "silu")
    _check("dy", dy, x, (torch.promote_types(x.dtype, gamma.dtype),), x.shape, "x's shape")
    _check_numbers("planes", planes, x, 3)
    if activation not in torch_backend.KEEPS_SIGNS:
        _check("signs", signs, x, (torch.uint8,), (0,), "of size 0")
    elif has_values(x):
        # Compilers try other memory layouts for x, and copy it to the one it had before they run.
        _check("signs", signs, x, (torch.uint8,), signs_shape(x), "a bit for each element")
    if terms is not None:
        _check_numbers("terms", terms, x, 2)


def check_backward_sums(
    dy, x, planes, gamma, beta, index, order, signs, activation, negative_slope
):
    check_backward_input(dy, x, planes, gamma, beta, index, signs, None, activation, negative_slope)
    if index is not None:
        if order is None:
            raise ValueError(
                "order is None, with an index it should be the sorted pixels, [N, pixels]"
            )
        shape = (x.shape[0], x.shape[2:].numel())
        _check("order", order, x, (torch.int32,), shape, "[N, pixels]")


def check_instance_forward(x, gamma, beta, index, eps, activation, negative_slope, keep_signs):
    check_modulation(x, gamma, beta, index)


check_instance_backward = check_backward_sums


def check_convolve_windows(rows, weight, bias, offsets, listed):
    _check_weight(weight, offsets, listed)
    _check("rows", rows, weight, (weight.dtype,), (rows.shape[0], weight.shape[1]), "[rows, in]")
    if bias is not None:
        _check("bias", bias, weight, (weight.dtype,), weight.shape[:1], "[out]")


def check_convolve_windows_rows(gradient, weight, back_offsets, back_listed):
    _check_weight(weight, back_offsets, back_listed)
    shape = (gradient.shape[0], weight.shape[0])
    _check("gradient", gradient, weight, (weight.dtype,), shape, "[windows, out]")


def check_convolve_windows_weight(gradient, rows, weight, back_offsets, back_listed):
    check_convolve_windows_rows(gradient, weight, back_offsets, back_listed)
    shape = ((back_offsets.shape[0] - 1) // weight.shape[2:].numel(), weight.shape[1])
    _check("rows", rows, weight, (weight.dtype,), shape, "[rows, in]")


def _check_weight(weight, *lists):
    _require(weight.dim() >= 3, "weight", weight, "[out, in, *kernel]")
    _require(weight.shape[2:].numel() > 0, "weight", weight, "of one tap or more")
    _check_dtype("weight", weight, FLOATING)
    for name, given in zip(("offsets", "listed"), lists):
        _check(name, given, weight, (torch.int32,), (given.numel(),), "a list")


def _check_numbers(name, given, x, count):
    _check(name, given, x, SUMS, (count, *x.shape[:2]), "numbers of each plane")


def _check(name, given, other, dtypes, shape, meaning):
    """Raises where an operand is not of this shape, of one of these dtypes and on the device of
    another that is known to be on the right one.
    """
    if given.device != other.device:
        raise ValueError(f"{name} is on {given.device}, it should be on {other.device}")
    _check_dtype(name, given, dtypes)
    _require(given.dim() == len(shape), name, given, f"{meaning}, {list(shape)}")
    for size, wanted in zip(given.shape, shape):
        _require(size == wanted, name, given, f"{meaning}, {list(shape)}")


def _check_dtype(name, given, dtypes):
    if given.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(f"{name} has dtype {given.dtype}, it should be {wanted}")


def _require(holds, name, given, wanted):
    # In a compiled graph, what is known only when it runs is asked then.
    torch._check_value(
        holds, lambda: f"{name} has shape {list(given.shape)}, it should be {wanted}"
    )


def fake_plane_moments(x):
    return x.new_empty(2, *x.shape[:2], dtype=torch_backend.sum_dtype(x.dtype))


def fake_apply(x, planes, gamma, beta, index, activation, negative_slope, keep_signs):
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, gamma.dtype))
    if not keep_signs or activation not in torch_backend.KEEPS_SIGNS:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, x.new_empty(signs_shape(x), dtype=torch.uint8)


def signs_shape(x):
    batch, channels, pixels = *x.shape[:2], x.shape[2:].numel()
    rows = (pixels, channels) if torch_backend.is_channels_last(x) else (channels, pixels)
    return batch, rows[0], (rows[1] + 7) // 8


def fake_apply_out(x, planes, gamma, beta, index, activation, negative_slope, out):
    pass


def fake_backward_sums(dy, x, planes, gamma, beta, index, order, signs, activation, negative_slope):
    if index is not None:
        return (
            gamma.new_empty(gamma.shape),
            gamma.new_empty(gamma.shape),
            planes.new_empty(2, *x.shape[:2]),
        )
    dgamma = torch.empty_like(x, dtype=gamma.dtype)
    dbeta = gamma.new_empty(0) if activation is None else torch.empty_like(x, dtype=gamma.dtype)
    return dgamma, dbeta, planes.new_empty(2, *x.shape[:2])


def fake_backward_input(
    dy, x, planes, gamma, beta, index, signs, terms, activation, negative_slope
):
    return torch.empty_like(x)


def fake_instance_forward(x, gamma, beta, index, eps, activation, negative_slope, keep_signs):
    planes = x.new_empty(3, *x.shape[:2], dtype=torch_backend.sum_dtype(x.dtype))
    return *fake_apply(
        x, planes, gamma, beta, index, activation, negative_slope, keep_signs
    ), planes


def fake_instance_backward(
    dy, x, planes, gamma, beta, index, order, signs, activation, negative_slope
):
    dgamma, dbeta, _ = fake_backward_sums(
        dy, x, planes, gamma, beta, index, order, signs, activation, negative_slope
    )
    return dgamma, dbeta, torch.empty_like(x)


def fake_convolve_windows(rows, weight, bias, offsets, listed):
    return rows.new_empty(offsets.shape[0] - 1, weight.shape[0])


def fake_convolve_windows_weight(gradient, rows, weight, back_offsets, back_listed):
    return weight.new_empty(weight.shape)


def fake_convolve_windows_rows(gradient, weight, back_offsets, back_listed):
    return gradient.new_empty(
        (back_offsets.shape[0] - 1) // weight.shape[2:].numel(), weight.shape[1]
    )


def checked(name, kernel):
    """A kernel, or a fake, that first refuses operands which are not as they should be. (csrc asks
    the same: common/checks.h.)
    """
    check = globals()[f"check_{name}"]

    def run(*arguments):
        check(*arguments)
        return kernel(*arguments)

    return run


def declare(namespace, names):
    """Makes these operators exist in a namespace: each set of kernels for a device has its own."""
    for name in names:
        torch.library.define(
            f"{namespace}::{name}", SCHEMAS[name], tags=[torch.Tag.pt2_compliant_tag]
        )
        torch.library.register_fake(
            f"{namespace}::{name}", checked(name, globals()[f"fake_{name}"])
        )


declare("spade_fast", SCHEMAS)
for name in SCHEMAS:
    torch.library.impl(
        f"spade_fast::{name}",
        "CompositeExplicitAutograd",
        checked(name, getattr(torch_backend, name)),
    )


def without_kernel(dispatch_key):
    """The operators that have no compiled kernel for a device ("CPU", "CUDA")."""
    return [
        name
        for name in SCHEMAS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"spade_fast::{name}", dispatch_key)
    ]


def not_built(library, needs):
    """Why a library that is missing is missing, and what to do."""
    return (
        f"the library {library} is not there: it was not built when the package was installed. It"
        f" takes {needs}; install that, then the package again with `pip install -v`, whose output"
        " says what was built and why not"
    )


def not_loaded(library, error):
    """The same for one that is there."""
    return (
        f"the library {library} cannot be loaded: {error}. If another torch was installed since it"
        " was built, install the package again"
    )
