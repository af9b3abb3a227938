"""Predicted times on an H200, of a model whose only constants are committed measurements.

On the device, an operator takes the longer of moving its bytes at the speed of a copy and computing
its operations at the speed of the generator's convolutions, and a fixed time per launch. On the
host, a call takes a fixed time per launch and per SPADE. A call takes the longer of both. Nothing
here was measured except what `Model.measured` reads.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from .summary import RESULTS
from .tables import narrow_table

GENERATOR, BATCH = "h200-generator-bfloat16.json", "h200-generator-batch-16-bfloat16.json"
OPERATIONS = ("h200-modulate-bfloat16.json", "h200-lookup-bfloat16.json")
KNOWN, FOLDED, EAGER = "generator, windows known", "generator, folded, frozen", "generator, eager"
TRAINING = "generator, training"
# Which rows of GENERATOR measured these paths: mode, variant.
ROWS = {
    "generator, new layout": ("forward", "spade_fast"),
    KNOWN: ("forward", "spade_fast, prepared"),
    "generator, frozen": ("forward", "spade_fast, frozen"),
    FOLDED: ("forward", "spade_fast, folded, frozen"),
    TRAINING: ("forward+backward", "spade_fast, prepared"),
    EAGER: ("forward", "eager"),
}
GRAPH = ("forward", "spade_fast, graph, prepared")  # of KNOWN, without the host
CALIBRATING = {KNOWN, FOLDED, EAGER}  # paths whose measured times are the model's constants
# The numbers of launches that the paths had at the commit of the results, as `python -m benchmarks
# launches` counted there.
COMMIT = "bd89971"
LAUNCHES_THEN = {
    "generator, new layout": 242,
    KNOWN: 221,
    "generator, frozen": 95,
    FOLDED: 77,
    TRAINING: 1103,
    EAGER: 357,
}
IMAGES = 16  # of BATCH


class Work(NamedTuple):
    """What an operator asks of a device. bytes: of its tensors and results, each once. operations:
    of multiplying matrices, as PyTorch's FlopCounterMode counts them.
    """

    name: str
    launches: int
    bytes: int
    operations: int


@dataclass(frozen=True)
class Model:
    """The constants, in bytes, operations and seconds."""

    bandwidth: float  # of a copy, per second
    rate: float  # operations per second
    launch: float  # on the device
    host_launch: float
    host_layer: float  # beyond its launches: Python of a SPADE and of the modules around it
    host_eager: float  # per launch of plain PyTorch

    @classmethod
    def measured(cls, known: list[Work], folded: list[Work]) -> "Model":
        """Takes the constants from the committed results of the H200.

        known, folded: the work of the paths KNOWN and FOLDED.
        """
        bandwidth = bandwidth_of_a_copy()
        # BATCH, "folded, frozen": what is left of its time is that of the convolutions.
        others = sum(IMAGES * one.bytes for one in folded if not one.operations)
        left = measured(BATCH, *ROWS[FOLDED]) - others / bandwidth
        rate = IMAGES * sum(one.operations for one in folded) / left
        # GENERATOR, "graph, prepared": the device alone, so what is left is that of the launches.
        busy = cls(bandwidth, rate, 0, 0, 0, 0).device(known)
        launch = (measured(GENERATOR, *GRAPH) - busy) / LAUNCHES_THEN[KNOWN]
        # GENERATOR, "prepared" and "folded, frozen": the same layers, with and without launches
        # for their tables.
        times = {path: measured(GENERATOR, *ROWS[path]) for path in CALIBRATING}
        host_launch = (times[KNOWN] - times[FOLDED]) / (
            LAUNCHES_THEN[KNOWN] - LAUNCHES_THEN[FOLDED]
        )
        left = times[FOLDED] - host_launch * LAUNCHES_THEN[FOLDED]
        # GENERATOR, "eager".
        host_eager = times[EAGER] / LAUNCHES_THEN[EAGER]
        return cls(bandwidth, rate, launch, host_launch, left / layers(folded), host_eager)

    def device(self, work: list[Work], launches: int | None = None) -> float:
        """Seconds on the device. launches: another number of launches of the same work."""
        number = sum(one.launches for one in work) if launches is None else launches
        busy = sum(max(one.bytes / self.bandwidth, one.operations / self.rate) for one in work)
        return busy + number * self.launch

    def host(self, path: str, work: list[Work], launches: int | None = None) -> float:
        """Seconds on the host, which are none in a graph."""
        number = sum(one.launches for one in work) if launches is None else launches
        if path == EAGER:
            return number * self.host_eager
        return number * self.host_launch + layers(work) * self.host_layer

    def call(self, path: str, work: list[Work], launches: int | None = None) -> float:
        """Seconds of a whole call."""
        return max(self.device(work, launches), self.host(path, work, launches))


def layers(work: list[Work]) -> int:
    """The number of SPADEs in a call."""
    return sum(one.name in ("spade_fast::apply", "spade_fast::instance_forward") for one in work)


def results(file: str) -> dict:
    return json.loads((RESULTS / file).read_text())


def bandwidth_of_a_copy() -> float:
    """Bytes per second, as measured beside the operations."""
    return results(OPERATIONS[0])["environment"]["copy, bytes/s"]


def measured(file: str, mode: str, variant: str) -> float:
    """The median of a generator's row, in seconds."""
    (row,) = (
        row for row in results(file)["rows"] if (row["mode"], row["variant"]) == (mode, variant)
    )
    return statistics.median(row["times"])


