"""The cases to measure: the modulation, the residual blocks, the generator and others, each beside
its rivals, its floor and its limit.

A case yields plans, which have names and build their problem only when they are called. A problem
has variants, which are functions that each compute the same results once and return them by name,
and a truth in float64. The floor is the same network with plain instance norm in place of every
SPADE. The limit is the same network with nothing in place of them, so that its convolutions and
activations remain: what a user has to pay for anyway.
"""

import contextlib
import copy
import dataclasses
import functools
import http.client
import io
import itertools
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

import spade_fast
from spade_fast import SemanticLayout, Service, losses, reference
from spade_fast.export.files import quiet
from spade_fast.generation import Maps, generate_with
from spade_fast.nn.pixels import FORMATS
from spade_fast.paint import app_of, classes_of, listening, server_of
from spade_fast.service import generator_of
from spade_fast.training.pictures import picture

from . import layouts, steps

FORWARD, BACKWARD = "forward", "forward+backward"
MEMORIES = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# What is timed on a GPU (measure.timed): the device's time without or with the host's.
DEVICE_ALONE, WHOLE_CALLS = "device alone", "whole calls"
# The distinct (channels, size) of the SPADEs of the published COCO generator at 256², and of
# LivePortrait's decoder.
COCO_SHAPES = [
    (1024, 8),
    (1024, 16),
    (1024, 32),
    (512, 32),
    (512, 64),
    (256, 64),
    (256, 128),
    (128, 128),
    (128, 256),
    (64, 256),
]
LIVEPORTRAIT_SHAPES = [(512, 64), (512, 128), (256, 128), (256, 256), (64, 256)]
# (fin, fout, size) of the COCO generator's blocks.
COCO_BLOCKS = [
    (1024, 1024, 8),
    (1024, 1024, 16),
    (1024, 512, 32),
    (512, 256, 64),
    (256, 128, 128),
    (128, 64, 256),
]
COCO_NORM = "spectralspadesyncbatch3x3"
NO_SPECTRAL_NORM = {"norm_G": COCO_NORM.removeprefix("spectral")}
# By what a variant's name begins with: norm(x), which stands in place of SPADE(x, segmap). These
# variants compute something else than the others, and are not compared with them.
BARE = {"floor": F.instance_norm, "limit": lambda x: x}
FILES_IN_DOUBLE = 2  # in `generate`: the published network takes seconds per file in float64
# The names of all variants. No problem has all of them.
VARIANTS = (
    "eager",
    "eager, channels-last",
    "torch.compile",
    "spade_fast",
    "spade_fast, pixels",
    "spade_fast, windows",
    "spade_fast, by itself",
    "spade_fast, new condition",
    "spade_fast, prepared",
    "spade_fast, page",
    "spade_fast, frozen",
    "spade_fast, folded, frozen",
    "spade_fast, graph",
    "spade_fast, graph, prepared",
    "ONNX Runtime",
    "spade_fast, ONNX Runtime",
    "spade_fast, ONNX Runtime, pixels",
    "floor",
    "floor, contiguous",
    "floor, channels-last",
    "limit, contiguous",
    "limit, channels-last",
)


@dataclass
class Plan:
    """A problem that is not built yet."""

    name: str
    mode: str  # FORWARD or BACKWARD
    build: Callable  # without arguments: the Problem


@dataclass
class Problem:
    """One group of rows in the table."""

    name: str  # the plan's name, with facts that are known only after building
    mode: str  # FORWARD or BACKWARD
    variants: dict[
        str, Callable
    ]  # includes "eager"; those whose name begins with one of BARE are not checked
    truth: Callable
    jittered: Callable  # takes a run's number; eager, on inputs that differ by a rounding
    in_double: Callable | None = None  # ours in float64, where no rounding hides a mistake
    scenes: list = field(
        default_factory=lambda: [None]
    )  # all are checked; each round of timing takes the next one
    scene: int = 0  # the number of the scene that the functions compute now
    # Variants that compute spectral norm's σ once. They get no time over the limit's, because the
    # limit computes σ in each call.
    folding: tuple[str, ...] = ()
    # Called with a variant's name before each call of that variant; not timed.
    prepare: Callable = lambda name: None
    clock: str = WHOLE_CALLS  # or DEVICE_ALONE
    least_bytes: int | None = (
        None  # bytes that the operation has to move: every input and output once
    )
    least_rounds: int = 5  # minimum number of rounds of timing


