"""Label and instance maps to measure on: drawn scenes that look and measure like COCO-Stuff's
annotations, and a data set's own PNGs.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

# COCO-Stuff's class numbers: objects are below 91, stuff is from 91 to 181.
UNLABELLED, METAL = 255, 131
BACKDROPS = (105, 156, 156, 156, 171, 172)  # clouds, sky (the most usual), walls
MIDDLES = (95, 96, 112, 126, 127, 134, 168)  # building, bush, fence, hill, house, mountain, tree
GROUNDS = (
    110,
    117,
    123,
    139,
    148,
    153,
    154,
)  # dirt, wooden floor, grass, pavement, road, sand, sea
PATCHES = (
    91,
    96,
    118,
    128,
    149,
    161,
    168,
    180,
    255,
    255,
    255,
)  # banner, bush, flower, leaves, rock, stone, tree, window, none


class _Kind(NamedTuple):
    """The parts of an object, in units of its height: x from its middle, y from the ground."""

    classes: tuple
    height: float  # in units of an adult's height
    ovals: tuple = ()  # (x, y, half width, half height)
    limbs: tuple = ()  # (thickness, joint, joint, joint) of the right limb of a pair
    wheels: tuple = ()  # (x, radius) of the right wheel of a pair


KINDS = (
    _Kind(
        (0,),
        1,
        ovals=((0, 0.65, 0.12, 0.2), (0, 0.92, 0.07, 0.08)),  # person
        limbs=(
            (0.1, (0.06, 0.5), (0.08, 0.25), (0.1, 0)),
            (0.07, (0.1, 0.8), (0.2, 0.65), (0.18, 0.45)),
        ),
    ),
    _Kind(
        (17, 18, 19, 20, 21),
        0.8,
        ovals=((0, 0.6, 0.45, 0.2), (0.5, 0.82, 0.18, 0.13)),  # dog, horse, sheep, cow, elephant
        limbs=(
            (0.08, (0.22, 0.5), (0.24, 0.25), (0.23, 0)),
            (0.08, (0.37, 0.5), (0.35, 0.25), (0.37, 0)),
        ),
    ),
    _Kind(
        (2, 5, 7), 0.9, ovals=((0, 0.45, 1.1, 0.25), (0, 0.75, 0.7, 0.25)), wheels=((0.65, 0.2),)
    ),  # car, bus, truck
    _Kind(
        (1, 3), 0.6, limbs=((0.08, (0.55, 0.33), (0.3, 0.85), (0, 0.35)),), wheels=((0.55, 0.35),)
    ),  # bicycle, motorcycle
    _Kind(
        (9, 12, 13), 1.6, ovals=((0, 0.45, 0.01, 0.45), (0, 0.93, 0.04, 0.07))
    ),  # traffic light, stop sign, parking meter
    _Kind(
        (14, 61),
        0.6,
        ovals=((0, 0.8, 0.3, 0.2), (0, 0.5, 0.3, 0.06)),  # bench, chair
        limbs=((0.05, (0.2, 0.5), (0.2, 0.25), (0.2, 0)),),
    ),
    _Kind(
        (30, 32, 63), 0.4, ovals=((0, 0.4, 0.4, 0.4), (0, 0.8, 0.15, 0.2))
    ),  # handbag, suitcase, potted plant
)


class _Scene:
    """A label map and an instance map that are drawn together. Points are float [count, 2], x and y
    in pixels.
    """

    def __init__(self, rng, height, width):
        self.rng, self.height, self.width = rng, height, width
        self.maps = [Image.new("L", (width, height)) for _ in ("labels", "instances")]

    def fill(self, points, label, instance=0):
        for image, value in zip(self.maps, (label, instance)):
            ImageDraw.Draw(image).polygon(points.ravel().tolist(), fill=int(value))

    def line(self, points, thickness, label, instance=0):
        for image, value in zip(self.maps, (label, instance)):
            ImageDraw.Draw(image).line(
                points.ravel().tolist(), int(value), max(1, round(thickness)), joint="curve"
            )

    def waves(self, angles):
        """A smooth random curve, float [len(angles)], with period 2π."""
        numbers = np.arange(1, 6)[:, None]
        return (
            self.rng.normal(size=(5, 1))
            / numbers
            * np.sin(numbers * angles + self.rng.uniform(0, 7, (5, 1)))
        ).sum(0)

    def steps(self, length, count):
        """A random staircase, float [length], of `count` treads."""
        ends = (np.arange(1, count) + self.rng.uniform(-0.4, 0.4, count - 1)) * length / count
        return self.rng.normal(size=count)[np.searchsorted(ends, np.arange(length))]

    def blob(self, centre, radii, roughness, roundness):
        """The points of a closed random curve: roughly an ellipse with a roundness of 1, and a
        rectangle with a roundness near 0.
        """
        angles = np.linspace(0, 2 * np.pi, 64)
        circle = np.stack([np.cos(angles), np.sin(angles)], 1)
        return (
            centre
            + np.exp(roughness * self.waves(angles))[:, None]
            * radii
            * np.sign(circle)
            * np.abs(circle) ** roundness
        )

    def band(self, label, level, roughness, skyline=0):
        """Stuff from the bottom up to an uneven border, `level` pixels below the top, with
        unlabelled gaps above it in places.
        """
        x = np.arange(self.width)
        border = (
            level
            + self.rng.normal(0, 0.08) * (x - self.width / 2)
            + skyline * self.steps(self.width, 6)
        )
        border += roughness * (
            3 * self.waves(2 * np.pi * x / self.width) + self.steps(self.width, self.width // 10)
        )
        gap = self.height / 40 * np.maximum(0, self.steps(self.width, 20) - 1)
        for value, y in (UNLABELLED, border - gap), (label, border):
            self.fill(
                np.concatenate(
                    [np.stack([x, y], 1), [[self.width, self.height], [0, self.height]]]
                ),
                value,
            )

    def stand(self, kind, feet, size, label, instance):
        """An object `size` pixels tall, and beside it an unlabelled sliver, as annotators of stuff
        leave it.
        """
        lean, side = self.rng.normal(0, 0.05), self.rng.choice([-1, 1])
        axes = size * np.array([[side, 0], [lean, -1]])  # pixels per unit of x and of y
        ovals = [feet + self.blob(oval[:2], oval[2:], 0.1, 0.6) @ axes for oval in kind.ovals]
        sliver = self.rng.normal(0, 0.03 * size, 2)
        for shift, values in (sliver, (UNLABELLED, 0)), (0, (label, instance)):
            for oval in ovals:
                self.fill(oval + shift, *values)
        for mirror in [1, 1], [-1, 1]:
            for thickness, *joints in kind.limbs:
                joints = np.array(joints) * mirror + self.rng.normal(0, 0.04, (len(joints), 2))
                self.line(feet + joints @ axes, size * thickness, label, instance)
            for x, radius in kind.wheels:
                ring = self.blob(np.multiply([x, radius], mirror), (radius, radius), 0, 1)
                self.line(feet + ring @ axes, size * radius / 4, label, instance)


def draw_scene(seed, height=480, width=640):
    """Draws a scene like an annotated photo: bands and patches of stuff, wires, and objects that
    stand on the ground.

    Returns labels, uint8 [height, width], COCO-Stuff's classes 0 to 181 and 255 where there is no
    label; and instances, uint8 [height, width], 0 for stuff and 1, 2, … for the objects. The same
    seed gives the same scene.
    """
    rng = np.random.default_rng(seed)
    scene = _Scene(rng, height, width)
    clutter = rng.beta(
        0.6, 0.7
    )  # from an empty beach, 0, to a street market, 1; often close to either
    horizon = height * rng.uniform(0.25, 0.65)
    scene.band(rng.choice(BACKDROPS), -height, 0)
    for label in rng.choice(MIDDLES, rng.binomial(3, clutter), replace=False):
        scene.band(
            label,
            horizon - height * rng.uniform(0, 0.3),
            height * rng.uniform(0, 0.02),
            height * rng.choice((0, 0.15)),
        )
    grounds = rng.choice(GROUNDS, 1 + rng.binomial(2, clutter), replace=False)
    for label, level in zip(grounds, np.linspace(horizon, height, len(grounds), endpoint=False)):
        scene.band(label, level, height * rng.uniform(0, 0.005))
    for _ in range(rng.poisson(10 * clutter)):
        radii = height * rng.uniform(0.01, 0.15, 2)
        centre = rng.uniform(0, width), rng.uniform(horizon, height * 0.9) - radii[1]
        patch = scene.blob(centre, radii, 0.3, rng.uniform(0.2, 1))
        scene.fill(
            patch + rng.normal(0, height * rng.uniform(0, 0.008), patch.shape), rng.choice(PATCHES)
        )
    for _ in range(rng.poisson(2 * clutter)):
        scene.line(np.stack([[0, width], rng.uniform(0, horizon, 2)], 1), rng.integers(1, 3), METAL)
    instance = 0
    for near in np.sort(
        rng.uniform(0, 1, 1 + rng.poisson(5 * clutter)) ** 2
    ):  # far objects first, because near objects hide them
        kind = KINDS[rng.integers(len(KINDS))]
        label, size = rng.choice(kind.classes), height * (0.06 + 0.8 * near) * kind.height
        feet = np.array([rng.uniform(0, width), horizon + near * (height - horizon)])
        for _ in range(1 + rng.poisson(2 * clutter)):
            instance += 1
            scene.stand(kind, feet, size * rng.uniform(0.8, 1.2), label, instance)
            feet = feet + size * rng.normal(0, (0.6, 0.05))
    return tuple(np.array(image) for image in scene.maps)


def save_scenes(folder, count=13, scenes=None):
    """Writes scenes as PNGs: label/0000.png, instance/0000.png and so on. By default they are drawn
    with the seeds 0 to count - 1.

    Returns the paths of the two folders, label and instance.
    """
    folders = Path(folder, "label"), Path(folder, "instance")
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(map(draw_scene, range(count)) if scenes is None else scenes):
        for path, values in zip(folders, scene):
            values = np.zeros_like(scene[0]) if values is None else values
            Image.fromarray(values).save(path / f"{number:04}.png")
    return folders


def load_scenes(label_folder, instance_folder=None):
    """Reads the label folder's PNGs, sorted by name, each with the instance folder's PNG of the
    same name.

    Returns a list of (labels, instances), integer arrays [height, width]. Without an instance
    folder, instances are None.
    """
    paths = sorted(Path(label_folder).glob("*.png"))
    if not paths:
        raise FileNotFoundError(
            f"label_folder is {str(label_folder)!r}; it should be a folder with PNGs of class"
            " numbers"
        )
    scenes = []
    for path in paths:
        labels, instances = _read(path), None
        if instance_folder is not None:
            instance_path = Path(instance_folder, path.name)
            instances = _read(instance_path)
            if instances.shape != labels.shape:
                raise ValueError(
                    f"{instance_path} is {list(instances.shape)}; it should be"
                    f" {list(labels.shape)} like {path}"
                )
        scenes.append((labels, instances))
    return scenes


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; it should be the instance PNG for the label PNG with that name"
        )
    with Image.open(path) as image:
        if image.mode not in ("L", "P", "I;16", "I"):
            raise ValueError(
                f"{path} has Pillow's mode {image.mode}; it should hold one integer per pixel: L,"
                " P, I;16 or I"
            )
        return np.array(image)


def mirrored(scene):
    """Labels and instances (or None) with left and right exchanged."""
    return tuple(None if values is None else values[:, ::-1].copy() for values in scene)


def resized(labels, instances, size):
    """Labels and instances (or None) resized to (height, width) by nearest neighbour."""
    return tuple(
        None
        if values is None
        else np.array(Image.fromarray(values.astype(np.int32)).resize(size[::-1], Image.NEAREST))
        for values in (labels, instances)
    )


def condition(labels, instances, num_classes=182, dont_care=255):
    """SPADE's condition, computed the published way.

    Args:
        labels: integers [height, width], 0 to num_classes - 1, and `dont_care`, which becomes class
            num_classes.
        instances: integers [height, width], or None.

    Returns a float32 tensor [1, channels, height, width]: one-hot in num_classes + 1 channels, and
    with instances a further channel, 1 where any of the four neighbours has another instance
    number.
    """
    for value in np.unique(labels):
        if value != dont_care and not 0 <= value < num_classes:
            raise ValueError(
                f"labels has a {value}; it should have 0 to {num_classes - 1}, or {dont_care} for"
                " don't care"
            )
    channels = (
        np.where(labels == dont_care, num_classes, labels)
        == np.arange(num_classes + 1)[:, None, None]
    )
    if instances is not None:
        padded = np.pad(instances, 1, mode="edge")
        neighbours = np.stack(
            [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        channels = np.concatenate([channels, (neighbours != instances).any(0, keepdims=True)])
    return torch.from_numpy(channels).float()[None]


def draw_volume(seed, size, classes=8):
    """Draws labels, int64 [size, size, size], of overlapping ellipsoids, like organs in a scan."""
    random = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, size)] * 3, indexing="ij"))
    labels = torch.zeros(size, size, size, dtype=torch.long)
    for label in range(1, classes):
        middle, radius = (
            torch.rand(3, 1, 1, 1, generator=random) * width + least
            for width, least in ((0.8, -0.4), (0.35, 0.15))
        )
        labels[((grid - middle) / radius).square().sum(0) < 1] = label
    return labels
