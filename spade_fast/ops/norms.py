"""The norms, on [N, C] numbers: kernels never see one.

Forward, a norm pools the moments of the planes that share their statistics: a plane alone
(instance), a channel's planes over the batch (batch) and over all processes (syncbatch), or those
of a group's channels (group). Backward, it pools their sums in the same way. With d = x − mean, r =
1/sqrt(variance + eps), w the affine weight, M the elements of a pool, q = g·(1 + γ):

    dx = r·w·q − r·Σ(w·q)/M − d·r³·Σ(w·q·d)/M        summed over the pool
    dweight = Σ r·q·d,  dbias = Σ q                  summed over all planes of a channel

The rows of numbers (moments, planes, sums, terms) are those of `kernels/contract.py`.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist


class Norm(NamedTuple):
    """Which norm, with its settings."""

    kind: str | None  # "instance", "batch", "syncbatch", "group", or None: x is modulated as it is
    num_groups: int | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    process_group: object = None

    @property
    def measures(self):
        """Whether x is normalised with its own moments, rather than with running statistics or not
        at all.
        """
        return self.kind in ("instance", "group") or (
            self.kind in ("batch", "syncbatch") and self.training
        )

    @property
    def processes(self):
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

    mean: torch.Tensor
    inverse_deviation: torch.Tensor
    count: int | torch.Tensor


def measure(norm, moments, count, running_mean=None, running_var=None):
    """Statistics from the moments of planes of `count` elements; running statistics, [C], are
    brought up to date in place.
    """
    mean, squares = moments
    parts = {"instance": 1, "group": mean.shape[1] // (norm.num_groups or 1)}.get(
        norm.kind, mean.shape[0]
    )
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
    if running_mean is not None and (norm.processes > 1 or total > 0):
        with torch.no_grad():
            unbiased = pooled_squares / (total - 1)
            running_mean.lerp_(pooled_mean[0].to(running_mean.dtype), norm.momentum)
            running_var.lerp_(unbiased[0].to(running_var.dtype), norm.momentum)
    return Statistics(pooled_mean, torch.rsqrt(variance + norm.eps), total)


def given(running_mean, running_var, eps, dtype):
    """Statistics from running statistics, [C]."""
    mean, variance = running_mean.to(dtype), running_var.to(dtype)
    return Statistics(mean[None], torch.rsqrt(variance[None] + eps), 1)


def identity(channels, dtype, device):
    """Statistics that leave x as it is."""
    mean = torch.zeros(1, channels, dtype=dtype, device=device)
    return Statistics(mean, torch.ones_like(mean), 1)


def planes(statistics, shape, weight=None, bias=None):
    """Shift, scale and offset of each plane, [3, N, C], shape being (N, C): x̂ = (x − shift)·scale
    + offset.
    """
    mean, scale, _ = statistics
    offset = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype).expand_as(mean)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    return torch.stack([mean, scale, offset]).expand(3, *shape)


def backward_affine(statistics, sums, weight, bias):
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


def backward(norm, statistics, sums, weight=None):
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
