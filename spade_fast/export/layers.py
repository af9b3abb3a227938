"""The modules that stand in an exported network for its SPADEs and for the other convolutions of a
label map, in plain PyTorch operators that every exporter knows. For AOTInductor alone, the
modulation is an operator of this package.

Two kinds of condition reach them. Features are tensors [N, label_nc, *spatial], as in the network
itself. A label map is a map of codes, float [N, 1, *spatial]: resizing it by nearest neighbour, as
networks do, leaves codes as they are, and float32 has every whole number below 2²⁴.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..convert.swap import Call, Called, Fast
from ..kernels.contract import MODULATION, sum_dtype
from ..kernels.operators import declared
from ..nn.modules import (
    CONVOLUTION_TYPES,
    INSTANCE_NORMS,
    Convolution,
    is_plain,
    is_watched,
    keeps_size,
)
from ..nn.parts import Convolutions, HasParts, Known
from ..nn.pixels import resize, same_size
from ..nn.spade import measures
from ..ops import norms
from ..recording import always
from .runs import CONVOLVE, assembled, convolve_runs
from .windows import number_again, number_windows

# Fewer pixels than this have too few equal windows for their numbering to pay.
WINDOWS_FROM = 1024
OPERATORS = declared("spade_fast", MODULATION)


class Seen(NamedTuple):
    """A call of a SPADE in the network itself."""

    group: int | str  # equal for calls with one condition and one size of x
    pixels: int  # of x
    factor: int  # how many times the condition's pixels are repeated along each axis to reach x


class Shared:
    """What the SPADEs of one network share within a call.

    kernels: whether they modulate by an operator of this package, which takes γ and β of pixels.
    gathers: whether features are resized by an index, instead of `F.interpolate`: at some sizes,
        as from 8 to 376 pixels, ONNX Runtime's own operator takes other pixels.
    """

    def __init__(self, kernels: bool = False, gathers: bool = False) -> None:
        self.kernels, self.gathers = kernels, gathers
        self.kept: dict[tuple, Any] = {}

    def get(self, key: tuple, of: torch.Tensor, make: Callable[[], Any]) -> Any:
        """What `make` returns, computed once for this key and tensor."""
        key = (id(of), of._version, *key)  # as it was: it may have been overwritten since
        if key not in self.kept:
            self.kept[key] = of, make()  # held, so that no other tensor gets its id
        return self.kept[key][1]


class Rows(nn.Module):
    """A convolution of codes: sums of rows, one of a table of its own for each tap.

    tables: [rows, channels] for each tap; bias: [channels].
    """

    def __init__(self, tables: Iterable[torch.Tensor], bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Buffer(bias)
        for tap, table in enumerate(tables):
            self.register_buffer(f"tap_{tap}", table.contiguous())

    def forward(self, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum over taps of the rows with these numbers: int64 [...] each to [..., channels]."""
        total: torch.Tensor = self.bias
        for tap, places in enumerate(numbers):
            total = total + self.get_buffer(f"tap_{tap}").index_select(0, places.flatten())
        return total.view(*numbers[0].shape, -1)


