"""The norms, as arithmetic on [N, C] tensors. Kernels that pass over x know none of them, except
those that compute instance norm in one pass. Batch norm's arithmetic has kernels of its own: for
each layer and step of training they replace 21 of PyTorch's launches (1678 fell to 1336 for the
published generator at batch 16).

Forward, a norm pools the moments of the planes that share statistics: each plane alone (instance),
a channel's planes over the batch (batch) and over all processes (syncbatch), or the planes of a
group's channels (group). Backward, it pools their sums in the same way. With d = x − mean, r =
1/sqrt(variance + eps), w the affine weight, M the number of elements in a pool, g = dy times
the activation's derivative, f the factor (1 + γ, or γ with plus_one=False) and q = g·f:

    dx = r·w·q − r·Σ(w·q)/M − d·r³·Σ(w·q·d)/M        summed over the pool
    dweight = Σ r·q·d,  dbias = Σ q                  summed over all planes of a channel

`kernels/contract.py` defines moments, planes, sums and terms.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.contract import Backend, sum_dtype

Kind = Literal["instance", "batch", "syncbatch", "group"]
Running = tuple[Tensor | None, Tensor | None]  # mean and variance


class Norm(NamedTuple):
    """A norm and its settings."""

    kind: Kind | None  # None: x is not normalised
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
    def pools_batch(self) -> bool:
        """Whether each channel is normalised with the moments of this process's batch."""
        return self.kind in ("batch", "syncbatch") and self.training and self.processes == 1

    @property
    def processes(self) -> int:
        """The number of processes that share statistics."""
        if (
            self.kind != "syncbatch"
            or not self.training
            or not dist.is_available()
            or not dist.is_initialized()
        ):
            return 1
        return dist.get_world_size(self.process_group)


class Statistics(NamedTuple):
    """What x is normalised with: mean and r = 1/sqrt(variance + eps), both [N or 1, C], and M, the
    number of elements behind each.
    """

    mean: Tensor
    inverse_deviation: Tensor
    count: int | Tensor  # type: ignore[assignment]  # hides tuple.count, which is never called


def statistics_and_planes(
    norm: Norm,
    backend: Backend,
    x: Tensor,
    moments: Tensor | None,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Statistics, Tensor]:
    """The statistics of x [N, C, *spatial], and its planes, which include the norm's own weight and
    bias. moments: `plane_moments(x)`, if x is measured. Running statistics are read, or updated in
    place.
    """
    shape, dtype = x.shape[:2], sum_dtype(x.dtype)
    if norm.kind is None:
        statistics = identity(x.shape[1], dtype, x.device)
    elif moments is None:
        mean, variance = running
        own = backend.running_planes(x, mean, variance, None, None, norm.eps)
        statistics = Statistics(own[0, :1], own[1, :1], 1)
        if weight is None and bias is None:
            return statistics, own
        return statistics, backend.running_planes(x, mean, variance, weight, bias, norm.eps)
    elif norm.pools_batch:
        own, found = backend.batch_planes(x, moments, weight, bias, norm.eps)
        pooled_mean, inverse_deviation, unbiased = found.split(1)
        total = x.shape[0] * x.shape[2:].numel()
        _update(running, pooled_mean, unbiased, norm.momentum, total > 0)
        return Statistics(pooled_mean, inverse_deviation, total), own
    else:
        statistics = measure(norm, moments, x.shape[2:].numel(), *running)
    return statistics, planes(statistics, shape, weight, bias)


def _update(running, mean, unbiased, momentum, is_measured):
    """Updates running statistics, [C], in place, by those of a batch, [1, C]."""
    if running[0] is not None and running[1] is not None and is_measured:
        with torch.no_grad():
            for own, new in zip(running, (mean, unbiased)):
                own.lerp_(new[0].to(own.dtype), momentum)


