"""The service under concurrent clients, with a reload of other weights halfway through, beside the
published network behind a lock and that network in ONNX Runtime.

A client requests the image of the next of a few layouts as soon as it has the previous image. All
inputs are ready beforehand: SemanticLayouts for the service, one-hot conditions for the rivals. The
rivals keep their weights.
"""

import contextlib
import copy
import functools
import itertools
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Group

import spade_fast
from spade_fast import SemanticLayout, Service, reference
from spade_fast.agreement import excess
from spade_fast.service import bytes_of

from . import layouts, measure
from .cases.networks import COCO_NORM, settle
from .cases.problem import FORWARD, jitter
from .report import match, short
from .tables import narrow_table

CLASSES = 182
CAPTION = (
    "match: the largest error of an image as a fraction of the allowed error; the service's images"
    " also equal, to the bit, those of the generator called directly. alone: a request of a single"
    " client, for a new layout and for a known one. together: requests of all clients."
    " cache: the peak size of tables and windows."
)


@dataclass
class Load:
    """The requests to each server."""

    seconds: float = 60
    clients: int = 8
    layouts: int = 6
    cache: str = "256MB"  # of the service
    size: int = 256  # height and width of the images
    ngf: int = 8

    @property
    def name(self):
        return (
            f"COCO {self.size}², ngf {self.ngf}, {self.clients} clients, {self.layouts} layouts,"
            f" cache {self.cache}"
        )


@dataclass
class Row(measure.Row):
    """One server. Its `times` are the seconds of every request while all clients are active."""

    alone_new: float | None = None  # median seconds of a single client's requests for new layouts
    alone_known: float | None = None  # the same for layouts that were requested before
    images_per_second: float | None = None
    p50: float | None = None  # median seconds of a request while all clients are active
    p95: float | None = None
    cache: int | None = None  # peak bytes of tables and windows that the server keeps


@dataclass
class Server:
    ask: Callable  # takes a layout's number, returns its image
    reload: Callable = lambda: None  # loads the other weights
    cached: Callable = lambda: 0  # bytes that are kept now
    # The images of the old and of the new weights, which the server's images must equal to the bit.
    # None: its images must agree with the truth of the old weights.
    exactly: list | None = None


class Inputs:
    """The generators with the old and the new weights, and the layouts: one more than the clients
    request, for a first request that is not timed.
    """

    def __init__(self, load):
        self.load = load
        wiring = {"crop_size": load.size, "ngf": load.ngf, "norm_G": COCO_NORM}
        self.published, self.ours = [], []
        for seed in range(2):
            torch.manual_seed(seed)
            published = settle(reference.SPADEGenerator(CLASSES + 2, **wiring)).eval()
            ours = spade_fast.SPADEGenerator.official(CLASSES + 2, **wiring).eval()
            ours.load_state_dict(published.state_dict())
            self.published.append(published)
            self.ours.append(ours)
        self.layouts, self.conditions = [], []
        for number in range(load.layouts + 1):
            maps = layouts.resized(*layouts.draw_scene(number), (load.size, load.size))
            self.conditions.append(layouts.condition(*maps, CLASSES))
            labels, instances = (torch.from_numpy(values)[None] for values in maps)
            self.layouts.append(
                SemanticLayout.from_labels(labels, CLASSES, instances, dont_care=255)
            )

    @functools.cached_property
    def by_hand(self):
        """The images of the old and of the new weights, by the layout's number, from generators
        that are called directly.
        """
        found = []
        for ours in self.ours:
            folded = copy.deepcopy(ours).fold_spectral_norm()
            with torch.no_grad(), spade_fast.frozen(folded):
                found.append([folded(self.layouts[number]) for number in range(self.load.layouts)])
        return found

    @functools.cached_property
    def truths(self):
        """By the layout's number, the old weights' image in float64, and two images of the
        published network as yardsticks for the allowed error.
        """
        published, exact = self.published[0], copy.deepcopy(self.published[0]).double()
        with torch.no_grad():
            return [
                (exact(one.double()), [published(one), published(jitter(one))])
                for one in self.conditions[: self.load.layouts]
            ]

    def excess(self, number, image):
        """The error of an image of the old weights as a fraction of the allowed error
        (agreement.py).
        """
        truth, yardsticks = self.truths[number]
        return excess(image, yardsticks, truth)


class Heard:
    """A server and its distinct answers: every image that differs from all previous ones."""

    def __init__(self, server):
        self.server = server
        self.reloaded = threading.Event()
        self.images = defaultdict(list)  # by layout number, and whether requested after the reload
        self.most_cached = 0
        self._lock = threading.Lock()

    def ask(self, number):
        """Sends one request, records its image, and returns the seconds that it took."""
        key, began = (number, self.reloaded.is_set()), time.perf_counter()
        image = self.server.ask(number)
        took = time.perf_counter() - began
        with self._lock:
            if not any(torch.equal(image, one) for one in self.images[key]):
                self.images[key].append(image)
            self.most_cached = max(self.most_cached, self.server.cached())
        return took

    def reload(self):
        try:
            self.server.reload()
        finally:  # even if it fails, because clients go on until this is set
            self.reloaded.set()


