"""The measurements: first whether a variant matches the truth, then its time, interleaved with the
other variants', and its peak memory.
"""

import functools
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

from .cases.problem import BACKWARD, BARE, DEVICE_ALONE, FORWARD, WHOLE_CALLS

# A variant's largest error, as a fraction of the error that the rule of agreement allows: forward,
# and with gradients. In the gradients of a deep network, a leaky ReLU's sign may differ at a place
# where it differs in none of eager's few runs: 4.7 was seen in 13 scenes of the generator. A wrong
# result is off by hundreds, and ours must also match in float64, where no sign differs. In
# addition, Inductor's convolutions sum in another order than eager's: 2.3 was seen forward, and
# 11.6 with such a sign.
LIMITS = {"eager": (1, 1), "spade_fast": (1, 16), "torch.compile": (4, 16)}
LIMIT_IN_DOUBLE = 1e-9  # of the largest element

FLUSHED_BYTES = 256 << 20  # more than any L2 cache
# GPU cycles, about a millisecond: the host needs half of it to launch eager's backward.
HEAD_START = 1 << 21
# For calls that take the host longer. A call that waits for the GPU is never ahead of it.
LONGEST_HEAD_START = 1 << 25
MOST_ROUNDS = 200  # of timing; more add nothing for small problems
JITTERED_RUNS = 7  # of eager, to see how much a rounding matters (agreement.py)


@dataclass
class Row:
    """One variant of one problem. Times in seconds, memory in bytes."""

    case: str
    problem: str
    mode: str
    variant: str
    # the error as a fraction of the allowed error (agreement.py); None if it was not compared
    excess: float | None = None
    error_in_double: float | None = None  # of ours in float64, as a fraction of the largest element
    failure: str | None = None  # the error that stopped it
    clock: str = WHOLE_CALLS  # what was timed: DEVICE_ALONE or WHOLE_CALLS (cases/problem.py)
    times: list[float] = field(default_factory=list)
    ratio: tuple[float, float, float] | None = (
        None  # quartiles over the rounds of eager's time over this variant's
    )
    overhead: float | None = None  # this variant's median over the fastest floor's
    # this variant's median over the fastest limit's, unless the variant is one of problem.folding
    over_limit: float | None = None
    peak_memory: int | None = None
    kept_memory: int | None = None  # bytes that forward keeps for backward, if they were counted
    least_bytes: int | None = None  # bytes that the operation has to read and write
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
    """Measures a problem, and returns its rows. A variant that does not match the truth is not
    timed. `advance` is called after each step.
    """
    context = torch.no_grad if problem.mode == FORWARD else torch.enable_grad
    with context():
        rows = check(case, problem, advance)
        runs = {name: run for name, run in problem.variants.items() if rows[name].matches}
        time_interleaved(rows, runs, problem, device, seconds)
        advance()
        for name, run in runs.items():
            problem.prepare(name)
            rows[name].peak_memory = peak_memory(run, device)
            if hasattr(run, "outputs"):
                rows[name].kept_memory = kept_memory(run.outputs, device)
        advance()
    if problem.least_bytes and torch.device(device).type == "cuda":
        bandwidth = copy_bandwidth(device)
        for row in rows.values():
            if row.times and not row.variant.startswith(tuple(BARE)):
                row.least_bytes, row.bandwidth = (
                    problem.least_bytes,
                    problem.least_bytes / row.median / bandwidth,
                )
    floor, limit = (fastest(rows, kind) for kind in ("floor", "limit"))
    for name, row in rows.items():
        if row.times and rows["eager"].times:
            row.ratio = tuple(
                quartiles([eager / own for eager, own in zip(rows["eager"].times, row.times)])
            )
        if row.times and floor:
            row.overhead = row.median / floor
        if row.times and limit and name not in problem.folding:
            row.over_limit = row.median / limit
    return list(rows.values())


def fastest(rows, kind):
    """The least median of the rows whose name begins with this, or None if none was timed."""
    medians = [row.median for name, row in rows.items() if name.startswith(kind) and row.times]
    return min(medians, default=None)


