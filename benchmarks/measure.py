"""How it is measured: first whether a variant is right, then its time, interleaved with the others,
and its peak memory.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spade_fast.agreement import excess

from .cases import BACKWARD, FORWARD

# How far from the truth a variant may be, as a fraction of what the rule of agreement allows,
# forward and in gradients too. In the gradients of a deep network a leaky ReLU whose sign differs
# can hit a place that it hit in none of eager's few runs: 4.7 was seen in 13 scenes of the
# generator. What is wrong is off by hundreds; and ours must be right in float64 besides, where no
# sign differs. Inductor's convolutions moreover sum in another order than eager's: 2.3 was seen
# forward, and 11.6 with such a sign.
LIMITS = {"eager": (1, 1), "spade_fast": (1, 16), "torch.compile": (4, 16)}
LIMIT_IN_DOUBLE = 1e-9  # of the largest element

FLUSHED_BYTES = 256 << 20  # more than any L2 cache
MOST_ROUNDS = 200  # of timing: more tell nothing new of small problems
JITTERED_RUNS = 7  # of eager, to see how much a rounding matters (agreement.py)


@dataclass
class Row:
    """One variant of one problem. Times in seconds, memory in bytes."""

    case: str
    problem: str
    mode: str
    variant: str
    # the error as a fraction of what is allowed (agreement.py); None: nothing to compare with
    excess: float | None = None
    error_in_double: float | None = None  # of ours in float64, as a fraction of the largest element
    failure: str | None = None  # what it died of
    times: list[float] = field(default_factory=list)
    ratio: tuple[float, float, float] | None = (
        None  # eager's time over this one's: quartiles over the rounds
    )
    overhead: float | None = None  # this one's median over the floor's
    peak_memory: int | None = None
    least_bytes: int | None = None  # that it has to read and write
    bandwidth: float | None = None  # those bytes over the median time, as a fraction of a copy's

    @property
    def matches(self):
        limit = LIMITS.get(self.variant.split(",")[0], (1, 1))[self.mode == BACKWARD]
        return (
            self.failure is None
            and (self.excess or 0) <= limit
            and (self.error_in_double or 0) <= LIMIT_IN_DOUBLE
        )

    @property
    def median(self):
        return statistics.median(self.times) if self.times else None

    @property
    def spread(self):
        """Half the distance between the quartiles, as a fraction of the median."""
        low, middle, high = quartiles(self.times)
        return (high - low) / 2 / middle


def quartiles(values):
    return (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )


def measure(case, problem, device, seconds, advance=lambda: None):
    """The problem's rows. A variant that does not match the truth is not timed. `advance` is called
    after each step.
    """
    context = torch.no_grad if problem.mode == FORWARD else torch.enable_grad
    with context():
        rows = check(case, problem, advance)
        runs = {name: run for name, run in problem.variants.items() if rows[name].matches}
        time_interleaved(rows, runs, problem, device, seconds)
        advance()
        for name, run in runs.items():
            rows[name].peak_memory = peak_memory(run, device)
        advance()
    if problem.least_bytes and torch.device(device).type == "cuda":
        bandwidth = copy_bandwidth(device)
        for row in rows.values():
            if row.times and not row.variant.startswith("floor"):
                row.least_bytes, row.bandwidth = (
                    problem.least_bytes,
                    problem.least_bytes / row.median / bandwidth,
                )
    floors = [row.median for name, row in rows.items() if name.startswith("floor") and row.times]
    for row in rows.values():
        if row.times and rows["eager"].times:
            row.ratio = tuple(
                quartiles([eager / own for eager, own in zip(rows["eager"].times, row.times)])
            )
        if row.times and floors:
            row.overhead = row.median / min(floors)
    return list(rows.values())


def check(case, problem, advance=lambda: None):
    """A row for each variant that says whether it computes what it should, for every scene."""
    rows = {name: Row(case, problem.name, problem.mode, name) for name in problem.variants}
    jittered_runs = max(2, JITTERED_RUNS // len(problem.scenes))
    for problem.scene in range(len(problem.scenes)):
        truth, eagers = (
            problem.truth(),
            [problem.variants["eager"](), *map(problem.jittered, range(1, 1 + jittered_runs))],
        )
        scales = gradient_scales(truth)
        found = problem.in_double() if problem.in_double else {}
        errors = [
            ((found[key] - truth[key]).abs().max() / scales[key]).nan_to_num(torch.inf).item()
            for key in found
        ]
        for name, run in problem.variants.items():
            row = rows[name]
            if name.startswith("spade_fast") and errors:
                row.error_in_double = max(row.error_in_double or 0, *errors)
            if name.startswith("floor") or row.failure:
                continue
            try:
                found = run()
            except (
                Exception
            ) as error:  # a rival may fail in any way, and the others are measured all the same
                row.failure = f"{type(error).__name__}: {error}".split("\n")[0]
                continue
            row.excess = max(
                [
                    excess(found[key], [eager[key] for eager in eagers], truth[key], scales[key])
                    for key in truth
                ]
                + ([] if row.excess is None else [row.excess])
            )
        advance()
    return rows


def gradient_scales(truth):
    """max|truth| of each tensor; for a bias that of its weight where it is more, since before a
    norm its gradient is zero.
    """
    scales = {key: value.abs().max().item() for key, value in truth.items()}
    for key in truth:
        weight = key.removesuffix("bias") + "weight"
        if key.endswith("bias"):
            scales[key] = max(
                scales[key], scales.get(weight, 0.0), scales.get(f"{weight}_orig", 0.0)
            )
    return scales


def time_interleaved(rows, runs, problem, device, seconds):
    """Rounds of one call each, every round beginning with another variant, for about so many
    seconds: 5 to MOST_ROUNDS of them, and all scenes.
    """
    for run in runs.values():
        run()
    names, began, rounds = list(runs), time.perf_counter(), 0
    while rounds < max(5, len(problem.scenes)) or (
        rounds < MOST_ROUNDS and time.perf_counter() - began < seconds
    ):
        problem.scene = rounds % len(problem.scenes)
        for position in range(len(names)):
            name = names[(position + rounds) % len(names)]
            rows[name].times.append(timed(runs[name], device))
        rounds += 1


def timed(run, device):
    """Seconds of one call; on a GPU between its events, from a cold L2 cache, and without the
    host's time as far as it keeps ahead.
    """
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        result = run()
        took = time.perf_counter() - start
        del result
        return took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(device):
    """Bytes a second, read and written, of a large copy on a GPU: what memory gives."""
    x = torch.randn(1 << 28, device=device)
    y = torch.empty_like(x)
    return (
        2
        * x.numel()
        * x.element_size()
        / statistics.median(timed(lambda: y.copy_(x), device) for _ in range(21))
    )


def peak_memory(run, device):
    """The most that PyTorch has allocated at any moment of one run beyond what was allocated
    before, in bytes.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with (
        silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        result = run()
        del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [
            event
            for event in json.loads(trace.read_text())["traceEvents"]
            if event.get("name") == "[memory]"
        ]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


@contextmanager
def silent_stderr():
    """The profiler's C++ code writes its starts and stops to stderr itself, where no Python setting
    reaches it.
    """
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(nowhere)
        os.close(stderr)
