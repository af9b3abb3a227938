"""`spade-fast generate`: from a folder of label maps to a folder of images."""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import checkpoint
from .arguments import whole_number
from .data import MODES, Pair, Preparation, read_labels, read_palette, read_photograph
from .data.dataset import named
from .data.faults import words_of
from .data.files import Palette
from .data.pairs import convention_of, encoded, match
from .nn import ConvEncoder, SPADEGenerator
from .service import Service
from .training.pictures import picture
from .training.run import Run
from .writing import remove_unfinished, written

ORIGIN = "spade_fast"  # the key of a PNG's text that says how it was generated, for `evaluate`
READERS = 3  # label maps that are read, numbered or written while others are in the network
MOST_WAITING = 2**31  # no limit on images: the number of threads is one already


@dataclass
class Report:
    """What became of the label maps.

    made: the number of images written.
    skipped: the number of images that existed already.
    faults: a line for each label map that could not be used.
    """

    made: int = 0
    skipped: int = 0
    faults: list[str] = field(default_factory=list)


class Maps(NamedTuple):
    """How label maps become conditions; see `generate`."""

    convention: str
    palette: Palette | None
    num_classes: int | None
    dont_care: int | None
    instances: Path | Literal[False] | None  # a folder; None: those of the convention; False: none


def generate(
    weights: str | os.PathLike | Mapping | SPADEGenerator,
    labels: str | os.PathLike,
    out: str | os.PathLike,
    *,
    loading: Mapping | None = None,
    instances: str | os.PathLike | None = None,
    convention: str | None = None,
    palette: Palette | None = None,
    num_classes: int | None = None,
    dont_care: int | None = None,
    preprocess: str = "fixed",
    load_size: int | None = None,
    samples: int = 1,
    seed: int = 0,
    style: str | os.PathLike | None = None,
    encoder: str | os.PathLike | ConvEncoder | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    resume: bool = False,
    progress: Callable[[Iterable, int], Iterable] = lambda found, count: found,
) -> Report:
    """Makes an image of every label map below a folder: `out/NAME.png`, or with several samples
    `out/NAME-0.png` and so on. Each is written whole or not at all. A label map with a fault is
    reported, and the images of the others are made.

    An image depends only on its own label map and name, the weights and the seed: with `batch` 1 to
    the bit. With a larger `batch`, the other images of the batch may change its rounding (see
    `Service`).

    Args:
        weights: as `Service` takes them. The settings of a run whose folder it is are the defaults
            of convention and palette; of num_classes and dont_care, if the convention is the run's;
            and of instances, if labels is the folder that it was trained on.
        labels, instances: folders. Instances are required if the generator was trained with them.
        out: the folder of the images, created if it does not exist.
        loading: key and further arguments of `checkpoint.load`, if the weights do not say enough.
        convention, palette: as for `find_pairs` and `read_labels`.
        num_classes, dont_care: by default, as in the convention; if it has none, all channels of
            the generator are classes, except that of instances' edges.
        preprocess, load_size: `Preparation`'s mode and load_size; "fixed" resizes to the
            generator's size.
        samples: the number of images of each label map, for a generator that begins with z.
        seed: the seed of z, with the name of the label map and the number of the sample.
        style, encoder: a photograph, and the encoder or its weights, which computes z from it. The
            first sample's z is the mean, and the others are drawn with the encoder's variance. By
            default, the encoder is that of the run's newest checkpoint.
        batch: the most images that are computed together.
        dtype, device: as for `Service`.
        resume: whether to keep images that exist, whatever they were made with.
        progress: a progress bar: a function of an iterable with an item for each label map, and of
            their number, that returns the iterable.

    Raises:
        ValueError, TypeError, OSError: an argument is not as described above, the generator was
            trained with other channels than these label maps have, or an image cannot be written.
    """
    samples = whole_number("samples", samples, least=1)
    labels, out = Path(labels), Path(out)
    run = None
    if isinstance(weights, (str, os.PathLike)) and Path(weights).is_dir():
        run = Run(weights)
        weights = run.weights()
    maps = _maps_of(run, labels, instances, convention, palette)
    if run is not None and style is not None and encoder is None:
        encoder = encoder_of_run(run)
    maps = maps._replace(
        num_classes=maps.num_classes if num_classes is None else num_classes,
        dont_care=maps.dont_care if dont_care is None else dont_care,
    )
    for name, folder in (("labels", labels), ("instances", maps.instances)):
        if isinstance(folder, Path) and out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"out is {out}; it should not be in the folder of {name}, {folder}: images would be"
                " mistaken for maps"
            )
    source: Any = weights  # `load` or `Service` refuses it if it is something else
    if loading:
        source = checkpoint.load(source, **loading)
    with Service(source, batch=batch, dtype=dtype, device=device, waiting=MOST_WAITING) as service:
        return generate_with(
            service,
            labels,
            out,
            maps,
            preprocess=preprocess,
            load_size=load_size,
            samples=samples,
            seed=seed,
            style=style,
            encoder=encoder,
            average=None if run is None else "ema",
            resume=resume,
            progress=progress,
        )


