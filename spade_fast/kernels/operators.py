"""The kernels as PyTorch operators: schemas, fakes, and plain PyTorch where no compiled kernel is
registered.

Compiled backends register their kernels for these (csrc/cpu for CPU, csrc/cuda for CUDA); with
nothing compiled the operators still exist and can be checked. What the arguments are is said in
`torch_backend.py`.
"""

import torch

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


def fake_plane_moments(x):
    return x.new_empty(2, *x.shape[:2], dtype=torch_backend.sum_dtype(x.dtype))


def fake_apply(x, planes, gamma, beta, index, activation, negative_slope, keep_signs):
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, gamma.dtype))
    if not keep_signs or activation not in torch_backend.KEEPS_SIGNS:
        return y, x.new_empty(0, dtype=torch.uint8)
    batch, channels, pixels = x.flatten(2).shape
    rows = (pixels, channels) if torch_backend.is_channels_last(x) else (channels, pixels)
    return y, x.new_empty(batch, rows[0], (rows[1] + 7) // 8, dtype=torch.uint8)


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


def declare(namespace, names):
    """Makes these operators exist in a namespace: each set of kernels for a device has its own."""
    for name in names:
        torch.library.define(
            f"{namespace}::{name}", SCHEMAS[name], tags=[torch.Tag.pt2_compliant_tag]
        )
        torch.library.register_fake(f"{namespace}::{name}", globals()[f"fake_{name}"])


declare("spade_fast", SCHEMAS)
for name in SCHEMAS:
    torch.library.impl(
        f"spade_fast::{name}", "CompositeExplicitAutograd", getattr(torch_backend, name)
    )


def without_kernel(dispatch_key):
    """The operators that have no compiled kernel for a device ("CPU", "CUDA")."""
    return [
        name
        for name in SCHEMAS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"spade_fast::{name}", dispatch_key)
    ]
