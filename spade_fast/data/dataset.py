"""Data sets of layouts and photographs, and batches of them."""

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from ..layout import SemanticLayout
from .files import Palette, read_labels, read_photograph
from .packing import pack, unpack
from .pairs import Pair
from .preparation import Preparation

# Windows that the discriminator needs: its first convolution's kernel size, stride and padding, and
# the pooling between its scales.
PATCHES = (4, 2, 2)
HALF: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}


class Example(NamedTuple):
    """A layout, its photograph as float32 [1, 3, height, width] from −1 to 1, and its name."""

    layout: SemanticLayout
    image: torch.Tensor
    name: str


class Folder(Dataset):
    """The examples of some pairs of files.

    `dataset[epoch, index]` is cropped and mirrored at random. Seed, epoch and index alone decide
    how: it is the same in every process and worker, and in a resumed run. `dataset[index]` is not
    random: it is the middle of the image, not mirrored.

    Args:
        pairs: as `find_pairs` returns them.
        preparation: turns each pair into a layout and a tensor.
        palette: the class of each colour, if label maps are colour-coded.
        seed: of the random crops.

    Errors: ValueError or TypeError, which names the pair and the fault in its files.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        preparation: Preparation,
        *,
        palette: Palette | None = None,
        seed: int = 0,
    ) -> None:
        self.pairs, self.preparation = list(pairs), preparation
        self.palette, self.seed = palette, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int | tuple[int, int]) -> Example:
        epoch, index = place if isinstance(place, tuple) else (None, place)
        name, labels, image, instances = self.pairs[index]
        chance = None if epoch is None else random_of(self.seed, epoch, index)
        with named(name):
            if image is None:
                raise ValueError("the pair has no photograph; it should have one")
            classes = read_labels(labels, self.palette)
            numbers = None if instances is None else read_labels(instances)
            layout, photograph = self.preparation(classes, read_photograph(image), numbers, chance)
            return Example(layout, photograph, name)


class Stream:
    """The examples of any iterable of (labels, photograph) or (labels, photograph, instances), in
    its order. A generator is read once; an iterable that can start again is read over and over.

    Every worker and process reads the whole iterable, and prepares its share of the examples by
    their running number. The iterable should therefore yield the same in each of them, without
    splitting anything itself. Seed and running number alone decide the random crops.

    Args:
        iterable: of tuples that `Preparation` takes.
        preparation: turns each tuple into a layout and a tensor.
        seed: of the random crops.
    """

    def __init__(self, iterable: Iterable[tuple], preparation: Preparation, seed: int = 0) -> None:
        self.iterable, self.preparation, self.seed = iterable, preparation, seed

    def numbered(self) -> Iterable[tuple[int, tuple]]:
        """The iterable's tuples with their running numbers, over and over."""
        number, before = 0, -1
        while number != before:  # until a pass yields nothing
            before = number
            for example in self.iterable:
                yield number, example
                number += 1

    def example(self, number: int, given: tuple) -> Example:
        """The example with this running number. Errors: as for Folder."""
        with named(f"example {number}"):
            if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
                raise TypeError(
                    f"this is a {type(given).__name__}; it should be (labels, photograph) or"
                    " (labels, photograph, instances)"
                )
            chance = random_of(self.seed, number)
            labels, photograph, instances = given if len(given) == 3 else (*given, None)
            layout, image = self.preparation(labels, photograph, instances, chance)
            return Example(layout, image, str(number))


def random_of(*numbers: int) -> random.Random:
    """A random number generator seeded with these numbers alone."""
    return random.Random(" ".join(map(str, numbers)))


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Inside, the messages of errors begin with the example's name."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error


class Batch(NamedTuple):
    """A layout of several images, their photographs as float32 [N, 3, height, width] from −1 to 1,
    and their names.
    """

    layout: SemanticLayout
    images: torch.Tensor
    names: tuple[str, ...]

    def __reduce__(self) -> tuple:
        return _unpacked, pack(tuple(self))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, with all windows."""
        return Batch(self.layout.pin_memory(), self.images.pin_memory(), self.names)

    def to(self, device: torch.device | str | int, non_blocking: bool = True) -> "Batch":
        """The batch on this device, with all windows; a copy from pinned memory is asynchronous."""
        return Batch(
            self.layout.to(device, non_blocking),
            self.images.to(device, non_blocking=non_blocking),
            self.names,
        )


def _unpacked(*packed):
    return Batch(*unpack(*packed))


def collate(
    examples: Sequence[Example],
    sizes: Iterable[Sequence[int]] = (),
    kernel_size: int = 3,
    scales: int = 0,
) -> Batch:
    """One batch of several examples, with all windows numbered that a training step needs.

    Args:
        sizes, kernel_size: the generator's attributes of these names.
        scales: how many scales the discriminator has.

    Errors: ValueError if the examples differ in size.
    """
    layout = SemanticLayout.stack(example.layout for example in examples)
    scale = layout.prepare(sizes, kernel_size)
    for number in range(scales):
        if number > 0:
            scale = scale.avg_pool(**HALF)
        scale.patches(*PATCHES)
    images = torch.cat([example.image for example in examples])
    return Batch(layout, images, tuple(example.name for example in examples))