@dataclass
class Settings:
    """The options of the command line."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    labels: str | None = None
    instances: str | None = None
    scenes: int = 1
    batch: int = 1  # images of an operation, or scenes that a network computes at once
    compile_mode: str = "default"  # torch.compile's mode for networks
    without: tuple = ()  # variants whose names begin with one of these are not built

    def wanted(self, makers):
        """Builds the variants that are not left out. makers: functions that build them, by name.

        Raises:
            ValueError: VARIANTS lacks a name.
        """
        if unknown := makers.keys() - set(VARIANTS):
            raise ValueError(f"VARIANTS lacks {', '.join(sorted(unknown))}")
        return {name: make() for name, make in makers.items() if not name.startswith(self.without)}


def modulate(settings):
    """spade_modulate with a leaky ReLU, on the shapes of the published generators, in both memory
    formats.
    """
    shapes = [(64, 32)] if settings.quick else dict.fromkeys(COCO_SHAPES + LIVEPORTRAIT_SHAPES)
    for channels, size in shapes:
        for memory, layout in MEMORIES.items():
            for mode in (FORWARD, BACKWARD):
                name, shape = f"{channels} × {size}² {memory}", (channels, size, layout)
                yield plan_of(modulate_problem, settings, name, mode, *shape)


def lookup(settings):
    """The case modulate with γ and β looked up, pixel by pixel, in the table of a scene's
    windows.
    """

    @functools.cache
    def scene():
        return SemanticLayout.from_segmap(next(conditions(settings))).to(settings.device)

    def build(settings, name, mode, channels, size):
        windows = scene().windows((size, size), 3)
        name = f"{channels} × {size}² {windows.count} windows"
        return modulate_problem(settings, name, mode, channels, size, torch.channels_last, windows)

    for channels, size in [(64, 32)] if settings.quick else COCO_SHAPES:
        for mode in (FORWARD, BACKWARD):
            yield plan_of(build, settings, f"{channels} × {size}² windows", mode, channels, size)


def plan_of(build, settings, name, mode, *arguments):
    """The plan whose problem is build(settings, name, mode, *arguments)."""
    return Plan(name, mode, functools.partial(build, settings, name, mode, *arguments))


def modulate_problem(settings, name, mode, channels, size, layout, windows=None):
    """The operation alone. windows: γ and β are tables with a row for each of these windows; if
    None, γ and β are dense.
    """

    def tensor(*shape):
        values = torch.randn(*shape, device=settings.device).to(settings.dtype)
        return values.to(
            memory_format=layout if len(shape) == 4 else torch.contiguous_format
        ).requires_grad_(mode == BACKWARD)

    shape = (settings.batch, channels, size, size)
    rows = shape if windows is None else (windows.count, channels)
    inputs, dy = (
        {"x": tensor(*shape), "gamma": tensor(*rows), "beta": tensor(*rows)},
        tensor(*shape).detach(),
    )

    def eager(x, gamma, beta, activation):
        if windows is not None:
            gamma, beta = (table[windows.index.long()].movedim(-1, 1) for table in (gamma, beta))
        return reference.spade_modulate(x, gamma, beta, activation=activation)

    def ours(x, gamma, beta, activation):
        lookup = {} if windows is None else {"index": windows.index, "order": windows.order}
        return spade_fast.spade_modulate(x, gamma, beta, activation=activation, **lookup)

    def floor(x, gamma, beta, activation):
        return F.leaky_relu(F.instance_norm(x), 0.2)

    def variant(function, inputs, dy, names=("x", "gamma", "beta")):
        def run():
            y = function(**inputs, activation="leaky_relu")
            return _outputs(y, {name: inputs[name] for name in names}, dy, mode)

        return run

    exact = {
        name: value.detach().double().requires_grad_(mode == BACKWARD)
        for name, value in inputs.items()
    }
    # Forward reads x, γ, β and writes y; backward reads dy, x, γ and writes dx, dγ, dβ. With
    # backward, the leaky ReLU's signs are written and read: a bit per element each time.
    streams, tables, bits = (2, 2, 0) if mode == FORWARD else (5, 5, 2)
    least_bytes = (
        streams * dy.numel() + tables * inputs["gamma"].numel()
    ) * dy.element_size() + dy.numel() * bits // 8
    if windows is not None:  # both read the index; backward also reads the pixels in its order
        least_bytes += (
            (1 if mode == FORWARD else 3) * windows.index.numel() * windows.index.element_size()
        )
    return Problem(
        name,
        mode,
        settings.wanted(
            {
                "eager": lambda: variant(eager, inputs, dy),
                "torch.compile": lambda: variant(_compiled(eager), inputs, dy),
                "spade_fast": lambda: variant(ours, inputs, dy),
                "floor": lambda: variant(floor, inputs, dy, ["x"]),
            }
        ),
        variant(eager, exact, dy.double()),
        lambda number: variant(
            eager, {name: jitter(value) for name, value in inputs.items()}, dy
        )(),
        least_bytes=least_bytes,
        clock=DEVICE_ALONE,
    )


def layer(settings):
    """One SPADE computed at pixels, at distinct windows, and as the layer chooses itself: where
    windows pay, and the cost of finding out.

    The conditions are a scene, random labels for cells of 4² pixels and for each pixel, and dense
    features, which have no windows.
    """
    # (channels, size, nhidden)
    shapes = [(64, 32, 128)]
    if not settings.quick:
        shapes = [(1024, 8, 128), (1024, 16, 128), (1024, 32, 128), (512, 32, 128)]
        shapes += [(512, 64, 128), (256, 128, 128), (64, 256, 128), (64, 32, 64), (32, 128, 16)]

    @functools.cache
    def scene():
        return SemanticLayout.from_segmap(next(conditions(settings)))

    @functools.lru_cache(1)  # shared by both modes
    def condition(kind, size):
        pixels = (len(scene()), size, size)
        if kind == "scene":
            return scene().resize(pixels[1:])
        if kind == "dense features":
            return torch.randn(pixels[0], 184, size, size)
        labels = torch.randint(183, pixels)
        if kind == "cells of 4²":
            labels = labels[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2)
        return SemanticLayout.from_labels(labels, 184)

    def build(settings, name, mode, channels, size, nhidden, kind):
        given = condition(kind, size)
        return _layer_problem(settings, name, mode, channels, size, nhidden, given)

    for channels, size, nhidden in shapes:
        for kind in ("scene", "cells of 4²", "noise", "dense features"):
            for mode in (FORWARD, BACKWARD):
                name = f"{channels} at {size}², nhidden {nhidden}, {kind}"
                yield plan_of(build, settings, name, mode, channels, size, nhidden, kind)


def _layer_problem(settings, name, mode, channels, size, nhidden, condition):
    torch.manual_seed(0)
    eager, ours = (kind(channels, 184, nhidden) for kind in (reference.SPADE, spade_fast.SPADE))
    ours.load_state_dict(eager.state_dict())
    exact = copy.deepcopy(eager).double()
    x, dy = torch.randn(2, len(condition), channels, size, size)
    as_layout = isinstance(condition, SemanticLayout)
    segmap = condition.to_segmap() if as_layout else condition
    x, dy, segmap = (tensor.to(settings.device, settings.dtype) for tensor in (x, dy, segmap))
    condition = condition.to(settings.device) if as_layout else segmap

    def variant(module, x, condition, windows="auto", fresh=False):
        module = module.to(settings.device)
        x = x.detach().requires_grad_(mode == BACKWARD)

        def run():  # each view is a new tensor, for which nothing is cached
            with spade_fast.window_mode(windows):
                y = module(x, condition.view_as(condition) if fresh else condition)
            return _outputs(y, {"x": x} | dict(module.named_parameters()), dy.to(x.dtype), mode)

        return run

    eager, ours = eager.to(settings.dtype), ours.to(settings.dtype)
    return Problem(
        name,
        mode,
        settings.wanted(
            {
                "eager": lambda: variant(eager, x, segmap),
                "spade_fast, pixels": lambda: variant(ours, x, segmap, "never"),
                "spade_fast, windows": lambda: variant(ours, x, condition, "always"),
                "spade_fast, by itself": lambda: variant(ours, x, condition),
                "spade_fast, new condition": lambda: variant(ours, x, segmap, fresh=True),
            }
        ),
        variant(exact, x.double(), segmap.double()),
        lambda number: variant(eager, jitter(x), jitter(segmap))(),
    )


def block(settings):
    """The residual blocks of the published COCO generator, on a COCO-Stuff layout at 256²."""

    @functools.cache
    def segmaps():
        return list(conditions(settings))

    def build(settings, name, mode, fin, fout, size):
        # With seed 0, in the quick problem, a leaky ReLU's sign differs in torch.compile.
        torch.manual_seed(1)
        networks = [
            kind(fin, fout, COCO_NORM, 184)
            for kind in (reference.SPADEResnetBlock, spade_fast.SPADEResnetBlock)
        ]
        x = torch.randn(settings.batch, fin, size, size).requires_grad_(mode == BACKWARD)
        return _network_problem(
            settings,
            name,
            mode,
            *networks,
            segmaps(),
            (x,),
            lambda network, segmap, x: network(x, segmap),
            bare=("floor", "limit"),
            takes_layouts=True,
        )

    for fin, fout, size in [(128, 64, 64)] if settings.quick else COCO_BLOCKS:
        for mode in (FORWARD, BACKWARD):
            name = _name(settings, f"{fin} → {fout} at {size}²")
            yield plan_of(build, settings, name, mode, fin, fout, size)


def generator(settings):
    """The published generators: COCO 256², a small network without spectral norm, four samples of
    one layout, COCO 256² without spectral norm, Cityscapes 512 × 256, and
    num_upsampling_layers="most" at 512².
    """
    ngf, size = (8, 64) if settings.quick else (64, 256)
    small = min(size, 128)
    problems = [
        (f"COCO {size}²", 184, (size, size), {}),
        (f"small {small}²", 36, (small, small), {"ngf": 16, "nhidden": 64} | NO_SPECTRAL_NORM),
        (f"4 samples of one COCO layout, {size}²", 184, (size, size), {"use_vae": True}),
        (f"COCO {size}², no spectral norm", 184, (size, size), NO_SPECTRAL_NORM),
        (
            f"Cityscapes {2 * size} × {size}",
            36,
            (size, 2 * size),
            {"aspect_ratio": 2.0, "num_upsampling_layers": "more"},
        ),
        (f"most {2 * size}²", 184, (2 * size, 2 * size), {"num_upsampling_layers": "most"}),
    ]

    @functools.lru_cache(1)  # shared by both modes
    def inputs(shape, label_nc, draws_z):
        segmaps = list(conditions(settings, shape, label_nc))
        return segmaps, (torch.randn(4 * settings.batch, 256),) if draws_z else ()

    def build(settings, name, mode, label_nc, shape, wiring):
        segmaps, z = inputs(shape, label_nc, "use_vae" in wiring)
        wiring = {"crop_size": shape[1], "ngf": ngf, "nhidden": 128, "norm_G": COCO_NORM} | wiring
        ours = spade_fast.SPADEGenerator.official(label_nc, **wiring)
        block = functools.partial(reference.SPADEResnetBlock, nhidden=wiring.pop("nhidden"))
        torch.manual_seed(0)
        eager = reference.SPADEGenerator(label_nc, block=block, **wiring)
        return _network_problem(
            settings,
            name,
            mode,
            eager,
            ours,
            segmaps,
            z,
            lambda network, segmap, *z: network(segmap.repeat(4, 1, 1, 1) if z else segmap, *z),
            lambda network, segmap, *z: network(segmap, *z),
            # Beside z, a network without SPADE reads nothing but the number of images.
            lambda network, segmap, *z: network(z[0] if z else segmap, *z),
            bare=("floor", "limit"),
            takes_layouts=True,
            graphed=settings.device != "cpu",
        )

    for name, *problem in problems[: 3 if settings.quick else None]:
        for mode in (FORWARD, BACKWARD):
            yield plan_of(build, settings, _name(settings, name), mode, *problem)


def generate(settings):
    """The work of `spade-fast generate` after loading the weights, beside a plain loop over the
    published network: from a folder of label maps to a folder of images, with reading, one-hot
    conditions and writing.
    """
    count = max(3 if settings.quick else 4, settings.scenes)
    size = 64 if settings.quick else 256
    name = f"{count} files of COCO layouts, {size}²"
    name += f", batch {settings.batch}" if settings.batch > 1 else ""
    name += f", {FILES_IN_DOUBLE} checked in float64"
    yield plan_of(generate_problem, settings, name, FORWARD, size, count)


def generate_problem(settings, name, mode, size, count):
    """The problem on a folder of drawn scenes, or of the first scenes of `settings.labels`.

    Both variants return the pixels of the files that they wrote, from 0 to 255. The truth of the
    first FILES_IN_DOUBLE files is computed in float64. The truth of the other files is the
    published network's image in float32 before rounding to 8 bits, so a file may be a level off.
    """
    folder = tempfile.TemporaryDirectory()  # removed when nothing refers to it any more
    scenes = None
    if settings.labels is not None:
        scenes = layouts.load_scenes(settings.labels, settings.instances)[:count]
    labels, instances = layouts.save_scenes(folder.name, count, scenes)
    wiring = {"crop_size": size, "ngf": 8 if settings.quick else 64, "norm_G": COCO_NORM}
    torch.manual_seed(0)
    eager = settle(reference.SPADEGenerator(184, **wiring)).eval()
    ours = spade_fast.SPADEGenerator.official(184, **wiring)
    ours.load_state_dict(eager.state_dict())
    place = {"device": settings.device, "dtype": settings.dtype}
    exact = copy.deepcopy(eager).to(settings.device, torch.float64)
    in_single = copy.deepcopy(eager).to(settings.device)
    eager.to(**place)
    service = Service(ours, cache=0, batch=settings.batch, **place)

    def plain_loop(network, change=lambda condition: condition, count=count):
        parameter = next(network.parameters())
        for file in sorted(labels.glob("*.png"))[:count]:
            maps = map(pixels, (file, instances / file.name))
            maps = layouts.resized(*maps, (size, size))
            yield file.name, network(change(layouts.condition(*maps).to(parameter)))[0].cpu()

    def plain(*arguments):
        out = Path(folder.name, "plain")
        out.mkdir(exist_ok=True)
        for file, image in plain_loop(eager, *arguments):
            Image.fromarray(picture(image.float())).save(out / file)
        return written(out)

    def with_service():
        out = Path(folder.name, "ours")
        report = generate_with(service, labels, out, Maps("coco_stuff", None, 182, 255, instances))
        if report.faults:
            raise ValueError("; ".join(report.faults))
        return written(out)

    def pixels(file):
        return np.array(Image.open(file))

    def written(out):
        files = sorted(out.glob("*.png"))
        return {file.name: torch.from_numpy(pixels(file)).to(settings.dtype) for file in files}

    def truth():
        images = dict(plain_loop(in_single)) | dict(plain_loop(exact, count=FILES_IN_DOUBLE))
        return {file: (image.movedim(0, -1) + 1) * 127.5 for file, image in images.items()}

    def jittered(number):  # the other files stay as the last full plain loop wrote them
        return plain(jitter, FILES_IN_DOUBLE)

    makers = {"eager": lambda: plain, "spade_fast": lambda: with_service}
    # A run over all files is long and already averages over many images: three rounds are enough.
    return Problem(name, mode, settings.wanted(makers), truth, jittered, least_rounds=3)


def paint(settings):
    """Strokes on the page of `spade-fast paint`, each of which gives a new label map: the page's
    request to its server, beside the network alone on the same labels.
    """
    size = _scene_size(settings)
    yield plan_of(paint_problem, settings, f"strokes on a COCO layout, {size}²", FORWARD, size)


def paint_problem(settings, name, mode, size):
    """The problem of `paint`. Every variant goes from labels to an image's rounded values, 0 to
    255, and computes each label map's windows and tables from scratch. The page's time ends when
    the answer is decoded.
    """
    strokes = list(_strokes(settings, size, max(2 if settings.quick else 5, settings.scenes)))
    wiring = {"crop_size": size, "ngf": 8 if settings.quick else 64, "norm_G": COCO_NORM}
    torch.manual_seed(0)
    eager = settle(reference.SPADEGenerator(184, **wiring)).eval()
    ours = spade_fast.SPADEGenerator.official(184, **wiring)
    ours.load_state_dict(eager.state_dict())
    place = {"device": settings.device, "dtype": settings.dtype}
    exact = copy.deepcopy(eager).to(settings.device, torch.float64)
    eager.to(**place)
    network, service = generator_of(ours, **place), Service(ours, cache=0, **place)
    door = listening(port=0)
    port = door.getsockname()[1]
    server = server_of(app_of(service, classes_of(184), port=port))
    threading.Thread(target=server.run, args=[[door]], daemon=True).start()

    def labels():
        return strokes[problem.scene]

    def plain(network, change=lambda condition: condition):
        condition = layouts.condition(labels(), labels()).to(next(network.parameters()))
        return network(change(condition))

    def alone():
        found = labels()[None].astype(np.int64)
        layout = SemanticLayout.from_labels(found, 182, found, 255)
        return rounded(network(layout.to(settings.device)))

    def page():
        # A new connection each time: the server closes idle ones.
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("POST", "/image", labels().tobytes())
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != 200:
            raise RuntimeError(content.decode())
        return values(np.array(Image.open(io.BytesIO(content))))

    def rounded(image):
        return values(picture(image[0].float().cpu()))

    def values(pixels):
        return {"image": torch.from_numpy(pixels).to(settings.dtype)}

    def truth():
        return {"image": (plain(exact)[0].movedim(0, -1).cpu() + 1) * 127.5}

    # The server stops when nothing can send requests any more.
    weakref.finalize(page, setattr, server, "should_exit", True)
    makers = {
        "eager": lambda: lambda: rounded(plain(eager)),
        "spade_fast": lambda: alone,
        "spade_fast, page": lambda: page,
    }
    problem = Problem(
        name,
        mode,
        settings.wanted(makers),
        truth,
        lambda number: rounded(plain(eager, jitter)),
        scenes=strokes,
    )
    return problem


def _strokes(settings, size, count):
    """Yields a scene's label map, uint8 [size, size], each time with one more stroke on it."""
    scenes = [layouts.draw_scene(0)]
    if settings.labels is not None:
        scenes = layouts.load_scenes(settings.labels)
    labels, _ = layouts.resized(*scenes[0], (size, size))
    image, random = Image.fromarray(labels.astype(np.uint8)), np.random.default_rng(0)
    for _ in range(count):
        ends = [tuple(place) for place in random.integers(0, size, (2, 2)).tolist()]
        ImageDraw.Draw(image).line(ends, fill=int(random.integers(182)), width=size // 12)
        yield np.array(image)


def discriminator(settings):
    """The published discriminator in training, on a fake and a real image of a COCO layout at 256²
    in one batch, with all gradients.
    """

    def build(settings, name, mode):
        segmaps, arguments = list(conditions(settings)), (187, 2, 8 if settings.quick else 64)
        torch.manual_seed(0)
        images = torch.randn(2 * settings.batch, 3, *segmaps[0].shape[2:]).requires_grad_()
        eager, ours = (
            module.MultiscaleDiscriminator(*arguments) for module in (reference, spade_fast)
        )
        return _network_problem(
            settings,
            name,
            mode,
            eager,
            ours,
            segmaps,
            (images,),
            lambda network, segmap, images: network(
                torch.cat([segmap.repeat(2, 1, 1, 1), images], dim=1)
            ),
            lambda network, segmap, images: network(images, segmap),
            takes_layouts=True,
        )

    yield plan_of(build, settings, _name(settings, f"COCO {_scene_size(settings)}²"), BACKWARD)


def training(settings):
    """A step of the published training of generator and discriminator, on a COCO layout at 256²,
    with hinge and feature matching losses, without and with the perceptual loss.

    VGG19's weights are random, with a fixed seed: this is enough to measure time and agreement.
    """
    if settings.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {settings.dtype}, training should have float32 or float64")
    name = f"COCO {_scene_size(settings)}²"
    problems = {f"{name}, without VGG19": False, f"{name}, VGG19": True}
    for name, perceptual in list(problems.items())[: 1 if settings.quick else None]:
        yield plan_of(training_problem, settings, _name(settings, name), BACKWARD, perceptual)


def training_problem(settings, name, mode, perceptual):
    """A step of training, from the same weights each time. In the settings' dtype, losses and
    gradients are compared. In float64, weights and buffers after the step are compared, too. In
    float32 they cannot be: rounding decides the sign of gradients near zero, and Adam turns that
    sign into a whole step.
    """
    segmaps, ngf = list(conditions(settings)), 8 if settings.quick else 64
    size = tuple(segmaps[0].shape[2:])
    torch.manual_seed(0)
    images = [torch.rand(settings.batch, 3, *size) * 2 - 1 for _ in segmaps]
    wiring = {"crop_size": size[1], "norm_G": COCO_NORM}
    published = [
        settle(reference.SPADEGenerator(184, ngf, **wiring)),
        settle(reference.MultiscaleDiscriminator(187, 2, ngf)),
        reference.Perceptual() if perceptual else None,
    ]
    ours = [
        spade_fast.SPADEGenerator.official(184, ngf=ngf, **wiring),
        spade_fast.MultiscaleDiscriminator(187, 2, ngf),
        losses.Perceptual(published[2].state_dict()) if perceptual else None,
    ]
    begin = steps.beginning(reference.PublishedTrainer(*published[:2]))
    for network, weights in zip(ours, begin.values()):
        network.load_state_dict(weights)

    def trainer_of(parts, dtype):
        generator, discriminator, perceptual = (
            None if part is None else copy.deepcopy(part).to(settings.device, dtype)
            for part in parts
        )
        if parts is ours:
            return steps.OurTrainer(generator, discriminator, perceptual)
        return reference.PublishedTrainer(generator, discriminator, perceptual=perceptual)

    def step(trainer, condition, image):
        return trainer.step(condition, image) | steps.gradients(trainer)

    def in_double(parts):
        trainer = trainer_of(parts, torch.float64)
        inputs = (tensors[problem.scene] for tensors in (segmaps, images))
        found = step(trainer, *(tensor.to(settings.device, torch.float64) for tensor in inputs))
        return found | steps.weights(trainer)

    def jittered(number):
        # Alternately in channels-last, where PyTorch's convolutions round five times as much.
        trainer = steps.rewind(trainers["eager"], begin)
        networks = (trainer.generator, trainer.discriminator)
        if number % 2:
            for network in networks:
                network.to(memory_format=torch.channels_last)
        found = step(trainer, *(jitter(tensors[problem.scene]) for tensors in inputs))
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
        return found

    @functools.cache
    def layout_of_scene(number):
        return SemanticLayout.from_segmap(inputs[0][number])

    inputs = [
        [tensor.to(settings.device, settings.dtype) for tensor in tensors]
        for tensors in (segmaps, images)
    ]
    eager, own = (trainer_of(parts, settings.dtype) for parts in (published, ours))
    if settings.device != "cpu":
        for network in (own.generator, own.discriminator):
            network.to(memory_format=torch.channels_last)
    # Each view is a new tensor, so finding its windows is part of the step.
    conditions_of = {
        "eager": lambda number: inputs[0][number],
        "spade_fast": lambda number: inputs[0][number].view_as(inputs[0][number]),
        "spade_fast, prepared": layout_of_scene,
    }
    trainers = {name: eager if name == "eager" else own for name in conditions_of}

    def variant(name):
        return lambda: step(
            trainers[name], conditions_of[name](problem.scene), inputs[1][problem.scene]
        )

    problem = Problem(
        name,
        mode,
        settings.wanted({name: functools.partial(variant, name) for name in conditions_of}),
        lambda: in_double(published),
        jittered,
        lambda: in_double(ours),
        scenes=segmaps,
        prepare=lambda name: steps.rewind(trainers[name], begin),
    )
    return problem


def converted(settings):
    """Other people's models, before and after `spade_fast.convert`: the published generator, and
    LivePortrait's decoder of features.
    """
    size = _scene_size(settings)

    @functools.lru_cache(1)  # shared by both modes
    def inputs(make):
        torch.manual_seed(0)
        network, segmaps = make()
        return _with_converted(network), segmaps

    def generator():
        ngf, segmaps = 8 if settings.quick else 64, list(conditions(settings))
        return reference.SPADEGenerator(184, ngf, crop_size=size, norm_G=COCO_NORM), segmaps

    def decoder():
        network = FaceDecoder(*((16, 8, 8) if settings.quick else (512, 256, 64)))
        pixels = [8 if settings.quick else 64] * 2
        return network, [
            torch.randn(settings.batch, network.fc.in_channels, *pixels)
            for _ in range(settings.scenes)
        ]

    def build(settings, name, mode, make):
        return _converted_problem(settings, name, mode, *inputs(make), bare=("limit",))

    for name, make in {f"COCO {size}²": generator, "LivePortrait's decoder": decoder}.items():
        for mode in (FORWARD, BACKWARD):
            yield plan_of(build, settings, _name(settings, name), mode, make)


def monai(settings):
    """MONAI's models, before and after `spade_fast.convert`: its generator of volumes, and its
    diffusion UNet over 50 steps.
    """
    settings = dataclasses.replace(settings, batch=1)  # one volume or image at a time

    @functools.cache  # shared by both modes
    def volumes(size, channels):
        nets, _ = _monai()
        torch.manual_seed(0)
        drawn = [
            SemanticLayout.from_labels(layouts.draw_volume(number, size)[None], 8).to_segmap()
            for number in range(settings.scenes)
        ]
        network = nets.SPADENet(3, 1, 1, 8, [size] * 3, list(channels), 16, False)
        return _with_converted(network), drawn

    def build_generator(settings, name, mode, size, channels):
        inputs = (torch.randn(1, 16),)
        return _converted_problem(settings, name, mode, *volumes(size, channels), inputs)

    def build_diffusion(settings, name, mode, size, channels, steps):
        nets, schedulers = _monai()
        scheduler = schedulers.DDIMScheduler(num_train_timesteps=1000)
        scheduler.set_timesteps(steps)

        def sample(model, segmap, image):
            for step in scheduler.timesteps.to(image.device):
                image, _ = scheduler.step(model(image, step[None], segmap), step, image)
            return image

        labels = [
            torch.as_tensor(layouts.resized(*layouts.draw_scene(number), (size, size))[0])
            for number in range(settings.scenes)
        ]
        segmaps = [
            SemanticLayout.from_labels(label[None].long() % 8, 8).to_segmap() for label in labels
        ]
        torch.manual_seed(0)
        network = nets.SPADEDiffusionModelUNet(
            2,
            3,
            3,
            8,
            (2,) * len(channels),
            channels,
            (*[False] * (len(channels) - 1), True),
            norm_num_groups=8,
            num_head_channels=channels[-1] // 4,
        )
        for parameter in network.parameters():
            if not parameter.any():  # MONAI initialises its last convolutions with zeros
                nn.init.normal_(parameter, std=0.01)
        image = torch.randn(1, 3, size, size)
        return _converted_problem(
            settings,
            name,
            mode,
            _with_converted(network),
            segmaps,
            (image,),
            sample,
            keeps_tables=True,
        )

    size, channels = (32, (8, 16)) if settings.quick else (96, (16, 32, 64))
    for mode in (FORWARD, BACKWARD):
        name = _name(settings, f"SPADENet {size}³")
        yield plan_of(build_generator, settings, name, mode, size, channels)
    size, channels, steps = (16, (8, 16), 2) if settings.quick else (64, (64, 128, 256), 50)
    name = _name(settings, f"diffusion UNet {size}², {steps} steps")
    yield plan_of(build_diffusion, settings, name, FORWARD, size, channels, steps)


def spatial(settings):
    """Decoders of diffusers whose norms are conditioned by the latent, before and after
    `spade_fast.convert`: MoVQ's and CogVideoX's as published, but with fewer channels; and the last
    norm of each alone.
    """
    settings = dataclasses.replace(settings, batch=1)  # one image or video at a time

    @functools.lru_cache(1)  # shared by both modes
    def networks_of(make):
        torch.manual_seed(0)
        return _with_converted(make())

    def build(settings, name, mode, make, latent):
        pair = networks_of(make)
        torch.manual_seed(0)
        latents = [torch.randn(1, *latent) for _ in range(settings.scenes)]
        return _converted_problem(settings, name, mode, pair, latents, counts_kept=True)

    def build_norm(settings, name, mode, make, latent, shape):
        pair = networks_of(make)
        torch.manual_seed(0)
        x = torch.randn(1, *shape).requires_grad_(mode == BACKWARD)
        latents = [torch.randn(1, *latent) for _ in range(settings.scenes)]
        return _converted_problem(
            settings,
            name,
            mode,
            pair,
            latents,
            (x,),
            lambda norm, z, x: _flat(norm(x, z))[0],
            counts_kept=True,
        )

    side, width, narrow = (8, 32, 8) if settings.quick else (32, 32, 32)
    half = side // 2 if settings.quick else 12
    networks = [
        (f"MoVQ {8 * side}²", lambda: _Decoding(_movq(width)), (4, side, side)),
        (f"CogVideoX 9 × {8 * half}²", lambda: _Decoding(_cogvideox(narrow)), (16, 3, half, half)),
    ]
    norms = [
        (
            f"MoVQ's norm, {width} × {8 * side}²",
            lambda: _movq(width).decoder.conv_norm_out,
            (4, side, side),
            (width, 8 * side, 8 * side),
        ),
        (
            f"CogVideoX's norm, {narrow} × 9 × {8 * half}²",
            lambda: _cogvideox(narrow).decoder.norm_out,
            (16, 3, half, half),
            (narrow, 9, 8 * half, 8 * half),
        ),
    ]
    for build_one, problems in ((build, networks), (build_norm, norms)):
        for (name, *given), mode in itertools.product(problems, (FORWARD, BACKWARD)):
            yield plan_of(build_one, settings, _name(settings, name), mode, *given)


class _Decoding(nn.Module):
    """An autoencoder of diffusers that decodes, without its encoder."""

    def __init__(self, autoencoder):
        super().__init__()
        for name in ("encoder", "quant_conv", "quantize"):
            if hasattr(autoencoder, name):
                setattr(autoencoder, name, None)
        self.autoencoder = autoencoder
        is_quantised = hasattr(autoencoder, "quantize")
        self.settings = {"force_not_quantize": True} if is_quantised else {}

    def forward(self, z):
        return self.autoencoder.decode(z, **self.settings, return_dict=False)[0]


def _movq(width):
    """MoVQ's autoencoder, whose published width is 128."""
    return _diffusers().VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        block_out_channels=(width, 2 * width, 2 * width, 4 * width),
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=8,
        norm_type="spatial",
    )


