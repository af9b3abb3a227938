"""The predicted share of a copy's bandwidth of the kernels for modulation with dense γ and β on an
H200: how csrc/cuda/plan.h divides the work, and how many instructions the machine code has.

A kernel's time is the longest of three, and a fixed time per launch. *Memory*: its bytes at the
bandwidth of a copy, as the busiest processor gets its share of it; more if too few bytes are in
flight, or if fewer bytes are adjacent than memory transfers at once. *Issue*: the instructions of
the busiest processor. *Latency*: the instructions of one thread, each of which waits for the last,
and its accesses to memory that wait for each other. Where a processor has room for one block that
holds its elements, memory and issue alternate, and their times add up.

Caches are not modelled: at batch 1 much of x is in the L2 cache, and the share can exceed this.
"""

import math
import os
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from . import predictions
from .cases.modulation import COCO_SHAPES
from .cases.problem import BACKWARD, FORWARD
from .cuda_proofs import IN_FLIGHT, MOST_THREADS, REGISTERS, SOURCES, STREAMS, Proof
from .tables import narrow_table

BATCHES = (1, 16)
MEMORIES = ("contiguous", "channels-last")  # the second is true for plan.h
CAPABILITY = 90
# An H200's numbers, as NVIDIA states them.
PROCESSORS, CLOCK, ISSUES = 132, 1.98e9, 4  # instructions per cycle and processor
SHARED, MOST_SHARED, RESERVED = 228 << 10, 227 << 10, 1 << 10  # bytes: of a processor, of a block
MOST_BLOCKS = 32  # of a processor
TRANSFER = 64  # bytes that memory transfers at once
# Assumed, not measured: cycles until an instruction's result can be used, and seconds until a
# value comes from memory, as in IN_FLIGHT.
DEPENDENT, LATENCY = 4, 0.7e-6
HELD = {"forward_kernel": 1, "backward_kernel": 2}  # tensors that a block holds
STORES = {"apply_kernel": 1, "backward_input_kernel": 1, "backward_sums_kernel": 2}  # of an item
# Independent 16-byte loads of a thread, and how many items it takes with them.
IN_FLIGHT_LOADS = {**STREAMS, "forward_kernel": 4, "backward_kernel": 2}
TOGETHER = {"forward_kernel": 2, "backward_kernel": 2, "plane_moments_kernel": 4}
# Tensors of x's size that a kernel reads or writes. plan.h's divisions in the order of
# divisions.cpp: forward and backward in one pass, sweep, tiles.
MOVED = {
    "forward_kernel": (4, 0),
    "backward_kernel": (6, 1),
    "plane_moments_kernel": (1, 2),
    "apply_kernel": (4, 3),
    "backward_sums_kernel": (5, 2),
    "backward_input_kernel": (4, 3),
}
COMBINES = {"plane_moments_kernel", "backward_sums_kernel"}  # with one more launch
ONE_PASS = {FORWARD: "forward_kernel", BACKWARD: "backward_kernel"}
TWO_PASSES = {
    FORWARD: ("plane_moments_kernel", "apply_kernel"),
    BACKWARD: ("backward_sums_kernel", "backward_input_kernel"),
}


@dataclass(frozen=True)
class Problem:
    images: int
    channels: int
    size: int
    memory: str

    @property
    def bytes(self) -> int:
        """The bytes of x, in 16 bits per element."""
        return 2 * self.images * self.channels * self.size**2

    @property
    def name(self) -> str:
        """As in the results of the case `modulate`."""
        return f"{self.channels} × {self.size}² {self.memory}"


@dataclass(frozen=True)
class Division:
    """A Division of plan.h."""

    blocks: int
    columns: int
    lanes: int
    items: int
    shared: int

    @property
    def threads(self) -> int:
        return self.columns * self.lanes


@dataclass(frozen=True)
class Share:
    """The prediction for one kernel."""

    problem: Problem
    mode: str
    kernel: str
    division: Division
    resident: int  # blocks on a processor
    slots: float  # instructions of a warp per element
    seconds: float
    share: float  # of a copy's bandwidth

    @property
    def waves(self) -> float:
        """How often the processors' places are filled."""
        return self.division.blocks / (PROCESSORS * self.resident)


