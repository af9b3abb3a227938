"""The case `paint`: from a stroke on the page to its image."""

import contextlib
import copy
import http.client
import io
import threading
import weakref

import numpy as np
import torch
from PIL import Image, ImageDraw

from spade_fast import SemanticLayout, Service
from spade_fast.paint import app_of, classes_of, listening, server_of
from spade_fast.service import generator_of
from spade_fast.training.pictures import picture

from .. import layouts
from .networks import published_generators
from .problem import FORWARD, Problem, jitter, plan_of
from .scenes import scene_size


def paint(settings):
    """Strokes on the page of `spade-fast paint`, each of which gives a new label map: the page's
    request to its server, beside the network alone on the same labels.
    """
    size = scene_size(settings)
    yield plan_of(paint_problem, settings, f"strokes on a COCO layout, {size}²", FORWARD, size)


def paint_problem(settings, name, mode, size):
    """The problem of `paint`. Every variant goes from labels to an image's rounded values, 0 to
    255, and computes each label map's windows and tables from scratch. The page's time ends when
    the answer is decoded.
    """
    strokes = list(_strokes(settings, size, max(2 if settings.quick else 5, settings.scenes)))
    eager, ours = published_generators(settings, size)
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