def _cogvideox(width):
    """CogVideoX's autoencoder, whose published width is 128, with as many channels in a group."""
    return _diffusers().AutoencoderKLCogVideoX(
        block_out_channels=(width, 2 * width, 2 * width, 4 * width),
        norm_num_groups=width // 4,
    )


def _diffusers():
    try:
        import diffusers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the case spatial needs diffusers: pip install diffusers ({error})"
        ) from error
    return diffusers


def export(settings):
    """Networks in ONNX Runtime: as torch.onnx.export writes them, and as spade_fast.export does.
    They are the published generator from label maps, LivePortrait's decoder of features, and
    MONAI's generator of volumes.
    """
    if settings.device != "cpu" or settings.dtype != torch.float32:
        raise ValueError(
            f"the case export is for float32 on the CPU, not {settings.dtype} on {settings.device}"
        )
    settings = dataclasses.replace(settings, batch=1)  # one scene or volume at a time
    size, ngf = _scene_size(settings), 8 if settings.quick else 64
    volume, channels = (32, (8, 16)) if settings.quick else (96, (16, 32, 64))

    def generator():
        network = reference.SPADEGenerator(184, ngf, crop_size=size, norm_G=COCO_NORM)
        ours = spade_fast.SPADEGenerator.official(184, ngf=ngf, crop_size=size, norm_G=COCO_NORM)
        scenes = []
        for maps in _label_maps(settings, (size, size)):
            labels = [torch.from_numpy(one.astype(np.int64))[None] for one in maps]
            scenes.append(((layouts.condition(*maps),), labels))
        return network, ours, None, scenes, {"instances": True, "dont_care": 255}

    def decoder():
        network = FaceDecoder(*((16, 8, 8) if settings.quick else (512, 256, 64)))
        pixels = [8 if settings.quick else 64] * 2
        scenes = []
        for _ in range(settings.scenes):
            features = torch.randn(1, network.fc.in_channels, *pixels)
            scenes.append(((features,), [features]))
        return network, network, scenes[0][0], scenes, {}

    def volumes():
        nets, _ = _monai()
        network = nets.SPADENet(3, 1, 1, 8, [volume] * 3, list(channels), 16, False)
        labels = [layouts.draw_volume(number, volume)[None] for number in range(settings.scenes)]
        found = [SemanticLayout.from_labels(one, 8) for one in labels]
        scenes = [
            ((layout.to_segmap(),), [torch.as_tensor(one).long()])
            for layout, one in zip(found, labels)
        ]
        return network, network, (found[0],), scenes, {}

    problems = {
        f"COCO {size}²": generator,
        "LivePortrait's decoder": decoder,
        f"SPADENet {volume}³": volumes,
    }
    for name, make in problems.items():
        yield plan_of(export_problem, settings, _name(settings, name), FORWARD, make)