def generate_with(
    service: Service,
    labels: Path,
    out: Path,
    maps: Maps,
    *,
    preprocess: str = "fixed",
    load_size: int | None = None,
    samples: int = 1,
    seed: int = 0,
    style: str | os.PathLike | None = None,
    encoder: str | os.PathLike | ConvEncoder | None = None,
    average: str | None = None,
    resume: bool = False,
    progress: Callable[[Iterable, int], Iterable] = lambda found, count: found,
) -> Report:
    """As `generate`, with an existing service that lets (READERS + batch) · samples images wait.

    average: "ema" if the weights are a running average, "raw" if they are not, None if it is not
        known. It is written to each PNG as text, together with the seed.
    """
    arguments = service.generator_arguments
    if (arguments["spatial_dims"], arguments["output_nc"]) != (2, 3):
        raise ValueError(
            f"the generator makes {arguments['output_nc']} channels in"
            f" {arguments['spatial_dims']} dimensions; it should make 3 in 2 to be written as"
            " images"
        )
    maps = with_classes(maps, arguments["label_nc"])
    assert maps.num_classes is not None
    height, width = service.image_size
    if preprocess not in MODES:
        raise ValueError(f"preprocess is {preprocess!r}; it should be one of {', '.join(MODES)}")
    preparation = Preparation(
        maps.num_classes,
        maps.dont_care,
        mode=preprocess,
        load_size=load_size,
        crop_size=width,
        aspect_ratio=width / height,
        label_shift=convention_of(maps.convention).label_shift,
    )
    seed = whole_number("seed", seed, least=0)
    styles = Styles(arguments["z_dim"], (height, width), samples, seed, style, encoder)
    pairs, faults = match(labels, None, maps.instances, maps.convention)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"out is {out}; it should be a folder that can be written to: {error.strerror}"
        ) from None
    for folder in {(out / pair.name).parent for pair in pairs}:
        remove_unfinished(folder)
    origin = {"average": average, "seed": seed}
    painter = _Painter(service, preparation, maps.palette, styles, out, origin, resume)
    report = Report(faults=faults)
    with _threads(READERS + service.batch) as pool:
        for made, skipped, fault in progress(pool.map(painter, pairs), len(pairs)):
            report.made += made
            report.skipped += skipped
            report.faults += [fault] if fault else []
    return report


