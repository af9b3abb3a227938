"""When two computations of the same result agree: the rule of every test and of every benchmark's
Match column.

Sums in another order are not equal to the last bit. The yardstick is plain PyTorch in the same
dtype: our error may be twice as large as its error. The truth is the same computation in float64.

One run of eager is a poor yardstick for the gradients of a network with leaky ReLUs. If an argument
is within a rounding error of zero, the derivative may jump in eager's run or in ours, and among
millions of elements there are a few such arguments. Several runs of eager, on inputs that differ by
a rounding error, show how much that matters.
"""

from collections.abc import Sequence

import torch


def excess(
    ours: torch.Tensor,
    eager: torch.Tensor | Sequence[torch.Tensor],
    truth: torch.Tensor,
    scale: float | None = None,
    eps: float | None = None,
) -> float:
    """The error of ours as a fraction of the allowed error: at most 1 if ours agrees.

        max|ours − truth| / (2·max|eager − truth| + 4·eps·scale)

    Args:
        ours, eager: tensors of one shape and dtype. eager may be a list of them; the yardstick is
            then the worst of them.
        truth: the same result in float64.
        scale: max|truth| if None. For a gradient that is zero in exact arithmetic (that of a bias
            before an instance norm), pass max|truth| of the gradient of its layer's weight.
        eps: that of ours' dtype if None; pass that of the inputs' dtype if it is coarser. With
            float64's, eager is the truth itself, and the whole denominator is 1e-12·scale.

    Returns:
        A float; infinity if shapes or dtypes differ, or if ours is not NaN or infinite exactly as
        eager and the truth are. Elements where only one of these two is finite are left out.
    """
    eagers = [eager] if isinstance(eager, torch.Tensor) else eager
    if ours.shape != eagers[0].shape or ours.dtype != eagers[0].dtype:
        return float("inf")
    eps = torch.finfo(ours.dtype).eps if eps is None else eps
    ours, truth, *eagers = (tensor.double() for tensor in (ours, truth, *eagers))
    finite = truth.isfinite() & eagers[0].isfinite()
    if not finite.all():
        # If only one of them is finite, the dtype has overflowed.
        special = ~truth.isfinite() & ~eagers[0].isfinite()
        if not torch.equal(_kind(ours[special]), _kind(eagers[0][special])):
            return float("inf")
        ours, truth, *eagers = (tensor[finite] for tensor in (ours, truth, *eagers))
    error, *yardsticks = (_distance(tensor, truth) for tensor in (ours, *eagers))
    if error == 0:
        return 0.0
    scale = _distance(truth, torch.zeros((), device=truth.device)) if scale is None else scale
    if eps == torch.finfo(torch.float64).eps:
        allowed = 1e-12 * scale
    else:
        allowed = 2 * max(yardsticks) + 4 * eps * scale
    return error / allowed if allowed and error == error else float("inf")


def _distance(one, other):
    """max|one − other|; NaN if either has a NaN."""
    return (one - other).abs().max().item() if one.numel() else 0.0


def _kind(numbers):
    """Which numbers are NaN, which infinity, and which minus infinity."""
    return torch.stack([numbers.isnan(), numbers == float("inf"), numbers == -float("inf")])