def export_problem(settings, name, mode, make):
    """The problem of a network in ONNX Runtime. Our results there are within 1e-4 of eager's,
    relative to the largest value. ONNX Runtime rounds more than PyTorch in the instance norms of
    volumes, so what torch.onnx.export writes is a yardstick of the allowed error, too.

    make: returns the network; ours with the same weights; the example to export it with, or None;
    the scenes, each with the network's arguments and our exported network's inputs; and further
    arguments of `export`.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModuleNotFoundError(
            "the case export needs three packages: pip install onnx onnxscript onnxruntime"
            f" ({error})"
        ) from error
    torch.manual_seed(0)
    network, ours, example, scenes, arguments = make()
    settle(network).eval().requires_grad_(False)
    if ours is not network:
        ours.load_state_dict(network.state_dict())
    exact = copy.deepcopy(network).double()

    def session(path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def variant(write, inputs_of, is_ours=True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            write(path)
            loaded = session(path)
        names, compared = [one.name for one in loaded.get_inputs()], set()

        def run():
            given = dict(zip(names, (one.numpy() for one in inputs_of()), strict=True))
            y = torch.from_numpy(loaded.run(None, given)[0])
            if is_ours and problem.scene not in compared:  # in the first call, which is not timed
                compared.add(problem.scene)
                expected = eager()["y"]
                apart = ((y - expected).abs().max() / expected.abs().max()).item()
                if not apart <= 1e-4:
                    raise ValueError(f"y is {apart:.1e} from eager's, it should be 1e-4 at most")
            return {"y": y}

        return run

    def plain(path):
        with quiet():
            torch.onnx.export(network, scenes[0][0], path, dynamo=True, verbose=False)

    def by_us(windows):
        return lambda path: spade_fast.export(ours, path, example, windows=windows, **arguments)

    def eager(network=network, change=lambda tensor: tensor):
        return {"y": _flat(network(*map(change, scenes[problem.scene][0])))[0]}

    makers = {
        "eager": lambda: eager,
        "ONNX Runtime": lambda: variant(plain, lambda: scenes[problem.scene][0], False),
        "spade_fast, ONNX Runtime": lambda: variant(by_us(True), lambda: scenes[problem.scene][1]),
    }
    if scenes[0][1][0].dtype == torch.int64:
        makers["spade_fast, ONNX Runtime, pixels"] = lambda: variant(
            by_us(False), lambda: scenes[problem.scene][1]
        )

    def jittered(number):
        rival = problem.variants.get("ONNX Runtime")
        return eager(change=jitter) if number % 2 or rival is None else rival()

    problem = Problem(
        name,
        mode,
        settings.wanted(makers),
        lambda: eager(exact, torch.Tensor.double),
        jittered,
        scenes=scenes,
    )
    return problem


def _name(settings, name):
    """The name of a problem of networks, with the batch size and the number of scenes."""
    name += f", batch {settings.batch}" if settings.batch > 1 else ""
    return name + (f", {settings.scenes} scenes" if settings.scenes > 1 else "")


def _scene_size(settings):
    """Default height and width of `conditions`."""
    return 64 if settings.quick else 256


def _monai():
    try:
        from monai.networks import nets, schedulers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the case monai needs MONAI and einops: pip install monai einops ({error})"
        ) from error
    return nets, schedulers


def _with_converted(network):
    """The network and its converted copy."""
    ours = copy.deepcopy(settle(network))
    spade_fast.convert(ours)
    return network, ours


def _converted_problem(settings, name, mode, networks, segmaps, *arguments, **named):
    """The problem of copies of a network and of its converted copy."""
    return _network_problem(
        settings, name, mode, *copy.deepcopy(networks), segmaps, *arguments, **named
    )


def _network_problem(
    settings,
    name,
    mode,
    eager,
    ours,
    segmaps,
    inputs=(),
    call=lambda network, segmap, *inputs: network(segmap, *inputs),
    our_call=None,
    bare_call=None,
    *,
    bare=(),
    keeps_tables=False,
    takes_layouts=False,
    graphed=False,
    counts_kept=False,
):
    """The problem of call(network, segmap, *inputs) on each scene's segmap in turn; with BACKWARD,
    also the gradients of all parameters and of all inputs that require them.

    Args:
        our_call: the call of our network, if it differs.
        bare_call: the call of a network without SPADE, if it differs.
        bare: which of BARE are measured. Every SPADE of eager's network is one of reference.py.
        keeps_tables: our network keeps its tables during each call.
        takes_layouts: our network takes SemanticLayouts, and is also measured on prepared ones. If
            it has SPADEs to leave out (`bare`) and the mode is FORWARD, it is measured frozen, too.
        graphed: our network is also measured as CUDA graphs.
        counts_kept: with BACKWARD, what each network keeps for backward is counted, too.
    """
    our_call, bare_call = our_call or call, bare_call or call
    settle(eager.to(settings.device))
    ours.load_state_dict(eager.state_dict())
    eager, ours = (_set_mode(network.to(settings.device), mode) for network in (eager, ours))
    exact, ours_in_double = (copy.deepcopy(network).double() for network in (eager, ours))
    eager, ours = eager.to(settings.dtype), ours.to(settings.dtype)
    inputs, segmaps = (
        [_like(tensor, settings.device, settings.dtype) for tensor in tensors]
        for tensors in (inputs, segmaps)
    )
    dy = None

    def variant(
        network,
        inputs,
        segmaps,
        call=call,
        layout=torch.contiguous_format,
        compile=False,
        prepared=False,
        frozen=False,
        keeps_tables=False,
    ):
        if layout is torch.channels_last:
            for parameter in network.parameters():
                parameter.data = _like(parameter.data, layout=layout)
        inputs, segmaps = (
            [_like(tensor, layout=layout) for tensor in tensors] for tensors in (inputs, segmaps)
        )
        wanted = dict(network.named_parameters()) | {
            f"input{i}": tensor for i, tensor in enumerate(inputs) if tensor.requires_grad
        }
        forward = (
            torch.compile(network, dynamic=False, mode=settings.compile_mode)
            if compile
            else network
        )
        tables = spade_fast.frozen(network, max_bytes=8 << 30) if frozen else None
        if frozen:
            tables.__enter__()  # stays open while `run`, which refers to it, exists

        def outputs():
            segmap = segmaps[problem.scene % len(segmaps)]
            # Each view is a new tensor, so finding its windows is measured, as for a new layout.
            segmap = prepared_layout() if prepared else segmap.view_as(segmap)
            with spade_fast.frozen(network) if keeps_tables else contextlib.nullcontext():
                return _flat(call(forward, segmap, *inputs))

        def run(tables=tables):
            nonlocal dy
            y = outputs()
            if (
                dy is None
            ):  # zero where y is zero: there the derivative of a final activation may jump
                dy = [
                    torch.cos(torch.arange(part.numel(), device=part.device)).view(part.shape)
                    * part.detach()
                    for part in y
                ]
            return _outputs(
                y, wanted, [gradient.to(part.dtype) for gradient, part in zip(dy, y)], mode
            )

        if counts_kept and mode == BACKWARD:
            setattr(run, "outputs", outputs)
        return run

    @functools.cache
    def layout_of_scene(number):
        return SemanticLayout.from_segmap(segmaps[number])

    def prepared_layout():
        """The layout of this round's scene. Its windows stay numbered after the first call."""
        return layout_of_scene(problem.scene % len(segmaps))

    def new_layout():
        return SemanticLayout.from_segmap(segmaps[problem.scene % len(segmaps)])

    def graph(layout):
        captured = []

        def through_graph(network, segmap, *inputs):
            condition = layout()
            if not captured:
                captured.append(spade_fast.Graphed(network, condition, *inputs))
            return captured[0](condition, *inputs)

        return variant(ours, inputs, segmaps, through_graph)

    def frozen(fold):
        own = fold(copy.deepcopy(ours))
        return variant(own, inputs, segmaps, our_call, prepared=True, frozen=True)

    def without_spades(kind, layout):
        return variant(without_spade(eager, BARE[kind]), inputs, segmaps, bare_call, layout=layout)

    makers = {
        "eager": lambda: variant(eager, inputs, segmaps),
        "torch.compile": lambda: variant(copy.deepcopy(eager), inputs, segmaps, compile=True),
        "spade_fast": lambda: variant(ours, inputs, segmaps, our_call, keeps_tables=keeps_tables),
    }
    if settings.device != "cpu" and segmaps[0].dim() == 4:  # a GPU's tensor cores work in it
        ours = ours.to(memory_format=torch.channels_last)
        makers["eager, channels-last"] = lambda: variant(
            copy.deepcopy(eager), inputs, segmaps, layout=torch.channels_last
        )
    if takes_layouts:
        makers["spade_fast, prepared"] = lambda: variant(
            ours, inputs, segmaps, our_call, prepared=True
        )
    is_spectral = any(hasattr(module, "weight_orig") for module in eager.modules())
    if takes_layouts and bare and mode == FORWARD:
        makers["spade_fast, frozen"] = lambda: frozen(lambda network: network)
        if is_spectral:
            makers["spade_fast, folded, frozen"] = lambda: frozen(spade_fast.fold_spectral_norm)
    if graphed:
        makers["spade_fast, graph"] = lambda: graph(new_layout)
        makers["spade_fast, graph, prepared"] = lambda: graph(prepared_layout)
    for kind in bare:
        for memory, layout in MEMORIES.items():
            make = functools.partial(without_spades, kind, layout)
            makers[f"{kind}, {memory}"] = make
    variants = settings.wanted(makers)
    eager_channels_last = copy.deepcopy(eager)

    def jittered(number):
        # Alternately in channels-last, where PyTorch's convolutions round five times as much.
        segmap = segmaps[problem.scene % len(segmaps)]
        kinds = [(eager, torch.contiguous_format), (eager_channels_last, torch.channels_last)]
        network, layout = kinds[number % 2]
        return variant(
            network, [jitter(tensor) for tensor in inputs], [jitter(segmap)], layout=layout
        )()

    in_double = [
        [_like(tensor, dtype=torch.float64) for tensor in tensors] for tensors in (inputs, segmaps)
    ]
    ours_in_double = variant(ours_in_double, *in_double, our_call, keeps_tables=keeps_tables)
    problem = Problem(
        name,
        mode,
        variants,
        variant(exact, *in_double),
        jittered,
        ours_in_double,
        segmaps,
        folding=tuple(name for name in variants if is_spectral and name.endswith("frozen")),
    )
    return problem


