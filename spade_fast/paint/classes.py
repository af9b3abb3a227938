"""The classes to paint with: their numbers, names and colours."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..arguments import whole_number
from ..data import colours
from ..data.files import lines_of
from ..data.pairs import CONVENTIONS
from ..training import Config
from ..training.examples import with_convention

HIGHEST = 2**16 - 1  # the largest label of 16 bits
GREY = (128, 128, 128)  # of "don't care"
# Colours that people expect. Each goes to the first class with the word in its name.
NATURAL = {
    "sky": (120, 190, 250),
    "sun": (255, 214, 70),
    "hill": (120, 130, 190),
    "sea": (40, 110, 200),
    "sand": (235, 205, 140),
    "grass": (130, 200, 90),
    "tree": (30, 120, 60),
    "vegetation": (30, 140, 60),
    "house": (205, 90, 75),
}

# COCO-Stuff's classes (Caesar et al. 2018) in the order of their numbers, from 0 on.
COCO_STUFF = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli,
carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror, dining table, window,
desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink,
refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush,
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet,
ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog,
food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat,
metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea,
shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""
# The classes of ADE20K's scene parsing benchmark (Zhou et al. 2017) in the order of their numbers,
# from 1 on: 0 is unlabelled.
ADE20K = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall,
tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal,
bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
# Cityscapes' classes (Cordts et al. 2016) in the order of their numbers, from 0 on. The published
# generator has one more, which no map uses.
CITYSCAPES = """
unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, road, sidewalk,
parking, rail track, building, wall, fence, guard rail, bridge, tunnel, pole, polegroup,
traffic light, traffic sign, vegetation, terrain, sky, person, rider, car, truck, bus, caravan,
trailer, train, motorcycle, bicycle
"""


@dataclass(frozen=True)
class Class:
    """A class: its number in label maps, its name, and its colour (red, green, blue; 0 to 255)."""

    number: int
    name: str
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """The meaning of a label map's numbers for a generator.

    listed: a class for each number that a label map may have, including "don't care".
    num_classes, dont_care, label_shift: as in `Preparation`.
    has_edges: whether the generator's last channel is that of instances' edges.
    """

    listed: tuple[Class, ...]
    num_classes: int
    dont_care: int | None = None
    label_shift: int = 0
    has_edges: bool = False

    @property
    def background(self) -> int:
        """The number that the eraser leaves: don't care, or else the first class."""
        return self.listed[0].number if self.dont_care is None else self.dont_care


NAMES = {"coco_stuff": COCO_STUFF, "ade20k": ADE20K, "cityscapes": CITYSCAPES}  # by convention
# By the published generators' numbers of channels: the convention, and whether the last channel is
# that of instances' edges.
PUBLISHED = {184: ("coco_stuff", True), 151: ("ade20k", False), 36: ("cityscapes", True)}


def classes_of(
    label_nc: int, file: str | os.PathLike | None = None, settings: Config | None = None
) -> Classes:
    """The classes of a generator with label_nc channels. With the settings of a run, they are the
    run's. Otherwise 184, 151 or 36 channels are those of the published data sets, and in any other
    number each channel is a class, numbered from 0 on.

    Args:
        file: a file of names and colours, see `read_classes`. Classes that it does not list keep
            theirs.
        settings: those of the run that the generator is from.

    Errors: ValueError if the file has another format, or lists a number that is not a class.
    """
    label_nc = whole_number("label_nc", label_nc, least=1)
    if settings is None:
        name, has_edges = PUBLISHED.get(label_nc, ("folder", False))
        count, dont_care = CONVENTIONS[name].num_classes or label_nc, CONVENTIONS[name].dont_care
    else:
        settings = with_convention(settings)
        assert settings.num_classes is not None  # always known in a run
        name, has_edges = settings.convention, settings.instances is not None
        count, dont_care = settings.num_classes, settings.dont_care
    convention, known = CONVENTIONS[name], NAMES.get(name, "")
    names = [one.strip() for one in known.split(",")] if known else []
    names += [f"class {number - convention.label_shift}" for number in range(len(names), count)]
    listed = {
        number: Class(number, name, (int(red), int(green), int(blue)))
        for number, (name, (red, green, blue)) in enumerate(
            zip(names, colours(count)), -convention.label_shift
        )
    }
    for word, natural in NATURAL.items():
        found = named(listed.values(), word)
        if found is not None:
            listed[found.number] = replace(found, colour=natural)
    if dont_care is not None:
        listed[dont_care] = Class(dont_care, "don't care", GREY)
    for one in read_classes(file) if file is not None else ():
        number, name, colour = one
        if number not in listed:
            raise ValueError(
                f"{file} names class {number}, which the generator does not have: it has"
                f" {min(listed)} to {max(listed)}"
            )
        listed[number] = Class(number, name, listed[number].colour if colour is None else colour)
    return Classes(tuple(listed.values()), count, dont_care, convention.label_shift, has_edges)


def named(classes: Iterable[Class], word: str) -> Class | None:
    """The first class with the word in its name."""
    return next((one for one in classes if word in one.name.replace("-", " ").split()), None)


def read_classes(path: str | os.PathLike) -> list[tuple[int, str, tuple[int, int, int] | None]]:
    """The number, name and colour of each class in a text file. Its lines are `CLASS NAME` or
    `CLASS NAME R G B`; a name may contain spaces, and `#` begins a comment.

    Errors: ValueError, which names the file and the line.
    """
    found = []
    for place, line, words in lines_of(path):
        colour: tuple[int, int, int] | None = None
        if len(words) > 4 and all(word.isdecimal() for word in words[-3:]):
            red, green, blue = map(int, words[-3:])
            words, colour = words[:-3], (red, green, blue)
        if len(words) < 2 or not words[0].isdecimal() or max(colour or (0,)) > 255:
            raise ValueError(
                f"{path}, line {place}, is {line!r}; it should be CLASS NAME or CLASS NAME"
                " R G B: CLASS is 0 or more, and R, G and B are 0 to 255"
            )
        found.append((int(words[0]), " ".join(words[1:]), colour))
    return found