class Row(NamedTuple):
    """The predictions for a path, in ms. then: with the launches that the code had when it was
    measured; empty where it was not.
    """

    path: str
    device: str
    host: str
    predicted: str
    then: str = ""
    measured: str = ""
    ratio: str = ""


def rows(model: Model, works: dict[str, list[Work]]) -> Iterator[Row]:
    """The predictions for each path, and for KNOWN and TRAINING as graphs."""
    for path, work in works.items():
        device, host = model.device(work), model.host(path, work)
        beside: tuple[str, ...] = ()
        if path in ROWS:
            then = model.call(path, work, LAUNCHES_THEN[path])
            beside = compared(then, measured(GENERATOR, *ROWS[path]), path in CALIBRATING)
        yield Row(path, *map(milliseconds, (device, host, max(device, host))), *beside)
        if path in (KNOWN, TRAINING):
            then = model.device(work, LAUNCHES_THEN[path])
            beside = compared(then, measured(GENERATOR, *GRAPH), True) if path == KNOWN else ()
            yield Row(f"{path}, graph", *map(milliseconds, (device, 0, device)), *beside)


def compared(predicted: float, found: float, calibrates: bool) -> tuple[str, str, str]:
    """Both times, and their ratio unless it is a constant of the model."""
    ratio = "constant" if calibrates else f"{predicted / found:.2f}"
    return milliseconds(predicted), milliseconds(found), ratio


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def table(model: Model, works: dict[str, list[Work]]) -> Table:
    """The predictions for each path beside the measured times."""
    columns = ("device", "host", "pre-\ndicted", "predicted\nfor then", "mea-\nsured", "ratio")
    shown = narrow_table("predicted ms of one call", *columns)
    for row in rows(model, works):
        shown.add_row(*row)
    return shown


def table_of_operators(model: Model, works: dict[str, list[Work]]) -> Table:
    """For each operator of this package, the predicted time of a launch on the device, in the path
    that has most of them.
    """
    columns = ("launches", "MiB", "Gflop", "predicted µs")
    shown = narrow_table("operator, its mean in a path", *columns)
    counts = {path: Counter(one.name for one in work) for path, work in works.items()}
    for name in sorted({one.name for work in works.values() for one in work}):
        if not name.startswith("spade_fast"):
            continue
        path = max(counts, key=lambda path: counts[path][name])
        work = [one for one in works[path] if one.name == name]
        calls = len(work)
        shown.add_row(
            f"{name.removeprefix('spade_fast::')}, {path}",
            f"{sum(one.launches for one in work) / calls:.0f}",
            f"{sum(one.bytes for one in work) / calls / 2**20:.2f}",
            f"{sum(one.operations for one in work) / calls / 1e9:.2f}",
            f"{1e6 * model.device(work) / calls:.1f}",
        )
    return shown


def caption(model: Model) -> str:
    """What the model says, with its constants and their sources."""
    return (
        f"Predicted for an H200, not measured, from benchmarks/results/h200-*.json at {COMMIT}:"
        f" {model.bandwidth / 1e12:.2f} TB/s of a copy; {model.rate / 1e12:.0f} Tflop/s (batch 16,"
        f" folded and frozen); per launch {1e6 * model.launch:.1f} µs of the device (graph,"
        f" prepared), {1e6 * model.host_launch:.0f} µs of the host (prepared less folded and"
        f" frozen), {1e6 * model.host_eager:.0f} µs in eager (eager); {1e6 * model.host_layer:.0f}"
        f" µs of the host per SPADE (folded and frozen). for then: with the launches that the code"
        " had when it was measured. ratio: predicted for then over measured; constant: the model"
        " was fitted to it."
    )