def check(case, problem, advance=lambda: None):
    """Compares every variant with the truth on every scene, and returns a row for each variant."""
    rows = {
        name: Row(case, problem.name, problem.mode, name, clock=problem.clock)
        for name in problem.variants
    }
    jittered_runs = max(2, JITTERED_RUNS // len(problem.scenes))
    for number in range(len(problem.scenes)):
        problem.scene = number
        truth = problem.truth()
        problem.prepare("eager")
        eagers = [problem.variants["eager"](), *map(problem.jittered, range(1, 1 + jittered_runs))]
        scales = gradient_scales(truth)
        found = problem.in_double() if problem.in_double else {}
        errors = [
            ((found[key] - truth[key]).abs().max() / scales[key]).nan_to_num(torch.inf).item()
            for key in (truth if found else ())
        ]
        for name, run in problem.variants.items():
            row = rows[name]
            if name.startswith("spade_fast") and errors:
                row.error_in_double = max(row.error_in_double or 0, *errors)
            if name.startswith(tuple(BARE)) or row.failure:
                continue
            problem.prepare(name)
            try:
                found = run()
            except (
                Exception
            ) as error:  # a rival may fail in any way; the other variants are still measured
                row.failure = f"{type(error).__name__}: {error}".split("\n")[0]
                continue
            row.excess = max(
                [
                    excess(found[key], [eager[key] for eager in eagers], truth[key], scales[key])
                    for key in eagers[0]  # the truth may have more keys, compared only in float64
                ]
                + ([] if row.excess is None else [row.excess])
            )
        advance()
    return rows


def gradient_scales(truth):
    """max|truth| of each tensor. A bias takes its weight's maximum if that is larger, because the
    gradient of a bias before a norm is zero.
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
    """Times one call of each variant per round, starting each round with the next variant, until
    `seconds` have passed. There are at least the problem's least_rounds and as many rounds as
    scenes, and otherwise at most MOST_ROUNDS.
    """
    for name, run in runs.items():
        problem.prepare(name)
        run()
    names, began, rounds = list(runs), time.perf_counter(), 0
    while rounds < max(problem.least_rounds, len(problem.scenes)) or (
        rounds < MOST_ROUNDS and time.perf_counter() - began < seconds
    ):
        problem.scene = rounds % len(problem.scenes)
        for position in range(len(names)):
            name = names[(position + rounds) % len(names)]
            problem.prepare(name)
            rows[name].times.append(timed(runs[name], device, problem.clock))
        rounds += 1


def timed(run, device, clock=WHOLE_CALLS):
    """Seconds of one call, on a GPU with a cold L2 cache.

    WHOLE_CALLS, for networks: from the start of the call on the host to its end on the device. This
    includes the host's time: where launching takes longer than the kernels, a caller waits for the
    launches, so they must not be hidden.

    DEVICE_ALONE, for single operations on a GPU: between two events on the device. In the middle of
    a network, the device is still busy with earlier operations when an operation is launched, so
    the host's time does not count. The device therefore sleeps before the first event until the
    host has launched everything. Whether it slept long enough is checked each time.
    """
    if torch.device(device).type != "cuda":
        return timed_by_host(run, lambda: None)
    if clock == WHOLE_CALLS:
        flush(device)
        torch.cuda.synchronize()
        return timed_by_host(run, torch.cuda.synchronize)
    cycles = HEAD_START
    while True:
        seconds, was_ahead = timed_by_device(run, device, cycles)
        if was_ahead or cycles >= LONGEST_HEAD_START:
            return seconds
        cycles *= 2


def timed_by_host(run, wait):
    """Seconds from the start of run() to the end of wait()."""
    start = time.perf_counter()
    result = run()
    wait()
    took = time.perf_counter() - start
    del result  # after the timing, so that freeing is not timed
    return took


def timed_by_device(run, device, cycles):
    """Seconds between the events before and after a call, on a GPU that first sleeps for `cycles`;
    and whether the host had launched everything before the GPU woke.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush(device)
    torch.cuda._sleep(cycles)
    begin.record()
    result = run()
    end.record()
    was_ahead = not begin.query()
    end.synchronize()
    del result
    return begin.elapsed_time(end) / 1e3, was_ahead


def flush(device):
    """Overwrites the whole L2 cache."""
    torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_()


@functools.cache
def copy_bandwidth(device):
    """Bytes per second, read and written, of a large copy on a GPU: its memory bandwidth."""
    x = torch.randn(1 << 28, device=device)
    y = torch.empty_like(x)
    seconds = [timed(lambda: y.copy_(x), device, DEVICE_ALONE) for _ in range(21)]
    return 2 * x.nbytes / statistics.median(seconds)


def peak_memory(run, device):
    """The peak of PyTorch's allocated memory during one run, in bytes, without the memory that was
    allocated before.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    allocated = peak = 0
    for changed in changes_of_memory(run)[0]:
        allocated += changed
        peak = max(peak, allocated)
    return peak


def kept_memory(run, device):
    """The bytes that are allocated after run() besides its results, a list of tensors."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        results = run()
        allocated = torch.cuda.memory_allocated() - before
    else:
        changes, results = changes_of_memory(run)
        allocated = sum(changes)
    return allocated - sum(result.nbytes for result in results)


def changes_of_memory(run):
    """The changes of a CPU's allocated memory in the course of run(), in bytes, and its results."""
    with (
        silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        results = run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [
            event
            for event in json.loads(trace.read_text())["traceEvents"]
            if event.get("name") == "[memory]"
        ]
    events.sort(key=lambda event: event["ts"])
    return [event["args"]["Bytes"] for event in events], results


@contextmanager
def silent_stderr():
    """Silences the profiler, whose C++ code writes its starts and stops to stderr directly, out of
    reach of any Python setting.
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