def _like(tensor, device=None, dtype=None, layout=torch.contiguous_format):
    """A leaf with a tensor's values, on a device, in a dtype and in a memory format, of which
    channels-last is for maps and volumes alone.
    """
    if layout is torch.channels_last:
        layout = FORMATS.get(tensor.dim(), torch.contiguous_format)
    copied = tensor.detach().to(device=device or tensor.device, dtype=dtype)
    return copied.contiguous(memory_format=layout).requires_grad_(tensor.requires_grad)


def _flat(results):
    """The tensors in nested lists of results."""
    return (
        [tensor for part in results for tensor in _flat(part)]
        if isinstance(results, (list, tuple))
        else [results]
    )


def conditions(settings, size=(256, 256), label_nc=184):
    """Yields conditions [batch, label_nc, *size], or at 64² with --quick, of the first scenes of
    `settings.labels`, or of drawn scenes if it is None. If the folder has too few, the same scenes
    follow mirrored. For fewer classes than COCO-Stuff's, several classes share a number.
    """
    classes, batch = label_nc - 2, []
    for labels, instances in _label_maps(settings, (64, 64) if settings.quick else size):
        batch.append(
            layouts.condition(np.where(labels == 255, 255, labels % classes), instances, classes)
        )
        if len(batch) == settings.batch:
            yield torch.cat(batch)
            batch = []