def with_classes(maps: Maps, label_nc: int) -> Maps:
    """The settings with num_classes filled in, and with instances False if there are none, for a
    generator of label_nc channels. Errors: ValueError if the maps have another number of channels.
    """
    rules, others = convention_of(maps.convention), int(maps.dont_care is not None)
    if maps.instances is None:
        classes = maps.num_classes
        takes = rules.beside_labels and (classes is None or classes + others < label_nc)
        maps = maps._replace(instances=None if takes else False)
    others += maps.instances is not False
    classes = label_nc - others if maps.num_classes is None else maps.num_classes
    if classes < 1 or classes + others != label_nc:
        words = [f"{max(classes, 0)} classes"]
        words += ["don't care"] if maps.dont_care is not None else []
        words += ["edges of instances"] if maps.instances is not False else []
        hint = "num_classes, dont_care and instances should be as in its training"
        if maps.instances is False and classes + others + 1 == label_nc:
            hint = "instances should be given if it was trained with them; else " + hint
        raise ValueError(
            f"the generator has {label_nc} channels, and {' and '.join(words)} make"
            f" {max(classes, 0) + others}: {hint}"
        )
    return maps._replace(num_classes=classes)


class Styles:
    """The z of each sample, which depends only on the style, the seed and the label map's name.

    size: the height and width that the photograph is resized to, as in training.

    Errors: ValueError or TypeError if the generator takes no z, or if the encoder does not fit it.
    """

    def __init__(
        self,
        z_dim: int | None,
        size: tuple[int, int],
        samples: int = 1,
        seed: int = 0,
        style: str | os.PathLike | None = None,
        encoder: str | os.PathLike | ConvEncoder | None = None,
    ) -> None:
        self.z_dim, self.samples, self.seed, self.moments = z_dim, samples, seed, None
        if (style is None) != (encoder is None):
            given, missing = ("style", "encoder") if encoder is None else ("encoder", "style")
            raise ValueError(
                f"{given} is given and {missing} is not, both should be: a photograph, and the"
                " weights of the encoder that computes z from it"
            )
        if z_dim is None and samples > 1:
            raise ValueError(
                f"samples is {samples}; it should be 1: this generator begins with the condition,"
                " and all samples would be the same"
            )
        if style is not None and encoder is not None:
            self.moments = moments_of(
                encoder_of(encoder, z_dim), read_photograph(style, upright=True), size
            )

    def __call__(self, name: str, samples: Iterable[int]) -> torch.Tensor | None:
        """z [M, z_dim] of these samples, float32 on the CPU; None if the generator takes none."""
        if self.z_dim is None:
            return None
        return torch.stack([self._one(name, sample) for sample in samples])

    def _one(self, name, sample):
        text = f"{self.seed} {sample} {name}"
        seed = hashlib.blake2b(encoded(text), digest_size=7).digest()
        random = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        assert self.z_dim is not None
        noise = torch.randn(self.z_dim, generator=random)
        if self.moments is None:
            return noise
        mean, deviation = self.moments
        return mean if sample == 0 else mean + noise * deviation


def encoder_of_run(run: Run) -> ConvEncoder | None:
    """The encoder of a run's newest checkpoint; None if there is no checkpoint or the run trains no
    encoder. Errors: FileNotFoundError or ValueError if settings or checkpoint cannot be read.
    """
    numbers = run.numbers()
    if not numbers or not run.settings().use_vae:
        return None
    encoder = checkpoint.load(run.checkpoint(numbers[-1]), key="encoder")
    assert isinstance(encoder, ConvEncoder)
    return encoder


def encoder_of(
    encoder: str | os.PathLike | Mapping | ConvEncoder, z_dim: int | None
) -> ConvEncoder:
    """A copy of the encoder, or one with these weights, in eval mode, for a generator with this
    z_dim (None if it takes no z). Errors: ValueError if it is not an encoder, or if its z or its
    images do not fit.
    """
    if isinstance(encoder, torch.nn.Module):
        network: torch.nn.Module = copy.deepcopy(encoder).eval()
    else:
        network = checkpoint.load(encoder)
    if not isinstance(network, ConvEncoder):
        raise ValueError(
            f"encoder is the weights of a {type(network).__name__}; they should be an encoder's"
        )
    length, channels = network.arguments["z_dim"], network.arguments["input_nc"]
    if length != z_dim:
        wanted = "takes none" if z_dim is None else f"has z_dim {z_dim}"
        raise ValueError(
            f"encoder makes z of length {length}, and the generator {wanted}: they should be from"
            " the same run"
        )
    if channels != 3:
        raise ValueError(f"encoder takes {channels} channels; it should take a photograph's 3")
    return network