PROBLEMS = [
    Problem(images, channels, size, memory)
    for images in BATCHES
    for channels, size in COCO_SHAPES
    for memory in MEMORIES
]


def divisions(problems: Iterable[Problem]) -> dict[Problem, list[Division]]:
    """How plan.h divides these problems, which a C++ compiler computes."""
    problems = list(problems)
    lines = [
        f"{one.images} {one.channels} {one.size**2} {MEMORIES.index(one.memory)} {PROCESSORS}"
        f" {MOST_SHARED}\n"
        for one in problems
    ]
    with tempfile.TemporaryDirectory() as folder:
        program, source = Path(folder) / "divisions", Path(__file__).with_name("divisions.cpp")
        flags = ["-std=c++17", "-DSPADE_FAST_ON_HOST", "-D__device__=", f"-I{SOURCES}"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", program], check=True)
        said = subprocess.run(
            [program], input="".join(lines), capture_output=True, text=True, check=True
        ).stdout
    rows = [list(map(int, line.split())) for line in said.splitlines()]
    return {
        one: [Division(*row[k : k + 5]) for k in range(0, len(row), 5)]
        for one, row in zip(problems, rows, strict=True)
    }


def shares(
    proofs: Iterable[Proof], launch: float, problems: Iterable[Problem] = PROBLEMS
) -> list[Share]:
    """The predictions for these problems.

    proofs: of the kernels, among them those for CAPABILITY. launch: the fixed seconds of a launch.
    """
    code = {
        (proof.kernel, proof.layout): proof
        for proof in proofs
        if proof.capability == CAPABILITY and proof.vector == 8 and proof.case is None
    }
    found = []
    for problem, divided in divisions(problems).items():
        for mode in (FORWARD, BACKWARD):
            for kernel in (ONE_PASS[mode], *TWO_PASSES[mode]):
                tensors, which = MOVED[kernel]
                if divided[which].blocks > 0:
                    proof = code[kernel, problem.memory]
                    found.append(share_of(problem, mode, proof, tensors, divided[which], launch))
    return found


def share_of(
    problem: Problem, mode: str, proof: Proof, tensors: int, division: Division, launch: float
) -> Share:
    """The prediction for one kernel, which moves this number of tensors of x's size."""
    kernel, warps = proof.kernel, math.ceil(division.threads / 32)
    bandwidth = predictions.bandwidth_of_a_copy()
    resident = min(
        REGISTERS // (warps * proof.registers_of_warp),
        MOST_THREADS // (32 * warps),
        MOST_BLOCKS,
        SHARED // (division.shared + RESERVED),
    )
    blocks = math.ceil(division.blocks / PROCESSORS)  # of the busiest processor
    items = math.ceil(division.items / division.lanes)  # of a thread
    instructions = instructions_of(proof, items)
    bytes_of_elements = tensors * problem.bytes
    adjacent = 16 * division.columns if problem.memory == "channels-last" else TRANSFER
    here = min(resident, blocks)
    in_flight = here * division.threads * 16 * IN_FLIGHT_LOADS[kernel]
    memory = bytes_of_elements / bandwidth * blocks * PROCESSORS / division.blocks
    memory /= min(1, adjacent / TRANSFER) * min(1, in_flight / IN_FLIGHT)
    waits = math.ceil(items / TOGETHER.get(kernel, 1)) + (kernel in HELD)
    latency = instructions * DEPENDENT / CLOCK + waits * LATENCY
    memory = max(memory, latency * math.ceil(blocks / resident))
    issue = blocks * warps * instructions / (ISSUES * CLOCK)
    alternate = kernel in HELD and here == 1
    seconds = memory + issue if alternate else max(memory, issue)
    seconds += launch * (2 if kernel in COMBINES else 1)
    return Share(
        problem,
        mode,
        kernel,
        division,
        resident,
        instructions / (items * 32 * proof.vector),
        seconds,
        bytes_of_elements / bandwidth / seconds,
    )


def instructions_of(proof: Proof, items: int) -> int:
    """Instructions of a thread for these items: each loop over items is passed once in `kernel`,
    and as often as the items need.
    """
    total = proof.counted.kernel.instructions
    for loop in proof.counted.loops:
        wide = Counter(loop.wide)
        if proof.kernel in HELD:
            taken = (wide["LDGSTS"] or wide["LDS"]) // HELD[proof.kernel]
        else:
            taken = wide["STG"] // STORES.get(proof.kernel, 1) or wide["LDG"]
        if taken:
            total += (math.ceil(items / taken) - 1) * loop.instructions
    return total


def operations(found: Iterable[Share]) -> dict[tuple[Problem, str], float]:
    """The seconds of each operation with instance norm, as the case `modulate` measures them:
    forward, and forward with backward. Where plan.h has one pass, it is taken.
    """
    kernels: dict[tuple[Problem, str], dict[str, float]] = {}
    for one in found:
        kernels.setdefault((one.problem, one.mode), {})[one.kernel] = one.seconds
    alone = {
        (problem, mode): times.get(ONE_PASS[mode], sum(times.values()))
        for (problem, mode), times in kernels.items()
    }
    return {
        (problem, mode): seconds + (alone[problem, FORWARD] if mode == BACKWARD else 0)
        for (problem, mode), seconds in alone.items()
    }


def least_bytes(problem: Problem, mode: str) -> int:
    """The bytes that an operation has to move, as in the case `modulate`."""
    return 4 * problem.bytes if mode == FORWARD else 10 * problem.bytes + problem.bytes // 8


def table(found: list[Share]) -> Table:
    """A line for each kernel."""
    columns = ("blocks", "resident", "waves", "slots per\nelement", "predicted\nµs", "share")
    shown = narrow_table("batch, shape, kernel", *columns)
    for one in found:
        shown.add_row(
            f"{one.problem.images}, {one.problem.name}, {one.kernel.removesuffix('_kernel')}",
            str(one.division.blocks),
            str(one.resident),
            f"{one.waves:.2f}",
            f"{one.slots:.2f}",
            f"{1e6 * one.seconds:.1f}",
            f"{one.share:.2f}",
        )
    return shown


def table_of_operations(found: list[Share]) -> Table:
    """A line for each operation, with its measured time and share where there is one."""
    columns = ("predicted\nµs", "share", "measured\nµs", "share", "ratio")
    shown = narrow_table("batch, shape, operation", *columns)
    measured = measured_operations()
    bandwidth = predictions.bandwidth_of_a_copy()
    for (problem, mode), seconds in operations(found).items():
        least = least_bytes(problem, mode) / bandwidth
        beside = ("", "", "")
        if (time := measured.get((problem.images, problem.name, mode))) is not None:
            beside = (f"{1e6 * time:.1f}", f"{least / time:.2f}", f"{seconds / time:.2f}")
        shown.add_row(
            f"{problem.images}, {problem.name}, {mode}",
            f"{1e6 * seconds:.1f}",
            f"{least / seconds:.2f}",
            *beside,
        )
    return shown


def measured_operations() -> dict[tuple[int, str, str], float]:
    """Medians in seconds, by images, name and mode."""
    return {
        (predictions.IMAGES, row["problem"], row["mode"]): statistics.median(row["times"])
        for row in predictions.results(predictions.OPERATIONS[0])["rows"]
        if row["variant"] == "spade_fast"
    }


CAPTION = (
    "Predicted for an H200 in bfloat16 from the instructions of the machine code and the divisions"
    " of plan.h, with the clock that NVIDIA states and latencies that are assumed, not measured."
    " Instance norm takes one pass (forward, backward) where plan.h has"
    " one, else two, as other norms do. waves: blocks over those that reside at once. slots:"
    " instructions of a warp. share: of the bandwidth of a copy, for the kernel's own bytes, or for"
    " those that the operation has to move. measured: h200-modulate-bfloat16.json. ratio: predicted"
    " over measured."
)