def _label_maps(settings, size):
    """Yields the label maps and instance maps of `conditions`."""
    count = settings.scenes * settings.batch
    if settings.labels is None:
        scenes = map(layouts.draw_scene, range(count))
    else:
        scenes = layouts.load_scenes(settings.labels, settings.instances)
        scenes = [*scenes, *map(layouts.mirrored, scenes)][:count]
    for labels, instances in scenes:
        instances = np.zeros_like(labels) if instances is None else instances
        yield layouts.resized(labels, instances, size)


class FaceDecoder(nn.Module):
    """A network with the shapes of LivePortrait's decoder: from features [N, 256, 64, 64], which
    are also the condition of every SPADE, to an image at 512².
    """

    def __init__(self, wide, middle, narrow):
        super().__init__()
        self.fc = nn.Conv2d(wide // 2, wide, 3, padding=1)
        pairs = [(wide, wide)] * 6 + [(wide, middle), (middle, narrow)]
        self.blocks = nn.ModuleList(
            reference.SPADEResnetBlock(*pair, "spadespectralinstance3x3", wide // 2)
            for pair in pairs
        )
        self.conv_img = nn.Conv2d(narrow, 12, 3, padding=1)

    def forward(self, features):
        x = self.fc(features)
        for number, block in enumerate(self.blocks):
            x = block(x if number < 6 else F.interpolate(x, scale_factor=2), features)
        return torch.sigmoid(F.pixel_shuffle(self.conv_img(F.leaky_relu(x, 0.2)), 2))


class Instead(nn.Module):
    """norm(x), in place of SPADE(x, segmap)."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, segmap):
        return self.norm(x)


def without_spade(network, norm):
    """A copy of a network with norm(x) in place of every SPADE: the same convolutions with the same
    weights, no γ and no β.
    """
    bare = copy.deepcopy(network)
    for module in list(bare.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, reference.SPADE):
                setattr(module, name, Instead(norm))
    return bare


def jitter(x):
    """x with each element changed by at most about a rounding."""
    rounding = torch.finfo(x.dtype).eps * (torch.rand_like(x) - 0.5)
    return (x.detach() * (1 + rounding)).requires_grad_(x.requires_grad)


@torch.no_grad()
def settle(network):
    """Lets spectral norm's power iteration converge, as in a trained network: with its initial
    random vectors, σ is about zero.
    """
    for module in network.modules():
        for _ in range(20 if hasattr(module, "weight_orig") else 0):
            module(module.weight_orig.new_zeros(1, module.in_channels, 1, 1))
    return network


def _set_mode(network, mode):
    """Sets inference, or training without spectral norm's power iteration, whose gradient
    torch.compile gets wrong (torch 2.13).
    """
    network.train(mode == BACKWARD)
    for module in network.modules():
        if hasattr(module, "weight_orig"):
            module.eval()
    return network


def _compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def _outputs(y, wanted, dy, mode):
    """y, a tensor or a list of tensors, and with BACKWARD the gradients of `wanted`, by name."""
    outputs = (
        {f"y{number}": part for number, part in enumerate(y)} if isinstance(y, list) else {"y": y}
    )
    if mode == FORWARD:
        return outputs
    gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), dy)
    return {name: part.detach() for name, part in outputs.items()} | {
        f"d{name}": gradient for name, gradient in zip(wanted, gradients)
    }


CASES = {
    "modulate": modulate,
    "lookup": lookup,
    "layer": layer,
    "block": block,
    "generator": generator,
    "generate": generate,
    "paint": paint,
    "discriminator": discriminator,
    "training": training,
    "converted": converted,
    "monai": monai,
    "spatial": spatial,
    "export": export,
}