def moments_of(
    encoder: ConvEncoder, photograph: Image.Image, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the standard deviation [z_dim] of a photograph's z.

    size: the height and width that the photograph is resized to, as in training.
    """
    # The preparation needs labels, but the encoder does not see them.
    preparation = Preparation(1, mode="fixed", crop_size=size[1], aspect_ratio=size[1] / size[0])
    _, image = preparation(np.zeros(photograph.size[::-1], np.uint8), photograph)
    with torch.no_grad():
        mean, logvar = encoder(image)
    return mean[0], (0.5 * logvar[0]).exp()


class _Painter:
    """Makes and writes the images of one label map. Returns how many it made, how many existed, and
    what is wrong with the label map, or None.
    """

    def __init__(self, service, preparation, palette, styles, out, origin, resume):
        self.service, self.preparation, self.palette = service, preparation, palette
        self.styles, self.out, self.resume = styles, out, resume
        self.origin = PngInfo()
        self.origin.add_text(ORIGIN, json.dumps(origin))

    def __call__(self, pair: Pair) -> tuple[int, int, str | None]:
        paths = self._paths(pair.name)
        wanted = [number for number, path in paths.items() if not self._is_there(path)]
        skipped = len(paths) - len(wanted)
        if not wanted:
            return 0, skipped, None
        try:
            layout = self._layout(pair)
        except (ValueError, TypeError, OSError) as error:
            return 0, skipped, words_of(error)
        images = self.service.generate(layout, self.styles(pair.name, wanted))
        if not images.isfinite().all():
            return 0, skipped, f"{pair.labels}: its image has values that are not finite"
        for number, image in zip(wanted, images.float().cpu()):
            paths[number].parent.mkdir(parents=True, exist_ok=True)
            with written(paths[number]) as path:
                Image.fromarray(picture(image)).save(path, pnginfo=self.origin)
        return len(wanted), skipped, None

    def _layout(self, pair):
        labels = read_labels(pair.labels, self.palette)
        instances = None if pair.instances is None else read_labels(pair.instances)
        with named(str(pair.labels)):
            return self.preparation.layout(labels, instances)

    def _paths(self, name):
        samples = self.styles.samples
        endings = [""] if samples == 1 else [f"-{number}" for number in range(samples)]
        return {
            number: self.out.joinpath(f"{name}{ending}.png")
            for number, ending in enumerate(endings)
        }

    def _is_there(self, path):
        return self.resume and path.exists()


@contextlib.contextmanager
def _threads(number):
    """A pool of threads that begins no further work after an error."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _maps_of(run, labels, instances, convention, palette):
    """How label maps become conditions, according to the arguments, else to the run if there is
    one, else to the convention.
    """
    instances = None if instances is None else Path(instances)
    settings = None if run is None else run.settings()
    if settings is not None:
        if palette is None and settings.palette is not None:
            palette = read_palette(settings.palette)
        is_same = (
            settings.labels is not None and Path(settings.labels).resolve() == labels.resolve()
        )
        if instances is None and is_same and settings.instances is not None:
            instances = Path(settings.instances)
        convention = settings.convention if convention is None else convention
    convention = "folder" if convention is None else convention
    said: Any = convention_of(convention)
    if settings is not None and settings.convention == convention:
        said = settings  # in maps of another convention, the run's don't care may be a class
    return Maps(convention, palette, said.num_classes, said.dont_care, instances)
