"""When two computations of one thing agree: the rule of every test and of every benchmark's Match column.

Sums in another order are not equal to the last bit. The yardstick is plain PyTorch in the same dtype: ours may be twice as far
from the truth, which is the same computation in float64.
"""

import torch


def excess(ours, eager, truth, scale=None, eps=None):
    """How far ours is from the truth, as a fraction of what is allowed: at most 1 where it agrees.

        max|ours − truth| / (2·max|eager − truth| + 4·eps·scale)

    Args:
        ours, eager: tensors of one shape and dtype.
        truth: the same in float64.
        scale: max|truth| where None. For a gradient that is zero in exact arithmetic (of a bias before an instance norm), that
            of its layer's weight.
        eps: of ours' dtype where None; of the inputs' where that is coarser. With float64's, eager is the truth itself, and the
            whole denominator is 1e-12·scale.

    Returns:
        A float; infinity where shapes or dtypes differ, or where NaNs or infinities are not where eager and the truth have them.
    """
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return float("inf")
    eps = torch.finfo(ours.dtype).eps if eps is None else eps
    ours, eager, truth = ours.double(), eager.double(), truth.double()
    special = ~truth.isfinite() & ~eager.isfinite()  # where only one is, the dtype overflows
    if not torch.equal(_kind(ours[special]), _kind(eager[special])):
        return float("inf")
    finite = truth.isfinite() & eager.isfinite()
    ours, eager, truth = ours[finite], eager[finite], truth[finite]
    if truth.numel() == 0:
        return 0.0
    error = (ours - truth).abs().max().item()
    if error != error or error == 0:
        return float("inf") if error else 0.0
    scale = truth.abs().max().item() if scale is None else scale
    if eps == torch.finfo(torch.float64).eps:
        allowed = 1e-12 * scale
    else:
        allowed = 2 * (eager - truth).abs().max().item() + 4 * eps * scale
    return error / allowed if allowed else float("inf")


def _kind(numbers):
    """NaN, infinity, minus infinity or finite."""
    return torch.stack([numbers.isnan(), numbers == float("inf"), numbers == -float("inf")])
