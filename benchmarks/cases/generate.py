"""The case `generate`: from a folder of label maps to a folder of images."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spade_fast import Service
from spade_fast.generation import Maps, generate_with
from spade_fast.training.pictures import picture

from .. import layouts
from .networks import published_generators
from .problem import FORWARD, Problem, jitter, plan_of

FILES_IN_DOUBLE = 2  # the published network takes seconds per file in float64


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
    eager, ours = published_generators(settings, size)
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
