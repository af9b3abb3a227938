"""A semantic layout as small whole numbers, and its distinct windows: what makes γ and β cheap on
label maps.

γ and β at a pixel depend only on the condition in a small window around it, and a layout has few
distinct windows. So each distinct window is computed once and looked up: the same function, with
its sums in another order. A condition [N, label_nc, *spatial] is stored as codes and a palette, the
condition's vector for each code. The condition itself is never built.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.data._utils.collate import default_collate_fn_map

from . import kernels
from .arguments import whole_number
from .codes import (
    check_has_values,
    classes_of,
    compact,
    description,
    instance_edges,
    label_map_of,
    refuse_labels,
)
from .identity import state_of, with_version
from .kernels.numbering import resize_codes
from .streams import Made, made_here, read_here
from .windows import (
    LARGEST_KERNEL,
    Patches,
    Sums,
    Windows,
    number,
    number_patches,
    on_its_own,
    repeated,
    side_by_side,
    stacked,
    tensors_in,
)

if TYPE_CHECKING:
    import numpy as np


class SemanticLayout:
    """A batch of semantic layouts: codes [N, *spatial], int32, and a palette [P, label_nc] of the
    vectors that they stand for.

    `from_labels` and `from_segmap` build one. Everything in the package that takes a condition
    [N, label_nc, *spatial] also takes a SemanticLayout.

    Codes and palette may be replaced, or edited in place: the codes' range is then checked again,
    and all cached results that the change affects are recomputed. (A change that PyTorch does not
    count goes unnoticed: see `identity.state_of`. A compiled call reads the windows that `prepare`
    numbered, so call `prepare` again.)

    `torch.utils.data.default_collate` joins several layouts into one batch, as `stack` does.
    """

    def __init__(self, codes: torch.Tensor, palette: torch.Tensor) -> None:
        self.codes, self.palette = codes, palette
        self._windows: dict[tuple[tuple[int, ...], int], Windows] = {}
        self._patches: dict[tuple[int, int, int], Patches] = {}
        self._pooled: dict[tuple[int, int, int, bool], tuple[SemanticLayout, object]] = {}
        # For each key of `_windows` and `_patches`, the GPU stream that computes them.
        self._made: dict[tuple, Made | None] = {}
        # The layout that this one repeats, its content at that time, and how many times.
        self._repeats: tuple[SemanticLayout, object, int] | None = None
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self._state: tuple | None = None
        self._content: object = None
        if torch.compiler.is_compiling():
            _check_tensors(codes, palette)
        else:
            self._look()

    def _look(self):
        """Notices a change of codes or palette: checks them, and drops the cached results that the
        change affects.
        """
        if torch.compiler.is_compiling():
            return
        before, now = self._state, self._state_now()
        if before == now:
            return
        _check_tensors(self.codes, self.palette)
        _check_codes(self.codes, len(self.palette))
        if before is None or before[0] != now[0] or before[1][2::2] != now[1][2::2]:  # rows, dtype
            self._windows, self._patches = {}, {}
        self._pooled, self._repeats = {}, None
        self.codes, self.palette = with_version(self.codes), with_version(self.palette)
        self._take_as_seen()

    def _take_as_seen(self):
        """Marks all cached results as belonging to the present codes and palette."""
        # Both are held: another tensor in their freed memory could have the same state.
        self._seen, self._state = (self.codes, self.palette), self._state_now()
        self._content = object()

    def _state_now(self):
        codes, palette = self.codes, self.palette
        if not isinstance(codes, torch.Tensor) or not isinstance(palette, torch.Tensor):
            return None, None
        return state_of(codes), state_of(palette)

    @classmethod
    def from_labels(
        cls,
        labels: "torch.Tensor | np.ndarray",
        num_classes: int,
        instances: "torch.Tensor | np.ndarray | None" = None,
        dont_care: int | None = None,
    ) -> "SemanticLayout":
        """The one-hot layout of a label map, with the instance-edge channel of the published
        preprocessing.

        Args:
            labels: whole numbers [N, *spatial], torch or NumPy, each from 0 to num_classes − 1 or
                `dont_care`. Pass a single map [height, width] as labels[None]: otherwise its rows
                are taken for maps of one dimension.
            num_classes: the number of classes, without "don't care".
            instances: whole numbers of the same shape. They add a channel that is 1 where a direct
                neighbour has another number.
            dont_care: a label, any whole number, that becomes an additional class, num_classes.

        Raises:
            ValueError, TypeError: an argument is not as described above. If a label is out of
                range, the message says which, how many pixels have it, and where the first one is.
        """
        num_classes = whole_number("num_classes", num_classes, least=1)
        if dont_care is not None:
            dont_care = whole_number("dont_care", dont_care)
        with torch.inference_mode(False):  # so that training may use windows from inference mode
            label_map = label_map_of("labels", labels)
            codes, channels = classes_of(label_map, num_classes, dont_care)
            if instances is not None:
                numbers = label_map_of("instances", instances)
                if numbers.shape != codes.shape:
                    raise ValueError(
                        f"instances has shape {list(numbers.shape)}; it should have the shape of"
                        f" labels, {list(codes.shape)}"
                    )
                if numbers.device != codes.device:
                    raise ValueError(
                        f"instances is on {numbers.device}; it should be on the device of labels,"
                        f" {codes.device}"
                    )
                codes = codes + channels * instance_edges(numbers)
            codes, present, are_classes = compact(codes, channels * (1 + (instances is not None)))
            if not are_classes:
                refuse_labels(label_map, num_classes, dont_care)
            palette = F.one_hot(present % channels, channels).float()
            if instances is not None:
                palette = torch.cat([palette, (present // channels)[:, None].float()], dim=1)
            palette = palette.to(codes.device, non_blocking=True)
            return cls(codes, palette)

    @classmethod
    def from_segmap(cls, segmap: torch.Tensor) -> "SemanticLayout | None":
        """The layout of any piecewise constant condition [N, label_nc, *spatial]: one-hot or
        multi-hot, with edges, or with a noise vector per image.

        Its vectors are compared bit for bit. None if there are too many distinct ones for a table
        to pay, as in dense features.

        Errors: ValueError if segmap is not such a tensor, or requires a gradient.
        """
        if (
            not isinstance(segmap, torch.Tensor)
            or not segmap.is_floating_point()
            or segmap.element_size() not in (2, 4, 8)
            or not 3 <= segmap.dim() <= 5
        ):
            raise ValueError(
                f"segmap is {description(segmap)}; it should be a tensor [N, label_nc, *spatial]"
                " of 16-, 32- or 64-bit floating-point numbers with 1 to 3 spatial dimensions"
            )
        check_has_values("segmap", segmap)
        if segmap.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "segmap requires a gradient; it should not: a layout passes none back; detach() it"
            )
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # as in from_labels
                return cls.from_segmap(segmap)
        segmap = segmap.detach().as_subclass(torch.Tensor)
        found = kernels.select(segmap).find_codes(segmap)
        if found is None:
            return None
        codes, places = found
        pixels = max(1, segmap.shape[2:].numel())
        return cls(codes, segmap.flatten(2)[places // pixels, :, places % pixels])

    @classmethod
    @torch.inference_mode(False)
    def stack(cls, layouts: Iterable["SemanticLayout"]) -> "SemanticLayout":
        """One batch of several layouts, in their order; a `collate_fn` for data loaders. Windows of
        sizes that all of them have are kept.

        Errors: ValueError if there are none, or they differ in size, channels, dtype or device;
        TypeError if one of them is not a layout.
        """
        layouts = list(layouts)
        for layout in layouts:
            if not isinstance(layout, SemanticLayout):
                raise TypeError(
                    f"layouts has a {type(layout).__name__}; it should have SemanticLayouts"
                )
            layout._look()
        kinds = {
            (layout.codes.shape[1:], layout.label_nc, layout.palette.dtype, layout.device)
            for layout in layouts
        }
        if len(kinds) != 1:
            raise ValueError(
                f"layouts is [{', '.join(map(repr, layouts))}]; it should have one or more layouts"
                " with the same size, channels, dtype and device"
            )
        stack = cls(
            side_by_side([(layout.codes, len(layout.palette)) for layout in layouts]),
            torch.cat([layout.palette for layout in layouts]),
        )
        for key in set.intersection(*(set(layout._windows) for layout in layouts)):
            stack._windows[key] = stacked([layout.windows(*key) for layout in layouts])
        return stack

    def __getitem__(
        self, images: "int | slice | list | np.ndarray | torch.Tensor"
    ) -> "SemanticLayout":
        """The layout of some images of the batch, in the given order, with only the codes that they
        use. Its windows are computed again.

        A layout always has a batch axis: layout[i] is a batch of one, layout[i : i + 1]. So
        `stack([layout[i] for i in numbers])` has the same condition as layout[numbers], and a data
        set may yield either.

        Args:
            images: a number, a slice, or a list, an array or a tensor, either of numbers or of one
                bool per image.

        Errors: IndexError if there is no such image; TypeError if images is anything else.
        """
        self._look()
        numbers = _numbers_of_images(images, len(self))
        rows = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        return self._with_codes(self.codes.index_select(0, rows))

    def flip(self, *dims: int | Sequence[int]) -> "SemanticLayout":
        """The layout mirrored along some axes: -1 or (-1,) is left to right, -2 top to bottom.

        dims are axes of the condition, [N, label_nc, *spatial], as in torch.Tensor.flip: its last
        axis is -1, its first spatial axis 2. The windows are computed again.

        Errors: ValueError if one of them is not a spatial axis, or occurs twice.
        """
        self._look()
        given = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        axes, spatial = [], self.codes.dim() - 1
        for one in given:
            dim = whole_number("dims", one)
            axis = dim if dim < 0 else dim - spatial - 2
            if not -spatial <= axis < 0:
                raise ValueError(
                    f"dims has {dim}; it should have spatial axes, 2 to {spatial + 1} or"
                    f" {-spatial} to -1"
                )
            if axis in axes:
                raise ValueError(f"dims is {tuple(given)}; it should have each axis once")
            axes.append(axis)
        return SemanticLayout(self.codes.flip(axes), self.palette)

    def crop(self, start: Sequence[int], size: Sequence[int]) -> "SemanticLayout":
        """The layout of a part of each image: `size` pixels from `start` on, each with a number per
        axis, as in crop((top, left), (height, width)).

        This crops the condition, so the instance edges stay where they were. The windows are
        computed again.

        Errors: ValueError if the part is not within the images.
        """
        self._look()
        given = self.codes.shape[1:]
        start, size = (
            _whole_number_for_each_axis(name, numbers, len(given))
            for name, numbers in (("start", start), ("size", size))
        )
        codes = self.codes
        for dim, (begin, length, whole) in enumerate(zip(start, size, given), start=1):
            if begin < 0 or length < 1 or begin + length > whole:
                raise ValueError(
                    f"start is {start} and size {size}; they should be within the layout's size,"
                    f" {tuple(given)}"
                )
            codes = codes.narrow(dim, begin, length)
        return self._with_codes(codes)

    def _with_codes(self, codes):
        """A layout of some of this layout's codes, with only the palette rows that they use."""
        codes, present, are_rows = compact(codes, len(self.palette))
        if not are_rows:
            raise ValueError(
                f"codes has numbers that are not rows of the palette; they should be 0 to"
                f" {len(self.palette) - 1}"
            )
        return SemanticLayout(codes, self.palette[present.to(codes.device, non_blocking=True)])

    def to_segmap(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The condition [N, label_nc, *spatial] itself."""
        self._look()
        return self.palette.to(dtype)[self.codes.long()].movedim(-1, 1).contiguous()

    def resize(self, size: Sequence[int]) -> "SemanticLayout":
        """The layout at another size, by nearest neighbour.

        Errors: ValueError, TypeError if size is not a number of pixels for each axis.
        """
        self._look()
        return SemanticLayout(
            resize_codes(self.codes, self._size("size", size), self.palette.dtype), self.palette
        )

    def avg_pool(
        self,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        count_include_pad: bool = True,
    ) -> "SemanticLayout":
        """The layout of `F.avg_pool2d(condition, …)` (or 1d, 3d): each distinct window of codes
        becomes a code, and its mean the code's vector, in float64. A network rounds it to its own
        dtype.

        Args:
            kernel_size: taps per axis, at most 7.
            stride: the step from window to window; kernel_size if None.
            padding: zeros around the condition, at most half of kernel_size.
            count_include_pad: whether those zeros count in the mean.

        Errors: ValueError, TypeError if an argument is not as described above, or the padded layout
        is smaller than a window.
        """
        self._look()
        stride = kernel_size if stride is None else stride
        kernel_size, stride, padding = _whole_patches(kernel_size, stride, padding)
        if kernel_size > LARGEST_KERNEL or 2 * padding > kernel_size:
            raise ValueError(
                f"kernel_size is {kernel_size}, stride {stride}, padding {padding}: they should be"
                f" 1 to {LARGEST_KERNEL}, 1 or more, and at most half of kernel_size"
            )
        key, kept = (kernel_size, stride, padding, bool(count_include_pad)), self._pooled
        pooled, content = kept.get(key, (None, None))
        if pooled is not None and pooled.content is content:
            return pooled
        if (source := self._source()) is not None:
            layout, times = source
            pooled = layout.avg_pool(*key).repeat(times)
        else:
            patches = self.patches(kernel_size, stride, padding)
            # Code −1, beyond the border, takes the last row: zeros.
            vectors = torch.cat([self.palette, self.palette.new_zeros(1, self.label_nc)]).double()
            seen = (vectors[codes.long()] for codes in patches.contents.unbind(1))
            sums = functools.reduce(torch.add, seen)
            taps = patches.contents.shape[1]
            counts = (
                taps
                if count_include_pad
                else (patches.contents >= 0).sum(1, keepdim=True).to(sums.dtype)
            )
            pooled = SemanticLayout(patches.index, sums / counts)
        if not self.palette.requires_grad:
            kept[key] = pooled, pooled.content
        return pooled

    def patches(self, kernel_size: int, stride: int, padding: int) -> Patches:
        """The Patches of a convolution of the condition with this kernel size, stride and padding.
        Computed once, then cached.

        Errors: ValueError if an argument is negative or zero (padding may be zero), or the padded
        layout is smaller than a window; TypeError if an argument is not a whole number.
        """
        self._look()
        key, kept = _whole_patches(kernel_size, stride, padding), self._patches
        if key not in kept:
            if (source := self._source()) is not None:
                layout, times = source
                contents, sums, *places = layout.patches(*key)
                kept[key] = Patches(contents, sums, *(repeated(one, times) for one in places))
            else:
                kept[key] = number_patches(self.codes, *key, len(self.palette))
            self._made[key] = made_here(tensors_in(kept[key]))
        read_here(self._made.get(key), tensors_in(kept[key]))
        return kept[key]

    def repeat(self, times: int) -> "SemanticLayout":
        """The whole batch `times` times over, for several images of each layout. The repetitions
        share their windows.

        Errors: ValueError, TypeError if times is not a whole number of at least 1.
        """
        self._look()
        if not torch.compiler.is_compiling():
            times = whole_number("times", times, least=1)
        if times == 1:
            return self
        layout = SemanticLayout(repeated(self.codes, times), self.palette)
        layout._repeats = (self, self._content, times)
        return layout

    def _source(self):
        """The layout that this one still repeats and how many times, or None."""
        if self._repeats is not None:
            layout, content, times = self._repeats
            if torch.compiler.is_compiling() or (
                layout._content is content and layout._state == layout._state_now()
            ):
                return layout, times
            self._repeats = None
        return None

    def windows(self, size: Sequence[int], kernel_size: int) -> Windows:
        """The Windows at this size, *spatial, for convolutions of this kernel size. Computed once,
        then cached.

        Errors: ValueError, TypeError if size is not a number of pixels for each axis, or
        kernel_size is not odd and at most 7.
        """
        self._look()
        size = size if isinstance(size, (tuple, list)) else self._size("size", size)
        key, kept = (tuple(size), kernel_size), self._windows
        if key not in kept:
            if torch.compiler.is_compiling():
                if (source := self._source()) is not None:
                    layout, times = source
                    return _of_repeated(layout, times, key)
                raise ValueError(
                    f"the layout has no windows of size {key[0]} yet: prepare([{key[0]}],"
                    f" {kernel_size}) before the compiled"
                    " call"
                )
            (key,) = self._make_windows([size], kernel_size, kept)
        if not torch.compiler.is_compiling():
            read_here(self._made.get(key), tensors_in(kept[key]))
        return kept[key]

    def _make_windows(self, sizes, kernel_size, kept):
        """Computes the windows that are not cached yet, all at once, so that a GPU is waited for
        once. Returns the keys of all of them.

        kept: `_windows` at the time of the call. If another thread meanwhile notices an edit of the
            layout, it replaces `_windows` by a new dict, to which these windows do not belong.
        """
        kernel_size = whole_number("kernel_size", kernel_size)
        if kernel_size % 2 == 0 or not 1 <= kernel_size <= LARGEST_KERNEL:
            raise ValueError(
                f"kernel_size is {kernel_size}; it should be odd, from 1 to {LARGEST_KERNEL}"
            )
        keys = [(self._size("size", size), kernel_size) for size in sizes]
        missing = [key for key in dict.fromkeys(keys) if key not in kept]
        if not missing:
            return keys
        sizes = [size for size, _ in missing]
        if (source := self._source()) is not None:
            layout, times = source
            layout._make_windows(sizes, kernel_size, layout._windows)
            for key in missing:
                kept[key] = _of_repeated(layout, times, key)
        else:
            found = number(self.codes, sizes, kernel_size, len(self.palette), self.palette.dtype)
            kept.update(zip(missing, found))
        made = made_here(kept[key].index for key in missing)
        self._made.update(dict.fromkeys(missing, made))
        return keys

    def _size(self, name, size):
        """size as a tuple of ints, to which this layout can be resized."""
        given = self.codes.shape[1:]
        size = _whole_number_for_each_axis(name, size, len(given))
        if any(wanted != own and min(wanted, own) < 1 for wanted, own in zip(size, given)):
            raise ValueError(
                f"{name} is {size}; it should have 1 pixel or more along each axis, or be the"
                f" layout's own, {tuple(given)}"
            )
        return size

    def prepare(self, sizes: Iterable[Sequence[int]], kernel_size: int) -> "SemanticLayout":
        """Numbers the windows of these sizes ahead, for instance in a data loader's worker. Returns
        the layout itself.

        A compiled network requires this, in the process that calls the network; one compilation
        then serves all layouts.
        """
        sizes = list(sizes)
        if not torch.compiler.is_compiling():
            self._look()
            self._make_windows(sizes, kernel_size, self._windows)
        # If it is not imported, nothing has been compiled; importing it takes over a second.
        if "torch._dynamo" not in sys.modules:
            return self
        for size in sizes:
            windows = self.windows(size, kernel_size)
            for tensor in (self.palette, *windows.hidden, *windows.table):
                marked = tensor is None or 0 in getattr(tensor, "_dynamo_unbacked_indices", ())
                if not marked:  # the number of rows differs between layouts
                    torch._dynamo.decorators.mark_unbacked(tensor, 0)
        return self

    def to(
        self, device: torch.device | str | int | None, non_blocking: bool = True
    ) -> "SemanticLayout":
        """The layout with everything cached on this device; itself if it is there already, or if
        device is None.

        A copy to a GPU does not wait if the memory is pinned and non_blocking is true. A copy to
        the CPU always waits, because numbers could otherwise be read before they have arrived.

        Errors: TypeError if device is not a device. A dtype is not: a layout has its palette's.
        """
        if device is None:
            return self
        try:
            device = torch.device(device)
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"device is {device!r}; it should be a device ({error})") from None
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.codes.device:
            return self
        non_blocking = non_blocking and device.type != "cpu"
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def cpu(self) -> "SemanticLayout":
        """The layout on the CPU: see `to`."""
        return self.to("cpu")

    def cuda(
        self, device: torch.device | str | int | None = None, non_blocking: bool = True
    ) -> "SemanticLayout":
        """The layout on this GPU, or on the current one: see `to`."""
        return self.to("cuda" if device is None else device, non_blocking)

    def pin_memory(self) -> "SemanticLayout":
        """The layout with everything cached in pinned memory, for a data loader."""
        return self._mapped(torch.Tensor.pin_memory)

    @torch.inference_mode(False)
    def _mapped(self, function):
        self._look()
        layout = SemanticLayout(function(self.codes), function(self.palette))
        for size, kernel_size in self._windows:
            windows = self.windows(size, kernel_size)
            hidden, table = (Sums(*map(function, part)) for part in windows[:2])
            layout._windows[size, kernel_size] = Windows(
                hidden, table, function(windows.index), function(windows.order)
            )
        for key in self._patches:
            contents, sums, *places = self.patches(*key)
            layout._patches[key] = Patches(
                function(contents), Sums(*map(function, sums)), *map(function, places)
            )
        for asked, (pooled, content) in self._pooled.items():
            if pooled.content is content:
                pooled = pooled._mapped(function)
                layout._pooled[asked] = pooled, pooled.content
        return layout

    def stats(self) -> dict:
        """Distinct windows per pixel, (K1 / pixels, K2 / pixels), for each (size, kernel size) that
        has been needed so far.
        """
        self._look()
        return {
            key: (
                windows.hidden_count / max(1, windows.index.numel()),
                windows.count / max(1, windows.index.numel()),
            )
            for key, windows in self._windows.items()
        }

    def equal(self, other: object) -> bool:
        """Whether other is a layout with the same codes and palette."""
        return (
            isinstance(other, SemanticLayout)
            and self.device == other.device
            and torch.equal(self.codes, other.codes)
            and self.palette.dtype == other.palette.dtype
            and torch.equal(self.palette, other.palette)
        )

    @property
    def source(self) -> "SemanticLayout":
        """The layout that this one repeats, or itself. Whatever does not depend on the number of
        images is the same for both.
        """
        self._look()
        source = self._source()
        return self if source is None else source[0].source

    @property
    def content(self) -> object:
        """An object that is replaced when codes or palette change: a key for caching what is
        computed from them.
        """
        self._look()
        return self._content

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """The memory of codes, palette and windows, in bytes."""
        self._look()
        tensors = [self.codes, self.palette, *tensors_in(tuple(self._windows.values()))]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def label_nc(self) -> int:
        return self.palette.shape[1]

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        size = " × ".join(map(str, self.codes.shape[1:]))
        return (
            f"SemanticLayout({len(self)} of {size}, {len(self.palette)} codes for {self.label_nc}"
            f" channels, on {self.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        self._look()
        values = {name: value for name, value in self.__dict__.items() if name != "_state"}
        values["_made"] = {}  # a copy has read them, and need not wait
        for name in ("_windows", "_patches"):
            values[name] = {key: on_its_own(found) for key, found in values[name].items()}
        return values

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        # The tensors have new addresses. Inference tensors have no version: `_look` copies them.
        self._state = self._state_now()


def _of_repeated(layout, times, key):
    """The Windows of layout.repeat(times) for this size and kernel size."""
    hidden, table, *places = layout.windows(*key)
    return Windows(hidden, table, *(repeated(one, times) for one in places))


def _collate(layouts, *, collate_fn_map=None):
    return SemanticLayout.stack(layouts)


default_collate_fn_map[SemanticLayout] = _collate


def _check_tensors(codes, palette):
    for name, tensor in (("codes", codes), ("palette", palette)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it should be a torch.Tensor")
    if codes.dtype != torch.int32 or codes.dim() < 2 or codes.dim() > 4:
        raise ValueError(
            f"codes is {codes.dtype} {list(codes.shape)}; it should be int32 [N, *spatial]"
            " with 1 to 3 spatial dimensions"
        )
    if palette.dim() != 2 or not palette.is_floating_point():
        raise ValueError(
            f"palette is {palette.dtype} {list(palette.shape)}; it should be floating-point"
            " [P, label_nc]"
        )
    if palette.device != codes.device:
        raise ValueError(
            f"palette is on {palette.device}; it should be on the device of codes, {codes.device}"
        )


def _check_codes(codes, rows):
    """Raises if codes are not rows of the palette. Codes on a GPU would have to be waited for: only
    the compiled kernels check them, when they number windows.
    """
    if not codes.is_cpu or not codes.numel():
        return
    least, most = map(int, codes.aminmax())
    if least < 0 or most >= rows:
        raise ValueError(
            f"codes has numbers from {least} to {most}; they should be rows of the palette, 0 to"
            f" {rows - 1}"
        )


def _whole_patches(kernel_size: int, stride: int, padding: int) -> tuple[int, int, int]:
    found = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    kernel_size, stride, padding = (whole_number(*item) for item in found.items())
    if kernel_size < 1 or stride < 1 or padding < 0:
        raise ValueError(
            f"kernel_size is {kernel_size}, stride {stride}, padding {padding}: they should be 1 or"
            " more, 1 or more, and 0 or more"
        )
    return kernel_size, stride, padding


def _whole_number_for_each_axis(name, values, axes):
    try:
        values = tuple(values)
    except TypeError:
        values = (values,)
    if len(values) != axes:
        hint = (
            "; a single map [height, width] needs a batch axis: labels[None]" if axes == 1 else ""
        )
        raise ValueError(f"{name} is {values}; it should have the layout's {axes} dimensions{hint}")
    return tuple(whole_number(name, value) for value in values)


def _numbers_of_images(images, count):
    """The numbers of the images that an index selects from a batch of `count`, as a list."""
    import numpy as np

    if isinstance(images, slice):
        return list(range(count))[images]
    found = images.tolist() if isinstance(images, (torch.Tensor, np.ndarray)) else images
    if isinstance(found, list) and found and all(isinstance(one, bool) for one in found):
        if len(found) != count:
            raise IndexError(
                f"images is a mask of {len(found)}; it should have {count}, one for each image"
            )
        return [number for number, is_wanted in enumerate(found) if is_wanted]
    try:
        numbers = [
            whole_number("images", one) for one in (found if isinstance(found, list) else [found])
        ]
    except TypeError:
        raise TypeError(
            f"images is {images!r}; it should be numbers of images, a slice or a mask; crop() is"
            " for parts of an image"
        ) from None
    for one in numbers:
        if not -count <= one < count:
            raise IndexError(f"images has {one}; it should name one of the batch's {count} images")
    return [one % count for one in numbers]