class LookedUp(nn.Module):
    """A convolution that takes a map of codes in place of the condition that they stand for. Any
    other input is convolved as before.
    """

    def __init__(self, conv: Convolution, palette: torch.Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.outside = palette.shape[0]
        self.rows = Rows(rows_of_codes(conv.weight, palette), bias_of(conv))
        self.has_looked_up = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == self.conv.in_channels:
            return self.conv(x)
        self.has_looked_up = True
        codes, conv = x[:, 0].long(), self.conv
        assert not isinstance(conv.padding, str)
        frame = [side for own in reversed(conv.padding) for side in (own, own)]
        codes = F.pad(codes, frame, value=self.outside)
        seen = taps_of_map(codes, conv.kernel_size, conv.stride, conv.dilation)
        return self.rows(seen).movedim(-1, 1)


def can_look_up(conv: Convolution) -> bool:
    """Whether `LookedUp` can stand for a convolution."""
    return conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def taps_of_map(
    codes: torch.Tensor, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[torch.Tensor]:
    """What each tap of a convolution sees of codes [N, *spatial], for every place of its result."""
    maps = [codes]
    for dim, (taps, step, wide) in enumerate(zip(size, stride, dilation), start=1):
        length = (codes.shape[dim] - (taps - 1) * wide - 1) // step + 1
        places = [
            (*[slice(None)] * dim, slice(first, first + (length - 1) * step + 1, step))
            for first in range(0, taps * wide, wide)
        ]
        maps = [one[place] for one in maps for place in places]
    return maps


def rows_of_codes(weight: torch.Tensor, palette: torch.Tensor) -> list[torch.Tensor]:
    """For each tap of a convolution's weight [out, in, *kernel], what it makes of each code, and of
    the last number, which is beyond the border: [codes + 1, out].
    """
    palette = F.pad(palette.to(weight), (0, 0, 0, 1))
    return [palette @ tap.t() for tap in weight.detach().flatten(2).unbind(2)]


def resized(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A map [..., *spatial] at another size, from the pixels that `F.interpolate(mode="nearest")`
    takes.
    """
    first = x.dim() - len(size)
    for dim, (given, wanted) in enumerate(zip(x.shape[first:], size), start=first):
        if always(given == wanted):
            continue
        if always(given % wanted == 0):
            x = x[(slice(None),) * dim + (slice(None, None, given // wanted),)]
            continue
        places = torch.arange(wanted, dtype=torch.float32, device=x.device)
        places = (places * (given / wanted)).floor().long().clamp(max=given - 1)
        x = x.index_select(dim, places)
    return x


class Standing(nn.Module):
    """A SPADE in an exported network: x and a condition to y. A subclass computes γ and β; a batch
    norm's running statistics and the 1 of 1 + γ are in the weights.
    """

    def __init__(self, spade: HasParts, seen: Seen, shared: Shared) -> None:
        super().__init__()
        known = Known.of(spade)
        assert known.convolutions is not None
        own = known.convolutions
        self.call = spade.call if isinstance(spade, Fast) else Call(type(spade).forward)
        self.seen, self.shared = seen, shared
        self.taps = own.gamma.kernel_size[0]
        self.activations = nn.Sequential(*map(out_of_place, own.activations))
        self.gamma_norm, self.beta_norm = precise(own.gamma_norm), precise(own.beta_norm)
        self.hidden, self.channels = own.shared.out_channels, own.channels
        norm = known.parts.norm
        self.norm: nn.Module | None = norm if shared.kernels else precise(norm)
        planes = None if own.normalise else running_planes(known)
        if planes is not None:
            self.norm = None
        self.plus_one = spade.spade_form.plus_one
        weights = [one.to(own.gamma.weight) for one in modulation(own, planes, self.plus_one)]
        self.gamma, self.of_gamma, self.beta, self.of_beta = map(nn.Buffer, weights)
        self.first = own.shared
        self.channels_last = self.is_followed = False

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        pair = self.call.pair(arguments, named, Called())
        if pair is None:
            raise ValueError(
                "the network calls a SPADE with more than x and a condition, which an exported one"
                " does not take"
            )
        x, condition = pair
        hidden = self.see(condition, x.shape[2:])
        gamma = self.convolved(hidden, self.gamma, self.of_gamma)
        beta = self.convolved(hidden, self.beta, self.of_beta)
        if self.shared.kernels:
            return self.by_kernels(x, *self.normalised(gamma, beta))
        x = x if self.norm is None else self.norm(x)
        if self.channels_last:
            # Rows of a table have their channels together: with x transposed instead, ONNX Runtime
            # drops the transpositions beside a convolution.
            product = x.movedim(1, -1) * gamma
            y, product = (product + beta).movedim(-1, 1), product.movedim(-1, 1)
        else:
            gamma, beta = self.normalised(gamma, beta)
            product = x * gamma
            y = product + beta
        if self.is_followed:
            self.shared.get(("product", id(self)), y, lambda: (product, hidden))
        return y

    def normalised(
        self, gamma: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor and the summand, after the norms that γ and β may have of their own."""
        gamma = gamma if self.gamma_norm is None else self.gamma_norm(gamma) + self.plus_one
        return gamma, beta if self.beta_norm is None else self.beta_norm(beta)

    def by_kernels(self, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """The modulation by an operator of this package."""
        norm, settings = self.norm, (None, 0.0, False, False)  # no activation, no signs, no 1 +
        eps = norm.eps if norm is not None and is_bare(norm) else None
        if norm is not None and eps is None:
            x = norm(x)
        x, gamma, beta = torch.broadcast_tensors(x, gamma, beta)  # either may have a batch of 1
        if eps is not None:
            return OPERATORS["instance_forward"](x, gamma, beta, None, eps, *settings)[0]
        unchanged = norms.identity(x.shape[1], sum_dtype(x.dtype), x.device)
        planes = norms.planes(unchanged, x.shape[:2])
        return OPERATORS["apply"](x, planes, gamma, beta, None, *settings)[0]

    def see(self, condition: torch.Tensor, size: Sequence[int]) -> Any:
        """The hidden map at this size, in the form that `convolved` takes."""
        raise NotImplementedError

    def convolved(self, hidden: Any, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """A convolution of the hidden map, whose weight and bias are `prepared`: [N, out, *size];
        with `channels_last`, [N, *size, out].
        """
        raise NotImplementedError

    def prepared(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[nn.Buffer, nn.Buffer]:
        """A convolution's weight [out, hidden, *kernel] and bias, in the form of `convolved`."""
        return nn.Buffer(weight), nn.Buffer(bias)

    def prepare(self) -> None:
        """Prepares the weights, when no other module needs them as they are any more."""
        self.gamma, self.of_gamma = self.prepared(self.gamma, self.of_gamma)
        self.beta, self.of_beta = self.prepared(self.beta, self.of_beta)


class OfFeatures(Standing):
    """A SPADE whose condition is features. Where nearest neighbour enlarges them, their convolution
    is computed on runs.

    SPADEs of one size could share that convolution, but it would be as much work, and its result
    would leave the memory layout that ONNX Runtime has for convolutions, in order to be split.

    enlarges: whether that is so in the latest call. With any sizes it is so only where the network
        itself makes the size of x from that of the features.
    """

    enlarges = False

    def see(self, condition: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        factor = self.seen.factor
        enlarged = [length * factor for length in condition.shape[2:]]
        self.enlarges = factor > 1 and same_size(enlarged, size)
        if not self.enlarges:
            key = ("resized", *map(str, size))
            own = resized if self.shared.gathers else resize
            condition = self.shared.get(key, condition, lambda: own(condition, size))
            return self.activations(self.first(condition))
        parts = convolve_runs(condition, factor, self.first.weight, bias_of(self.first))
        return assembled([self.activations(part) for part in parts], factor, self.taps)

    def convolved(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return CONVOLVE[hidden.dim() - 2](hidden, weight, bias, padding=self.taps // 2)


class OfLabels(Standing):
    """A SPADE whose condition is a map of codes: the first convolution looks them up. With
    `windows`, γ and β are computed once for each distinct window. SPADEs that see one map at one
    size share the look-up.
    """

    rows: Rows

    def __init__(
        self, spade: HasParts, seen: Seen, shared: Shared, palette: torch.Tensor, windows: bool
    ) -> None:
        super().__init__(spade, seen, shared)
        self.palette, self.outside, self.windows = palette, palette.shape[0], windows
        self.group: list[OfLabels] = [self]
        self.channels_last = windows and self.gamma_norm is None is self.beta_norm

    def prepare(self) -> None:
        super().prepare()
        if self.group[0] is self:
            weight, bias = joined(self.group)
            self.rows = Rows(rows_of_codes(weight, self.palette), bias)

    def prepared(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[nn.Buffer, nn.Buffer]:
        return by_runs(weight, bias) if self.windows else super().prepared(weight, bias)

    def see(self, condition: torch.Tensor, size: Sequence[int]) -> Any:
        lead = self.group[0]
        codes = self.shared.get(
            ("codes", *map(str, size)),
            condition,
            lambda: resized(condition[:, 0].long(), size),
        )
        dims = codes.dim() - 1
        if not self.windows:

            def make():
                padded = F.pad(codes, [self.taps // 2] * 2 * dims, value=self.outside)
                ones = (1,) * dims
                maps = taps_of_map(padded, (self.taps,) * dims, ones, ones)
                return [self.activations(lead.rows(maps).movedim(-1, 1))]

            return self.of_group(condition, size, make)[0]

        def number():
            hidden = number_windows(codes, self.taps, self.outside)
            return hidden.contents, number_again(hidden, self.taps)

        key = ("windows", self.taps, *map(str, size))
        seen, found = self.shared.get(key, condition, number)
        (hidden,) = self.of_group(
            condition, size, lambda: [self.activations(lead.rows(seen.unbind(1)))]
        )
        hidden = F.pad(hidden, (0, 0, 0, 1))  # the last row, of zeros, is beyond the border
        runs = hidden.index_select(0, found.runs.flatten()).view(-1, self.taps * self.hidden)
        return runs, found

    def of_group(
        self,
        condition: torch.Tensor,
        size: Sequence[int],
        make: Callable[[], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """This SPADE's channels, along axis 1, of what `make` computes for its whole group."""
        channels = [one.hidden for one in self.group]

        def split():
            return [part.split(channels, dim=1) if len(channels) > 1 else [part] for part in make()]

        key = (id(self.group), *map(str, size))
        place = self.group.index(self)
        return [part[place] for part in self.shared.get(key, condition, split)]

    def convolved(self, hidden: Any, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if not self.windows:
            return CONVOLVE[hidden.dim() - 2](hidden, weight, bias, padding=self.taps // 2)
        runs, found = hidden
        rows = of_windows(runs, found.windows, weight, bias).index_select(0, found.index.flatten())
        y = rows.view(*found.index.shape, -1)
        return y if self.channels_last else y.movedim(-1, 1)


def of_windows(
    runs: torch.Tensor, windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """A convolution of windows, [K, out]: along the last axis a product, along the others a sum.

    runs: [R, taps · hidden]; windows: [K, taps of the other axes], of the runs; weight, bias: see
    `by_runs`.
    """
    taps = windows.shape[1]
    rows = torch.addmm(bias, runs, weight).view(-1, len(bias) // taps)
    # ONNX Runtime adds several tensors faster than it sums an axis of one.
    places = (windows * taps + torch.arange(taps, device=windows.device)).unbind(1)
    return functools.reduce(torch.add, [rows.index_select(0, place) for place in places])


def by_runs(weight: torch.Tensor, bias: torch.Tensor) -> tuple[nn.Buffer, nn.Buffer]:
    """A convolution's weight [out, in, *kernel] as [taps of the last axis · in, taps of the others
    · out], and its bias [out] as [taps of the others · out]: only the middle one, which no window
    lacks, has it.
    """
    rows = weight.flatten(2, -2) if weight.dim() > 3 else weight[:, :, None]
    others = rows.shape[2]
    middle = torch.zeros(others, len(bias)).to(bias)
    middle[others // 2] = bias
    rows = rows.permute(3, 1, 2, 0).flatten(2).flatten(0, 1)  # [tap, in, other, out]
    return nn.Buffer(rows.contiguous()), nn.Buffer(middle.flatten())


class Following(nn.Module):
    """A convolution with one tap per axis of what a SPADE returns: conv(x · γ + β) is conv(x · γ)
    plus conv(β), and the latter is one convolution of the hidden map, with fewer channels than β
    has. Any other input is convolved as before.
    """

    @classmethod
    def of(cls, conv: nn.Module, spade: nn.Module) -> "Following | None":
        """What can stand for a convolution of what a SPADE returns; None if that does not pay."""
        if not isinstance(spade, Standing) or not is_plain(conv, CONVOLUTION_TYPES):
            return None
        assert isinstance(conv, CONVOLUTION_TYPES)
        if not keeps_size(conv, 1) or conv.out_channels >= spade.channels:
            return None
        # An operator of this package returns y alone.
        return cls(conv, spade) if spade.beta_norm is None and not spade.shared.kernels else None

    def __init__(self, conv: Convolution, spade: Standing) -> None:
        super().__init__()
        self.conv, self.spades = conv, (spade,)  # which remains a module of the network alone
        own = conv.weight.detach().flatten(1).double()
        weight = torch.tensordot(own, spade.beta.double(), 1).to(spade.beta)
        self.beta, self.of_beta = spade.prepared(weight, (own @ spade.of_beta.double()).to(weight))
        spade.is_followed = True

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        (spade,) = self.spades
        product, hidden = spade.shared.get(("product", id(spade)), y, lambda: (None, None))
        if product is None:
            return self.conv(y)
        beta = spade.convolved(hidden, self.beta, self.of_beta)
        return self.conv(product) + (beta.movedim(-1, 1) if spade.channels_last else beta)


class VolumeNorm(nn.Module):
    """An instance norm of volumes without running statistics, by means of one axis after another:
    ONNX Runtime's own sums all voxels one by one, which rounds too much.
    """

    def __init__(self, norm: nn.InstanceNorm3d) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - mean_of_planes(x)
        y = x * torch.rsqrt(mean_of_planes(x * x) + self.eps)
        if self.weight is not None:
            y = y * self.weight.view(-1, 1, 1, 1)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1, 1)


def mean_of_planes(x: torch.Tensor) -> torch.Tensor:
    """The mean of each plane of x [N, C, *spatial], [N, C, 1, …]."""
    for dim in range(x.dim() - 1, 1, -1):
        x = x.mean(dim, keepdim=True)
    return x


def is_bare(norm: nn.Module) -> bool:
    """Whether a norm is an instance norm without parameters and running statistics."""
    own = type(norm) in INSTANCE_NORMS.values() and not is_watched(norm)
    return own and norm.weight is None is norm.running_mean


def precise(norm: nn.Module | None) -> Any:
    """A norm, or what stands for it where ONNX Runtime rounds too much."""
    if type(norm) is nn.InstanceNorm3d and norm.running_mean is None and not is_watched(norm):
        return VolumeNorm(norm)
    return norm


def out_of_place(activation: nn.Module) -> nn.Module:
    """The activation, which does not overwrite its input: parts of a hidden map are views of it."""
    activation = copy.copy(activation)
    if hasattr(activation, "inplace"):
        setattr(activation, "inplace", False)
    return activation


def joined(group: Sequence[Standing]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and the bias of the first convolutions of SPADEs, as of one convolution."""
    first = [one.first for one in group]
    for one in group:
        del one.first  # otherwise a program would have its weight twice
    weight = torch.cat([conv.weight.detach() for conv in first])
    return weight, torch.cat([bias_of(conv) for conv in first])


def bias_of(conv: Convolution) -> torch.Tensor:
    if conv.bias is None:
        return conv.weight.new_zeros(conv.out_channels)
    return conv.bias.detach()


def running_planes(known: Known) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The factor and the summand [C], float64, to which a batch norm's running statistics amount;
    None if x is normalised in another way.
    """
    norm = known.own_norm
    if norm is None or measures(norm) or isinstance(norm, nn.GroupNorm):
        return None
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    factor = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    summand = -mean.double() * factor
    return factor, summand if norm.bias is None else summand + norm.bias.detach().double()


def modulation(
    own: Convolutions, planes: tuple[torch.Tensor, torch.Tensor] | None, plus_one: bool
) -> Sequence[torch.Tensor]:
    """The weights and biases, float64, of the convolutions that compute x's factor and summand:
    weight, bias, weight, bias. The factor is 1 + γ with `plus_one`, otherwise γ, and γ alone if it
    has a norm of its own. With `planes`, they are those of an x that is not normalised.
    """
    (gamma, of_gamma), (beta, of_beta) = (
        (weight.detach().double(), weight.new_zeros(len(weight)) if bias is None else bias.detach())
        for weight, bias in own.projections()
    )
    of_gamma, of_beta = of_gamma.double(), of_beta.double()
    if own.gamma_norm is None:
        of_gamma = of_gamma + plus_one
    if planes is not None:
        factor, summand = planes
        wide = (-1, *[1] * (gamma.dim() - 1))
        beta, of_beta = beta + summand.view(wide) * gamma, of_beta + summand * of_gamma
        gamma, of_gamma = factor.view(wide) * gamma, factor * of_gamma
    return gamma, of_gamma, beta, of_beta
