"""A semantic layout as small whole numbers, and its distinct windows: what makes γ and β cheap on
label maps.

γ and β at a pixel depend on the condition in a small window around it alone, and a layout has few
distinct windows. So each one is computed once, and looked up: the same function, sums in another
order. A condition [N, label_nc, *spatial] is held as codes, and a palette: the condition's vector
for each code. The condition itself is never made.
"""

import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import kernels

LARGEST_KERNEL = 7  # taps per axis of a window


class Sums(NamedTuple):
    """What windows see, as sums of rows: sum i is over rows[offsets[i]:offsets[i + 1]], each row ·
    taps + tap.

    And the other way round, for backward: row · taps + tap is in the sums
    back_rows[back_offsets[…]:back_offsets[… + 1]]. All int32, on the layout's device; a tap beyond
    the border sees nothing, and is left out.
    """

    offsets: torch.Tensor
    rows: torch.Tensor
    back_offsets: torch.Tensor
    back_rows: torch.Tensor


class Windows(NamedTuple):
    """The distinct windows of a layout at one size, for convolutions of one kernel size.

    hidden: the windows of codes that the first convolution sees, K1 of them, as sums of the
        palette's rows.
    table: the windows of those that γ and β see, K2 of them, as sums of hidden rows.
    index: [N, *size], which of the K2 each pixel has; order: [N, pixels], each image's pixels
        sorted by it. Both int32.
    """

    hidden: Sums
    table: Sums
    index: torch.Tensor
    order: torch.Tensor

    @property
    def hidden_count(self):
        """K1, the rows of the hidden map."""
        return len(self.hidden.offsets) - 1

    @property
    def count(self):
        """K2, the rows of γ and β."""
        return len(self.table.offsets) - 1

    @property
    def index_of_images(self):
        """index, where each image has rows of its own for its windows: image n has those from n ·
        K2 on.
        """
        images = torch.arange(len(self.index), dtype=torch.int32, device=self.index.device)
        return self.index + images.view(-1, *[1] * (self.index.dim() - 1)) * self.count

    @property
    def shares(self):
        """How much of each image each window takes, [N, K2], float64: one over the pixels, for each
        that has it.
        """
        pixels = self.index.flatten(1).long()
        shares = torch.zeros(len(pixels), self.count, dtype=torch.float64, device=pixels.device)
        return shares.scatter_add_(
            1, pixels, torch.ones((), dtype=torch.float64, device=pixels.device).expand_as(pixels)
        ).div_(max(1, pixels.shape[1]))


class Patches(NamedTuple):
    """The distinct windows that one convolution of a layout sees, of any kernel size, stride and
    padding.

    contents: [K, taps], the codes that each sees, −1 beyond the border; sums: the same as sums of
        the palette's rows.
    index: [N, *size of the result], which of the K each place has; order: [N, places], each image's
        places sorted by it. All int32.
    """

    contents: torch.Tensor
    sums: Sums
    index: torch.Tensor
    order: torch.Tensor