@contextlib.contextmanager
def our_service(inputs):
    load, (old, new) = inputs.load, inputs.ours
    with Service(old, cache=load.cache, waiting=load.clients) as service:
        yield Server(
            lambda number: service.generate(inputs.layouts[number]),
            lambda: service.reload(new),
            lambda: service.bytes,
            inputs.by_hand,
        )


@contextlib.contextmanager
def behind_a_lock(inputs):
    lock = threading.Lock()

    def ask(number):
        with lock, torch.no_grad():
            return inputs.published[0](inputs.conditions[number])

    yield Server(ask)


@contextlib.contextmanager
def in_onnx_runtime(inputs):
    """ONNX Runtime, on as many threads as PyTorch, because its default may be fewer."""
    try:
        import onnxruntime

        example = (inputs.conditions[0],)
        program = torch.onnx.export(inputs.published[0], example, dynamo=True, verbose=False)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"ONNX Runtime needs three packages: pip install onnx onnxscript onnxruntime ({error})"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def ask(number):
        return torch.from_numpy(session.run(None, {name: inputs.conditions[number].numpy()})[0])

    yield Server(ask)


SERVERS = {
    "eager, a lock": behind_a_lock,
    "ONNX Runtime": in_onnx_runtime,
    "spade_fast, Service": our_service,
}


def measured(variant, inputs):
    """The Row of one server; without figures if it failed or an image is wrong."""
    load, row = inputs.load, Row("service", inputs.load.name, FORWARD, variant)
    numbers = range(load.layouts)
    try:
        with SERVERS[variant](inputs) as server:
            server.ask(load.layouts)  # a warm-up, for costs of the first request only
            heard = Heard(server)
            alone = [[heard.ask(number) for number in numbers] for _ in ("new", "known")]
            times, seconds = together(heard, load)
    except Exception as error:  # the other servers are still measured
        row.failure = f"{type(error).__name__}: {error}".split("\n")[0]
        return row
    row.cache = heard.most_cached
    judge(row, heard, inputs)
    if row.matches:
        row.alone_new, row.alone_known = map(statistics.median, alone)
        row.times, row.images_per_second = times, len(times) / seconds
        row.p50, row.p95 = (
            statistics.quantiles(times, n=20, method="inclusive")[place] for place in (9, 18)
        )
    return row


def together(heard, load):
    """The seconds of each request of all clients, and the seconds from the first request to the
    last answer. Halfway through, the server loads other weights; after that, each client sends at
    least one more request.
    """
    numbers, answered, began = itertools.count(), threading.Event(), time.perf_counter()

    def client():
        times, is_last = [], False
        try:
            while not is_last:
                is_over = time.perf_counter() - began >= load.seconds
                is_last = is_over and heard.reloaded.is_set()
                times.append(heard.ask(next(numbers) % load.layouts))
                answered.set()
        finally:
            answered.set()
        return times

    with ThreadPoolExecutor(load.clients) as pool:
        clients = [pool.submit(client) for _ in range(load.clients)]
        answered.wait()
        time.sleep(max(0, began + load.seconds / 2 - time.perf_counter()))
        heard.reload()
        times = [seconds for one in clients for seconds in one.result()]
    return times, time.perf_counter() - began


def judge(row, heard, inputs):
    """Writes into the row the error of the server's images, or the fault of one of them."""
    images = [(*key, image) for key, found in heard.images.items() for image in found]
    if heard.server.exactly is None:
        row.excess = max(inputs.excess(number, image) for number, _, image in images)
        return
    old, new = heard.server.exactly
    row.excess = max(map(inputs.excess, range(len(old)), old))
    limit = bytes_of("cache", inputs.load.cache)
    if heard.most_cached > limit:
        row.failure = f"{heard.most_cached} bytes are kept; they should be at most {limit}"
    for number, is_late, image in images:
        allowed = [new[number]] if is_late else [new[number], old[number]]
        if not any(torch.equal(image, one) for one in allowed):
            whose = "the new weights, after the reload" if is_late else "the old or the new weights"
            row.failure = f"an image of layout {number} is not that of {whose}"


def version():
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return "not installed"


def table(rows):
    columns = ["match", "alone,\nnew", "alone,\nknown", "together,\nimages/s", "p50", "p95"]
    found = narrow_table("server", *columns, "cache", title=rows[0].problem)
    for row in rows:
        figures = []
        if row.times:
            times = (row.alone_new, row.alone_known, row.p50, row.p95)
            new, known, p50, p95 = (f"{short(seconds * 1e3, 1)} ms" for seconds in times)
            cache = f"{short(row.cache / 2**20, 1)} MiB" if row.cache else ""
            figures = [new, known, short(row.images_per_second, 2), p50, p95, cache]
        found.add_row(row.variant, match(row), *figures)
    return Group(found, "", CAPTION)
