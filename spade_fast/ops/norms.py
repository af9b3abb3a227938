"""The norms, on [N, C] numbers: kernels never see one.

Forward, a norm pools the moments of the planes that share their statistics: a plane alone
(instance), a channel's planes over the batch (batch) and over all processes (syncbatch), or those
of a group's channels (group). Backward, it pools their sums in the same way. With d = x − mean, r =
1/sqrt(variance + eps), w the affine weight, M the elements of a pool, q = g·(1 + γ):

    dx = r·w·q − r·Σ(w·q)/M − d·r³·Σ(w·q·d)/M        summed over the pool
    dweight = Σ r·q·d,  dbias = Σ q                  summed over all planes of a channel

The rows of numbers (moments, planes, sums, terms) are those of `kernels/contract.py`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["instance", "batch", "syncbatch", "group"]
Running = tuple[Tensor | None, Tensor | None]  # mean and variance


class Norm(NamedTuple):
    """Which norm, with its settings."""

    kind: Kind | None  # None: x is modulated as it is
    num_groups: int | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    process_group: "dist.ProcessGroup | None" = None

    @property
    def measures(self) -> bool:
        """Whether x is normalised with its own moments, rather than with running statistics or not
        at all.
        """
        return self.kind in ("instance", "group") or (
            self.kind in ("batch", "syncbatch") and self.training
        )

    @property
    def processes(self) -> int:
        """How many processes share their statistics."""
        if (
            self.kind != "syncbatch"
            or not self.training
            or not dist.is_available()
            or not dist.is_initialized()
        ):
            return 1
        return dist.get_world_size(self.process_group)


class Statistics(NamedTuple):
    """What x is normalised with, [N or 1, C]: mean and r = 1/sqrt(variance + eps); M, the elements
    behind each.
    """

    mean: Tensor
    inverse_deviation: Tensor
    count: int | Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls


def measure(
    norm: Norm,
    moments: Tensor,
    count: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Statistics:
    """Statistics from the moments of planes of `count` elements; running statistics, [C], are
    brought up to date in place.
    """
    mean, squares = moments
    own: dict[str | None, int] = {"instance": 1, "group": mean.shape[1] // (norm.num_groups or 1)}
    parts = own.get(norm.kind, mean.shape[0])
    total = count * parts
    if _is_one(parts):
        pooled_mean, pooled_squares = mean, squares
    # squared deviations combine exactly (Chan et al., 1979); E[x²] − E[x]² would lose them where
    # the mean is large
    else:
        pooled_mean = _pool(norm, mean) / max(parts, 1)
        deviations = mean - pooled_mean
        pooled_squares = _pool(norm, torch.addcmul(squares, count * deviations, deviations))
    if norm.processes > 1:
        pooled_mean, pooled_squares, total = _pool_processes(
            norm, pooled_mean, pooled_squares, total
        )
    variance = pooled_squares / (total if norm.processes > 1 else max(total, 1))
    updates = norm.processes > 1 or total > 0
    if running_mean is not None and running_var is not None and updates:
        with torch.no_grad():
            unbiased = pooled_squares / (total - 1)
            running_mean.lerp_(pooled_mean[0].to(running_mean.dtype), norm.momentum)
            running_var.lerp_(unbiased[0].to(running_var.dtype), norm.momentum)
    return Statistics(pooled_mean, torch.rsqrt(variance + norm.eps), total)


def given(
    running_mean: Tensor | None, running_var: Tensor | None, eps: float, dtype: torch.dtype
) -> Statistics:
    """Statistics from running statistics, [C]."""
    assert running_mean is not None and running_var is not None
    mean, variance = running_mean.to(dtype), running_var.to(dtype)
    return Statistics(mean[None], torch.rsqrt(variance[None] + eps), 1)


def identity(channels: int, dtype: torch.dtype, device: torch.device) -> Statistics:
    """Statistics that leave x as it is."""
    mean = torch.zeros(1, channels, dtype=dtype, device=device)
    return Statistics(mean, torch.ones_like(mean), 1)


def planes(
    statistics: Statistics,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Shift, scale and offset of each plane, [3, N, C], shape being (N, C): x̂ = (x − shift)·scale
    + offset.
    """
    mean, scale, _ = statistics
    offset = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype).expand_as(mean)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    return torch.stack([mean, scale, offset]).expand(3, *shape)


def backward_affine(
    statistics: Statistics, sums: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """From the planes' sums [2, N, C]: dweight and dbias, [C], None where there is no weight or
    bias.
    """
    q, q_deviation = sums
    dweight = (
        None
        if weight is None
        else (q_deviation * statistics.inverse_deviation).sum(0).to(weight.dtype)
    )
    return dweight, None if bias is None else q.sum(0).to(bias.dtype)


def backward(
    norm: Norm, statistics: Statistics, sums: Tensor, weight: Tensor | None = None
) -> Tensor | None:
    """From the planes' sums [2, N, C]: the terms of dx [2, N, C], None where x was not measured."""
    if not norm.measures:
        return None
    _, inverse_deviation, count = statistics
    pooled = _pool(norm, sums if weight is None else sums * weight.to(sums.dtype))
    if norm.processes > 1:
        dist.all_reduce(pooled, group=norm.process_group)
    terms = pooled * inverse_deviation / -(count if norm.processes > 1 else max(count, 1))
    terms[1].mul_(inverse_deviation).mul_(inverse_deviation)
    return terms.expand(sums.shape)


def _pool(norm, numbers):
    """The sum over each pool, [..., N, C] to [..., N or 1, C], repeated for all of a group's
    channels.
    """
    if norm.kind == "group":
        groups = numbers.reshape(
            *numbers.shape[:-1], norm.num_groups, numbers.shape[-1] // norm.num_groups
        )
        return groups.sum(-1, keepdim=True).expand_as(groups).flatten(-2)
    if norm.kind == "instance" or _is_one(numbers.shape[-2]):
        return numbers
    return numbers.sum(-2, keepdim=True)


def _is_one(size):
    """Whether a size is one in every call: one that somebody records may be another later."""
    return isinstance(size, int) and size == 1


def _pool_processes(norm, mean, squares, count):
    """The same from each process's pool, in one collective; the processes may hold batches of
    different sizes.
    """
    channels = mean.shape[1]
    own = torch.cat([mean[0], squares[0], mean.new_full((1,), count)])  # without a wait for it
    everyone = own.new_empty(norm.processes, own.numel())
    dist.all_gather(list(everyone.unbind(0)), own, group=norm.process_group)
    means, squares, counts = everyone.split([channels, channels, 1], dim=1)
    total = counts.sum()
    pooled_mean = (means * (counts / total)).sum(0, keepdim=True)
    pooled_squares = (squares + counts * (means - pooled_mean).square()).sum(0, keepdim=True)
    return pooled_mean, pooled_squares, total