class SemanticLayout:
    """A batch of semantic layouts: codes [N, *spatial], int32, and a palette [P, label_nc] of the
    vectors that they stand for.

    Made by `from_labels` or `from_segmap`. Wherever the project takes a condition [N, label_nc,
    *spatial], it takes this.
    """

    def __init__(self, codes, palette):
        if codes.dtype != torch.int32 or codes.dim() < 2 or codes.dim() > 4:
            raise ValueError(
                f"codes is {codes.dtype} {list(codes.shape)}, it should be int32 [N, *spatial]"
                " with 1 to 3 dimensions"
            )
        if palette.dim() != 2 or not palette.is_floating_point():
            raise ValueError(
                f"palette is {palette.dtype} {list(palette.shape)}, it should be floating-point"
                " [P, label_nc]"
            )
        if palette.device != codes.device:
            raise ValueError(
                f"palette is on {palette.device}, it should be on the codes' device, {codes.device}"
            )
        if codes.is_cpu and codes.numel() and not torch.compiler.is_compiling():
            least, most = codes.aminmax()
            if least < 0 or most >= len(palette):
                raise ValueError(
                    f"codes has numbers from {least} to {most}, they should be rows of the"
                    f" palette, 0 to {len(palette) - 1}"
                )
        self.codes, self.palette = codes, palette
        self._windows, self._patches, self._pooled = {}, {}, {}
        self._repeats = None  # of which layout this is how many times over

    @classmethod
    def from_labels(cls, labels, num_classes, instances=None, dont_care=None):
        """The one-hot layout of a label map, with the instance-edge channel of the published
        preprocessing.

        Args:
            labels: whole numbers [N, *spatial], torch or NumPy, 0 to num_classes − 1, and
                `dont_care`.
            num_classes: classes, without "don't care".
            instances: whole numbers of the same shape: one channel more is 1 where a direct
                neighbour has another number.
            dont_care: a label that becomes one more class, num_classes.

        Raises:
            ValueError, TypeError: an argument is not so; of a label out of range, which, how many
                and where the first one is.
        """
        labels = _whole_numbers("labels", labels)
        channels = num_classes + (dont_care is not None)
        codes = labels.long()
        if dont_care is not None:
            codes = torch.where(codes == dont_care, num_classes, codes)
        _check_range(labels, codes, channels, num_classes, dont_care)
        if instances is not None:
            instances = _whole_numbers("instances", instances)
            if instances.shape != labels.shape:
                raise ValueError(
                    f"instances has shape {list(instances.shape)}, it should be that of labels,"
                    f" {list(labels.shape)}"
                )
            codes = codes + channels * instance_edges(instances)
        present = torch.bincount(codes.flatten(), minlength=1).nonzero().squeeze(1)
        palette = F.one_hot(present % channels, channels).float()
        if instances is not None:
            palette = torch.cat([palette, (present // channels)[:, None].float()], dim=1)
        compact = torch.zeros(
            int(present[-1]) + 1 if len(present) else 1, dtype=torch.int32, device=codes.device
        )
        compact[present] = torch.arange(len(present), dtype=torch.int32, device=codes.device)
        return cls(compact[codes], palette)

    @classmethod
    def from_segmap(cls, segmap):
        """The layout of any condition [N, label_nc, *spatial] that is piecewise constant: one-hot,
        multi-hot, edges, noise per image.

        Its vectors are compared bit for bit. None where they are so many that looking them up would
        not pay, as in dense features.
        """
        if (
            not isinstance(segmap, torch.Tensor)
            or not segmap.is_floating_point()
            or not 3 <= segmap.dim() <= 5
        ):
            raise ValueError(
                "segmap should be a floating-point tensor [N, label_nc, *spatial] with 1 to 3"
                " spatial dimensions"
            )
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # what is found in inference may be used in training
                return cls.from_segmap(segmap)
        segmap = segmap.detach()
        found = kernels.select(segmap).find_codes(segmap)
        if found is None:
            return None
        codes, places = found
        pixels = max(1, segmap.shape[2:].numel())
        return cls(codes, segmap.flatten(2)[places // pixels, :, places % pixels])

    @classmethod
    def stack(cls, layouts):
        """One batch of several layouts, in their order: a data loader's `collate_fn`. Windows that
        all of them have are kept.

        Errors: ValueError where they differ in size, channels, dtype or device.
        """
        layouts = list(layouts)
        kinds = {
            (layout.codes.shape[1:], layout.label_nc, layout.palette.dtype, layout.device)
            for layout in layouts
        }
        if len(kinds) != 1:
            raise ValueError(
                "layouts should be one or more of one size, with the same channels, dtype and"
                " device;"
                f" they are {', '.join(map(repr, layouts)) or 'none'}"
            )
        stack = cls(
            _side_by_side([(layout.codes, len(layout.palette)) for layout in layouts]),
            torch.cat([layout.palette for layout in layouts]),
        )
        for key in set.intersection(*(set(layout._windows) for layout in layouts)):
            parts = [layout._windows[key] for layout in layouts]
            index = _side_by_side([(part.index, part.count) for part in parts])
            hidden, table = (_stack_sums([part[which] for part in parts]) for which in range(2))
            stack._windows[key] = Windows(
                hidden, table, index, torch.cat([part.order for part in parts])
            )
        return stack

    def to_segmap(self, dtype=torch.float32):
        """The condition [N, label_nc, *spatial] itself."""
        return self.palette.to(dtype)[self.codes.long()].movedim(-1, 1).contiguous()

    def resize(self, size):
        """The layout at another size, by nearest neighbour."""
        return SemanticLayout(resize_codes(self.codes, size), self.palette)

    def avg_pool(self, kernel_size, stride=None, padding=0, count_include_pad=True):
        """The layout of `F.avg_pool2d(condition, …)` (or 1d, 3d): each distinct window of codes
        becomes a code, its mean a vector, in
        float64: a network rounds it to its own dtype.

        Args:
            kernel_size: taps per axis, up to 7.
            stride: from window to window, kernel_size where None.
            padding: zeros around the condition, less than half of kernel_size.
            count_include_pad: whether those zeros count in the mean.

        Errors: ValueError where an argument is not so, or the layout is smaller than a window.
        """
        stride = kernel_size if stride is None else stride
        if (
            not 1 <= kernel_size <= LARGEST_KERNEL
            or stride < 1
            or not 0 <= 2 * padding < kernel_size
        ):
            raise ValueError(
                f"kernel_size is {kernel_size}, stride {stride}, padding {padding}: they should be"
                f" 1 to {LARGEST_KERNEL},"
                " 1 or more, and less than half of kernel_size"
            )
        key = (kernel_size, stride, padding, count_include_pad)
        if key in self._pooled:
            return self._pooled[key]
        if self._repeats:
            layout, times = self._repeats
            pooled = layout.avg_pool(*key).repeat(times)
        else:
            patches = self.patches(kernel_size, stride, padding)
            vectors = torch.cat(
                [self.palette, self.palette.new_zeros(1, self.label_nc)]
            ).double()  # −1, beyond the border, is the last
            sums = sum(vectors[codes.long()] for codes in patches.contents.unbind(1))
            taps = patches.contents.shape[1]
            counts = (
                taps
                if count_include_pad
                else (patches.contents >= 0).sum(1, keepdim=True).to(sums.dtype)
            )
            pooled = SemanticLayout(patches.index, sums / counts)
        if not self.palette.requires_grad:
            self._pooled[key] = pooled
        return pooled

    def patches(self, kernel_size, stride, padding):
        """The Patches of a convolution of the condition with such a kernel, stride and padding.
        Made once, then kept.
        """
        key = (kernel_size, stride, padding)
        if key in self._patches:
            return self._patches[key]
        if self._repeats:
            layout, times = self._repeats
            contents, sums, index, order = layout.patches(*key)
            self._patches[key] = Patches(
                contents, sums, _repeat(index, times), _repeat(order, times)
            )
        else:
            self._patches[key] = number_patches(
                self.codes, kernel_size, stride, padding, len(self.palette)
            )
        return self._patches[key]

    def repeat(self, times):
        """The layouts of this batch, all of them so many times over: for several images of each.
        They share their windows.
        """
        if times == 1:
            return self
        repeated = SemanticLayout(_repeat(self.codes, times), self.palette)
        repeated._repeats = (self, times)
        return repeated

    def windows(self, size, kernel_size):
        """The Windows at this size, *spatial, for convolutions of this kernel size. Made once, then
        kept.
        """
        key = (tuple(size), kernel_size)
        if key not in self._windows:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"the layout has no windows of size {key[0]} yet: prepare([{key[0]}],"
                    f" {kernel_size}) before the compiled"
                    " call"
                )
            if len(key[0]) != self.codes.dim() - 1:
                raise ValueError(
                    f"size is {key[0]}, it should have the layout's {self.codes.dim() - 1}"
                    " dimensions"
                )
            if kernel_size % 2 == 0 or not 1 <= kernel_size <= LARGEST_KERNEL:
                raise ValueError(
                    f"kernel_size is {kernel_size}, it should be odd, from 1 to {LARGEST_KERNEL}"
                )
            if self._repeats:
                layout, times = self._repeats
                hidden, table, index, order = layout.windows(*key)
                self._windows[key] = Windows(
                    hidden, table, _repeat(index, times), _repeat(order, times)
                )
            else:
                self._windows[key] = number(
                    resize_codes(self.codes, key[0]), kernel_size, len(self.palette)
                )
        return self._windows[key]

    def prepare(self, sizes, kernel_size):
        """Makes the windows of these sizes ahead, in a data loader's worker for instance. Returns
        the layout.

        A compiled network needs that, in the process that calls it: then one compilation does for
        all layouts.
        """
        for size in sizes:
            windows = self.windows(size, kernel_size)
            if (
                "torch._dynamo" in sys.modules
            ):  # else nothing has been compiled, and importing it takes more than a second
                for tensor in filter(
                    torch.is_tensor, (self.palette, *windows.hidden, *windows.table)
                ):
                    torch._dynamo.decorators.mark_unbacked(
                        tensor, 0
                    )  # each layout has another number of rows
        return self

    def to(self, device):
        """The layout with all its windows on this device; itself where it is there."""
        if torch.device(device) == self.codes.device:
            return self
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """The layout with all its windows in pinned memory, for a data loader."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, function):
        layout = SemanticLayout(function(self.codes), function(self.palette))
        for key, windows in self._windows.items():
            sums = (Sums(*map(function, part)) for part in windows[:2])
            layout._windows[key] = Windows(*sums, function(windows.index), function(windows.order))
        for key, (contents, sums, *places) in self._patches.items():
            layout._patches[key] = Patches(
                function(contents), Sums(*map(function, sums)), *map(function, places)
            )
        for key, pooled in self._pooled.items():
            layout._pooled[key] = pooled._mapped(function)
        return layout

    def stats(self):
        """Distinct windows per pixel, by (size, kernel size), of those sizes that have been needed:
        (K1, K2) over pixels.
        """
        return {
            key: (
                windows.hidden_count / max(1, windows.index.numel()),
                windows.count / max(1, windows.index.numel()),
            )
            for key, windows in self._windows.items()
        }

    def equal(self, other):
        """Whether other is a layout of the same codes and palette."""
        return (
            isinstance(other, SemanticLayout)
            and torch.equal(self.codes, other.codes)
            and self.palette.dtype == other.palette.dtype
            and torch.equal(self.palette, other.palette)
        )

    @property
    def source(self):
        """The layout that this one is a repetition of, or itself: what depends on neither the
        number of images is the same for both.
        """
        return self._repeats[0].source if self._repeats else self

    @property
    def device(self):
        return self.codes.device

    @property
    def label_nc(self):
        return self.palette.shape[1]

    def __len__(self):
        return len(self.codes)

    def __repr__(self):
        size = " × ".join(map(str, self.codes.shape[1:]))
        return (
            f"SemanticLayout({len(self)} of {size}, {len(self.palette)} codes for {self.label_nc}"
            f" channels, on {self.device})"
        )


@torch.inference_mode(False)  # as above
def number(codes, kernel_size, num_codes):
    """The Windows of codes [N, *size]."""
    hidden, table, index, order = kernels.select(codes).find_windows(codes, kernel_size, num_codes)
    return Windows(Sums(*hidden), Sums(*table), index, order)


@torch.inference_mode(False)
def number_patches(codes, kernel_size, stride, padding, num_codes):
    """The Patches of codes [N, *spatial]. Errors: ValueError where the map is smaller than a
    window.
    """
    size = [(length + 2 * padding - kernel_size) // stride + 1 for length in codes.shape[1:]]
    if min(size) < 1:
        raise ValueError(
            f"the layout is {list(codes.shape[1:])}, it should be no smaller than kernel_size,"
            f" {kernel_size}"
        )
    backend = kernels.select(codes)
    # With the border around it as one more code, every window is within the map.
    numbers, contents = backend.number_windows(
        F.pad(codes, (padding,) * 2 * len(size), value=num_codes), kernel_size
    )
    for dim, length in enumerate(size, start=1):
        numbers = numbers.narrow(dim, kernel_size // 2, (length - 1) * stride + 1)
        numbers = numbers[(slice(None),) * dim + (slice(None, None, stride),)]
    present, index = numbers.unique(return_inverse=True)
    contents, index = contents[present.long()], index.to(torch.int32)
    contents = torch.where(contents == num_codes, -1, contents)
    return Patches(
        contents, Sums(*backend.window_sums(contents, num_codes)), index, backend.sort_pixels(index)
    )


def _repeat(tensor, times):
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))


def _side_by_side(parts):
    """Several tensors of numbers in one: (numbers, bound) each, those of every part above those of
    the parts before.
    """
    bounds = [bound for _, bound in parts]
    return torch.cat([numbers + sum(bounds[:number]) for number, (numbers, _) in enumerate(parts)])


def _stack_sums(parts):
    """The Sums of several layouts' windows in one: no window and no row is shared."""

    def offsets(lists):
        return _side_by_side(
            [(starts[min(number, 1) :], int(starts[-1])) for number, starts in enumerate(lists)]
        )

    return Sums(
        offsets([part.offsets for part in parts]),
        _side_by_side([(part.rows, len(part.back_offsets) - 1) for part in parts]),
        offsets([part.back_offsets for part in parts]),
        _side_by_side([(part.back_rows, len(part.offsets) - 1) for part in parts]),
    )


def resize_codes(codes, size):
    """codes [N, *spatial] at another size, by the pixels that `F.interpolate(mode="nearest")` takes
    of a float32 condition.
    """
    for dim, (given, wanted) in enumerate(zip(codes.shape[1:], size), start=1):
        if given == wanted:
            continue
        if wanted > 0 and given % wanted == 0:
            codes = codes[(slice(None),) * dim + (slice(None, None, given // wanted),)]
        else:
            pixels = torch.arange(given, dtype=torch.float32, device=codes.device)
            pixels = F.interpolate(pixels[None, None], size=wanted, mode="nearest")[0, 0]
            codes = codes.index_select(dim, pixels.long())
    return codes.contiguous()


def instance_edges(instances):
    """1 where a direct neighbour along any axis has another instance number, else 0: [N, *spatial]
    as long.
    """
    edges = torch.zeros_like(instances, dtype=torch.bool)
    for dim in range(1, instances.dim()):
        length = instances.shape[dim]
        before, after = (
            edges.narrow(dim, 0, max(0, length - 1)),
            edges.narrow(dim, min(1, length), max(0, length - 1)),
        )
        differ = instances.narrow(dim, 0, max(0, length - 1)) != instances.narrow(
            dim, min(1, length), max(0, length - 1)
        )
        before |= differ
        after |= differ
    return edges.long()


def _whole_numbers(name, values):
    """values as a tensor of whole numbers [N, *spatial]."""
    values = (
        torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
    )
    if not isinstance(values, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(values).__name__}, it should be a torch.Tensor or a numpy.ndarray"
        )
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {values.dtype}, it should hold whole numbers")
    if not 2 <= values.dim() <= 4:
        raise ValueError(
            f"{name} has shape {list(values.shape)}, it should be [N, *spatial] with 1 to 3"
            " spatial dimensions"
        )
    return values


def _check_range(labels, codes, channels, num_classes, dont_care):
    wrong = (codes < 0) | (codes >= channels)
    if not wrong.any():
        return
    place = wrong.nonzero()[0].tolist()
    value = labels[tuple(place)].item()
    allowed = f"0 to {num_classes - 1}" + (
        "" if dont_care is None else f", or {dont_care} for don't care"
    )
    raise ValueError(
        f"labels has a {value} in {int((labels == value).sum())} pixels, first at {place}; it"
        f" should have {allowed}"
        f" ({int(wrong.sum())} pixels are out of range)"
    )
