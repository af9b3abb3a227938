"""Turns a label map and a photograph of any size into a layout and a tensor to train on."""

import random as randoms
from dataclasses import KW_ONLY, dataclass
from numbers import Real

import numpy as np
import torch

from ..arguments import whole_number
from ..layout import SemanticLayout
from .allowed import Allowed
from .files import Image

MODES = (
    "resize_and_crop",
    "crop",
    "scale_width",
    "scale_width_and_crop",
    "scale_shortside",
    "scale_shortside_and_crop",
    "fixed",
    "none",
)  # the published names
UNRESIZED = ("crop", "fixed", "none")  # modes without a load_size
MULTIPLE = 32  # in mode "none" each side becomes a multiple of it

Map = np.ndarray | torch.Tensor | Image.Image


@dataclass
class Preparation:
    """The published preprocessing (Park et al. 2019): resizes, crops and mirrors a label map, its
    instance map and its photograph together. The maps are resized by nearest neighbour and the
    photograph bicubically, both as Pillow does.

    num_classes: the number of classes, without "don't care".
    dont_care: the label that marks pixels without a class; it becomes one more class, num_classes.
    mode: one of MODES. "resize_and_crop" resizes the image to a width of load_size and a height of
        load_size / aspect_ratio. "scale_width" makes its width load_size, "scale_shortside" its
        shorter side, and both keep its proportions. "fixed" resizes to the size of the crop, "none"
        to multiples of 32. Modes with "crop" in their name then take a part of the crop's size.
    load_size: by default 286/256 of crop_size in modes that crop, as published, else crop_size.
    crop_size: the width of the crop.
    aspect_ratio: width over height of the crop, and in "resize_and_crop" of the resized image.
    flip: whether half of the images are mirrored, left to right.
    label_shift: added to the label maps' numbers to get classes.
    """

    num_classes: int
    dont_care: int | None = None
    _: KW_ONLY
    mode: str = "resize_and_crop"
    load_size: int | None = None
    crop_size: int = 256
    aspect_ratio: float = 1.0
    flip: bool = True
    label_shift: int = 0

    def __post_init__(self) -> None:
        self.num_classes = whole_number("num_classes", self.num_classes, least=1)
        self.crop_size = whole_number("crop_size", self.crop_size, least=1)
        self.label_shift = whole_number("label_shift", self.label_shift)
        if self.dont_care is not None:
            self.dont_care = whole_number("dont_care", self.dont_care)
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it should be one of {', '.join(MODES)}")
        is_number = isinstance(self.aspect_ratio, Real)
        if not is_number or not 0 < self.aspect_ratio < float("inf") or min(self._box) < 1:
            raise ValueError(
                f"aspect_ratio is {self.aspect_ratio!r}; it should be the crop's width over its"
                " height"
            )
        if self.load_size is None:
            return
        whole_number("load_size", self.load_size, least=1)
        if self.mode in UNRESIZED:
            raise ValueError(
                f"load_size is {self.load_size}; it should not be given: mode {self.mode!r} does"
                " not use it"
            )
        least = min(self._box) if "shortside" in self.mode else self.crop_size
        if self._crops and self.load_size < least:
            raise ValueError(
                f"load_size is {self.load_size}; it should be {least} or more to crop"
                f" {_words(self._box)} from it"
            )

    @property
    def output_size(self) -> tuple[int, int] | None:
        """The height and width of every result, or None if the mode leaves each image its own."""
        return self._box[::-1] if self._crops or self.mode == "fixed" else None

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """The height and width of the result for an image of this width and height. Errors:
        ValueError if the image is smaller than the crop.
        """
        size = self._resized(width, height)
        return tuple(length - room for length, room in zip(size, self._spare(size)))[::-1]

    def __call__(
        self,
        labels: Map,
        photograph: Image.Image | np.ndarray | torch.Tensor,
        instances: Map | None = None,
        random: randoms.Random | None = None,
    ) -> tuple[SemanticLayout, torch.Tensor]:
        """The layout of one label map, and its photograph as float32 [1, 3, height, width] from −1
        to 1. Instances' edges are computed after cropping.

        Args:
            labels, instances: whole numbers [height, width].
            photograph: an image of PIL, uint8 [height, width, 3], or a tensor of floats
                [3, height, width] from −1 to 1.
            random: decides the place of the crop, and whether the image is mirrored; None takes the
                middle and does not mirror.

        Errors: ValueError or TypeError if an argument is not as described, the arguments differ in
            size, the image is smaller than the crop, or a label is out of range.
        """
        maps, planes = _maps(labels, instances), _planes(photograph)
        width, height = planes[0].size
        for name, numbers in maps.items():
            if numbers.shape != (height, width):
                raise ValueError(
                    f"{name} is {_words(numbers.shape[::-1])}, the photograph is"
                    f" {_words((width, height))}: they should have the same size"
                )
        size = self._resized(width, height)
        rows, columns, mirrored = self._part(size, random)
        pixels = np.stack([_bicubic(plane, size)[rows, columns] for plane in planes])
        image = torch.from_numpy(np.ascontiguousarray(pixels[..., :: -1 if mirrored else 1]))
        return self._cut(maps, size, rows, columns, mirrored), image[None]

    def layout(self, labels: Map, instances: Map | None = None) -> SemanticLayout:
        """The layout of one label map without a photograph: the middle of the map, not mirrored.
        Arguments and errors are as for a call.
        """
        maps = _maps(labels, instances)
        height, width = maps["labels"].shape
        if instances is not None and maps["instances"].shape != (height, width):
            raise ValueError(
                f"instances is {_words(maps['instances'].shape[::-1])}, labels is"
                f" {_words((width, height))}: they should have the same size"
            )
        size = self._resized(width, height)
        return self._cut(maps, size, *self._part(size, None))

    def _cut(self, maps, size, rows, columns, mirrored):
        """The layout of a part of the maps, resized to `size` first."""
        height, width = maps["labels"].shape
        rows, columns = _nearest(height, size[1])[rows], _nearest(width, size[0])[columns]
        place = np.ix_(rows, columns[:: -1 if mirrored else 1])
        cut = {name: numbers[place][None] for name, numbers in maps.items()}
        dont_care = None if self.dont_care is None else self.dont_care + self.label_shift
        try:
            return SemanticLayout.from_labels(
                cut["labels"] + self.label_shift, self.num_classes, cut.get("instances"), dont_care
            )
        except ValueError:
            # The user looks for the label in the whole map, as it is in the file.
            allowed = Allowed(self.num_classes, self.dont_care, self.label_shift)
            if wrong := allowed.fault(maps["labels"]):
                raise ValueError(f"labels has {wrong}") from None
            raise

    @property
    def _crops(self):
        return self.mode.endswith("crop")

    @property
    def _box(self):
        """The crop's width and height."""
        return self.crop_size, round(self.crop_size / self.aspect_ratio)

    def _resized(self, width, height):
        """The width and height that an image of this size is resized to."""
        length = self.load_size
        if length is None:
            length = round(self.crop_size * 286 / 256) if self._crops else self.crop_size
        if self.mode == "fixed":
            return self._box
        if self.mode == "crop":
            return width, height
        if self.mode == "none":
            return tuple(max(1, round(length / MULTIPLE)) * MULTIPLE for length in (width, height))
        if self.mode == "resize_and_crop":
            return length, round(length / self.aspect_ratio)
        if "width" in self.mode or width <= height:
            return length, max(1, length * height // width)
        return max(1, length * width // height), length

    def _spare(self, size):
        """By how many pixels an image of this size is wider and higher than its crop."""
        box = self._box if self._crops else size
        spare = [whole - part for whole, part in zip(size, box)]
        if min(spare) < 0:
            raise ValueError(
                f"the image is {_words(size)} before it is cropped; it should be at least as large"
                f" as the crop, {_words(box)}"
            )
        return spare

    def _part(self, size, random):
        """The rows and columns of the crop, and whether it is mirrored."""
        spare = self._spare(size)
        if random is None:
            starts, mirrored = [room // 2 for room in spare], False
        else:
            starts = [random.randint(0, room) for room in spare]
            mirrored = random.random() < 0.5 and self.flip
        columns, rows = (
            slice(start, start + whole - room) for start, whole, room in zip(starts, size, spare)
        )
        return rows, columns, mirrored


def _words(size):
    return " × ".join(map(str, size))


def _maps(labels, instances):
    """The given maps as arrays, by name."""
    given = {"labels": labels} | ({} if instances is None else {"instances": instances})
    return {name: _numbers(name, values) for name, values in given.items()}


def _numbers(name, values):
    """A map as an array [height, width]."""
    if isinstance(values, torch.Tensor):
        values = values.numpy(force=True)
    elif isinstance(values, Image.Image):
        values = np.asarray(values)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biu":
        kind = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{name} is {kind}; it should be whole numbers [height, width]")
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name} has shape {list(values.shape)}; it should be [height, width]")
    return values.astype(np.int64)


def _planes(photograph):
    """A photograph's three channels as images of PIL, of bytes or of floats from −1 to 1."""
    if isinstance(photograph, np.ndarray) and photograph.dtype == np.uint8:
        if photograph.ndim == 3 and photograph.shape[2] == 3 and photograph.size:
            photograph = Image.fromarray(np.ascontiguousarray(photograph))
    if isinstance(photograph, Image.Image):
        return photograph.convert("RGB").split()
    if (
        not isinstance(photograph, torch.Tensor)
        or not photograph.is_floating_point()
        or photograph.dim() != 3
        or len(photograph) != 3
        or not photograph.numel()
    ):
        kind = getattr(photograph, "dtype", type(photograph).__name__)
        shape = list(getattr(photograph, "shape", ()))
        raise TypeError(
            f"photograph is {kind} {shape}; it should be an image of PIL, uint8 [height, width, 3],"
            " or a tensor of floats [3, height, width]"
        )
    least, most = photograph.aminmax()
    if not (least >= -1 and most <= 1):
        raise ValueError(
            f"photograph has values from {least:g} to {most:g}; they should be from −1 to 1"
        )
    return [Image.fromarray(plane) for plane in photograph.float().numpy(force=True)]


def _nearest(length, wanted):
    """The source row or column that Pillow's nearest neighbour takes for each wanted one."""
    numbers = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.asarray(numbers.resize((wanted, 1), Image.Resampling.NEAREST))[0]


def _bicubic(plane, size):
    """A channel resized to a width and a height, float32 from −1 to 1."""
    values = np.asarray(plane.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    if plane.mode == "F":
        return values.clip(-1, 1)
    return (values / 255 - 0.5) / 0.5