def measure(
    norm: Norm,
    moments: Tensor,
    count: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Statistics:
    """Statistics from the moments of planes of `count` elements each. Running statistics, [C], are
    updated in place.
    """
    mean, squares = moments
    own: dict[str | None, int] = {"instance": 1, "group": mean.shape[1] // (norm.num_groups or 1)}
    parts = own.get(norm.kind, mean.shape[0])
    total = count * parts
    if _is_one(parts):
        pooled_mean, pooled_squares = mean, squares
    # Squared deviations combine exactly (Chan et al., 1979); E[x²] − E[x]² would lose them where
    # the mean is large.
    else:
        pooled_mean = _pool(norm, mean) / max(parts, 1)
        deviations = mean - pooled_mean
        pooled_squares = _pool(norm, torch.addcmul(squares, count * deviations, deviations))
    if norm.processes > 1:
        pooled_mean, pooled_squares, total = _pool_processes(
            norm, pooled_mean, pooled_squares, total
        )
    variance = pooled_squares / (total if norm.processes > 1 else max(total, 1))
    if running_mean is not None:
        unbiased = pooled_squares / (total - 1)
        is_measured = norm.processes > 1 or total > 0
        _update((running_mean, running_var), pooled_mean, unbiased, norm.momentum, is_measured)
    return Statistics(pooled_mean, torch.rsqrt(variance + norm.eps), total)


def given(
    running_mean: Tensor | None, running_var: Tensor | None, eps: float, dtype: torch.dtype
) -> Statistics:
    """Statistics from running statistics, [C]."""
    assert running_mean is not None and running_var is not None
    mean, variance = running_mean.to(dtype), running_var.to(dtype)
    return Statistics(mean[None], torch.rsqrt(variance[None] + eps), 1)


def identity(channels: int, dtype: torch.dtype, device: torch.device) -> Statistics:
    """Statistics that leave x unchanged."""
    mean = torch.zeros(1, channels, dtype=dtype, device=device)
    return Statistics(mean, torch.ones_like(mean), 1)


def planes(
    statistics: Statistics,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Shift, scale and offset of each plane, [3, N, C], for shape = (N, C): x̂ = (x − shift)·scale
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
    """dweight and dbias, [C], from the planes' sums [2, N, C]; None where there is no weight or no
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
    norm: Norm,
    backend: Backend,
    x: Tensor,
    statistics: Statistics,
    sums: Tensor,
    weight: Tensor | None = None,
) -> Tensor | None:
    """The terms of dx [2, N, C], from the planes' sums [2, N, C]; None if x was not measured."""
    if not norm.measures:
        return None
    _, inverse_deviation, count = statistics
    if norm.pools_batch:
        return backend.batch_terms(x, sums, inverse_deviation, weight)
    pooled = _pool(norm, sums if weight is None else sums * weight.to(sums.dtype))
    if norm.processes > 1:
        dist.all_reduce(pooled, group=norm.process_group)
    terms = pooled * inverse_deviation / -(count if norm.processes > 1 else max(count, 1))
    terms[1].mul_(inverse_deviation).mul_(inverse_deviation)
    return terms.expand(sums.shape)


def _pool(norm, numbers):
    """The sum over each pool: [..., N, C] becomes [..., N or 1, C]. A group's sum is repeated for
    each of its channels.
    """
    if norm.kind == "group":
        groups = numbers.reshape(
            *numbers.shape[:-1], norm.num_groups, numbers.shape[-1] // norm.num_groups
        )
        return groups.sum(-1, keepdim=True).expand_as(groups).reshape(numbers.shape)
    if norm.kind == "instance" or _is_one(numbers.shape[-2]):
        return numbers
    return numbers.sum(-2, keepdim=True)


def _is_one(size):
    """Whether a size is 1 in every call. A symbolic size, in a recorded graph, may vary."""
    return isinstance(size, int) and size == 1


def _pool_processes(norm, mean, squares, count):
    """Mean, squared deviations and count over all processes, from each process's own, in one
    collective. The processes may hold batches of different sizes.
    """
    channels = mean.shape[1]
    own = torch.cat([mean[0], squares[0], mean.new_full((1,), count)])  # no wait for the GPU
    everyone = own.new_empty(norm.processes, own.numel())
    dist.all_gather(list(everyone.unbind(0)), own, group=norm.process_group)
    means, squares, counts = everyone.split([channels, channels, 1], dim=1)
    total = counts.sum()
    pooled_mean = (means * (counts / total)).sum(0, keepdim=True)
    pooled_squares = (squares + counts * (means - pooled_mean).square()).sum(0, keepdim=True)
    return pooled_mean, pooled_squares, total
