"""When two computations of one thing agree: the rule of every test and of every benchmark's Match
column.

Sums in another order are not equal to the last bit. The yardstick is plain PyTorch in the same
dtype: ours may be twice as far from the truth, which is the same computation in float64.

One run of eager is a poor yardstick for the gradients of a network with leaky ReLUs: where an
argument is within a rounding of zero the derivative jumps, in eager's run or in ours, and there are
a few such places in millions of elements. Several runs, from inputs that differ by a rounding, tell
how much that matters.
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
    """How far ours is from the truth, as a fraction of the allowed error: up to 1 where it agrees.

        max|ours − truth| / (2·max|eager − truth| + 4·eps·scale)

    Args:
        ours, eager: tensors of one shape and dtype; or eager a list of such, the yardstick then
            being the worst.
        truth: the same in float64.
        scale: max|truth| where None. For a gradient that is zero in exact arithmetic (of a bias
            before an instance norm), that of its layer's weight.
        eps: of ours' dtype where None; of the inputs' where that is coarser. With float64's, eager
            is the truth itself, and the whole denominator is 1e-12·scale.

    Returns:
        A float; infinity where shapes or dtypes differ, or where NaNs or infinities are not where
        eager and the truth have them.
    """
    eagers = [eager] if isinstance(eager, torch.Tensor) else eager
    if ours.shape != eagers[0].shape or ours.dtype != eagers[0].dtype:
        return float("inf")
    eps = torch.finfo(ours.dtype).eps if eps is None else eps
    ours, truth, *eagers = (tensor.double() for tensor in (ours, truth, *eagers))
    finite = truth.isfinite() & eagers[0].isfinite()
    if not finite.all():
        special = (
            ~truth.isfinite() & ~eagers[0].isfinite()
        )  # where only one is, the dtype overflows
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
    """max|one − other|, NaN where there is one."""
    return (one - other).abs().max().item() if one.numel() else 0.0


def _kind(numbers):
    """NaN, infinity, minus infinity or finite."""
    return torch.stack([numbers.isnan(), numbers == float("inf"), numbers == -float("inf")])
