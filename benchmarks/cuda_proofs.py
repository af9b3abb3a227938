"""Proofs about the CUDA kernels that need no GPU: nvcc compiles them and reports their resources,
and their machine code is read.
"""

import collections
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .instructions import Counted, counted
from .proofs import CAPABILITIES
from .tables import narrow_table

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
WIDTHS = {
    "U8": 1,
    "S8": 1,
    "U16": 2,
    "S16": 2,
    "64": 8,
    "128": 16,
}  # bytes, by the modifier in an instruction's name; 4 without one
# The kernels that access tensors in order, and how many 16-byte loads of a thread are independent.
STREAMS = {
    "apply_kernel": 3,
    "backward_input_kernel": 3,
    "backward_sums_kernel": 3,
    "plane_moments_kernel": 4,
}
HELD = {
    "forward_kernel",
    "backward_kernel",
}  # kernels that first copy planes to shared memory: a cluster's, where there are clusters
CLUSTERS = 90  # compute capability, times ten
REGISTERS, MOST_THREADS = 65536, 2048  # of a processor
# Bytes per processor: an H100's stated memory bandwidth times a latency of 0.7 µs.
IN_FLIGHT = 20 << 10


@dataclasses.dataclass(frozen=True)
class Proof:
    """One kernel, compiled for one GPU."""

    kernel: str
    vector: int | None  # elements per thread and step
    layout: str | None
    case: str | None  # the sizes and the activation that it is for
    capability: int
    registers: int
    stack: int  # bytes
    spilled: int  # bytes
    shared: int  # bytes of static shared memory
    threads: int  # maximum per block
    loads: dict  # number of instructions by their width in bytes
    stores: dict
    double: int  # number of instructions in double precision
    clusters: bool  # whether it waits for other blocks of its cluster
    tensor_cores: bool
    counted: Counted = dataclasses.field(repr=False)  # instructions

    @property
    def registers_of_warp(self):
        """Registers are allocated to a warp in units of 256."""
        return -(-self.registers * 32 // 256) * 256

    @property
    def resident(self):
        """Threads that reside on a processor at once, as limited by registers."""
        of_block = self.threads // 32 * self.registers_of_warp
        return min(REGISTERS // of_block, MOST_THREADS // self.threads) * self.threads

    @property
    def failures(self):
        """The faults of the kernel, in words."""
        found = []
        if self.spilled or self.stack:
            found.append(
                f"{self.spilled} bytes of registers are spilled, {self.stack} bytes of stack"
            )
        if self.double:
            found.append(f"{self.double} instructions in double precision")
        if self.kernel in {*STREAMS, *HELD} and 16 not in self.loads:
            found.append("no 16-byte loads")
        if self.kernel in {*STREAMS, *HELD} - {"plane_moments_kernel"} and 16 not in self.stores:
            found.append("no 16-byte stores")
        if self.kernel in HELD and self.capability >= CLUSTERS and not self.clusters:
            found.append("blocks do not wait for the other blocks of their cluster")
        if self.kernel == "convolve_windows_kernel" and not self.tensor_cores:
            found.append("no tensor cores")
        if (
            in_flight := 16 * STREAMS.get(self.kernel, 0) * self.resident
        ) and in_flight < IN_FLIGHT:
            found.append(f"{self.resident} threads on a processor have {in_flight} bytes in flight")
        return found


def prove(capabilities=CAPABILITIES, processes=None):
    """The proofs of every kernel for these GPUs."""
    tasks = [
        (source, capability)
        for source in sorted(SOURCES.glob("*.cu"))
        for capability in capabilities
    ]
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        return [proof for proofs in pool.map(lambda task: _prove(*task), tasks) for proof in proofs]


def _prove(source, capability):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        nvcc = [
            shutil.which("nvcc"),
            "-std=c++17",
            "-O3",
            f"-arch=sm_{capability}",
            "-cubin",
            "-Xptxas=-v",
            source,
            "-o",
            cubin,
        ]
        said = subprocess.run(nvcc, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run(
            [_cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL))
    pattern = (
        r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers([^\n]*)"
    )
    text = "".join(path.read_text() for path in [SOURCES / "plan.h", SOURCES / "kernels.h", source])
    numbers = dict(re.findall(r"constexpr int64_t (\w+) =\s+(\d+);", text))
    threads = {
        kernel: int(numbers[name])
        for name, kernel in re.findall(r"__launch_bounds__\((\w+).*?\)\s+(\w+)\(", text)
    }
    proofs = []
    for name, stack, stored, loaded, registers, rest in re.findall(pattern, said, re.DOTALL):
        kernel, vector, flags = re.search(
            r"\d([a-z_]+_kernel)(?:I(?:Li(\d)E)?((?:Lb\dE)+))?", name
        ).groups()
        last, whole, silu = (*re.findall(r"\d", flags or ""), None, None, None)[:3]
        shared = re.search(r"(\d+) bytes smem", rest)
        widths = {"LDG": collections.Counter(), "STG": collections.Counter()}
        # Copies to shared memory count as loads.
        for instruction, modifiers in re.findall(r"\b(LDG|STG|LDGSTS)\.E([.\w]*)", code[name]):
            width = next((WIDTHS[word] for word in modifiers.split(".") if word in WIDTHS), 4)
            widths[instruction.replace("LDGSTS", "LDG")][width] += 1
        proofs.append(
            Proof(
                kernel,
                int(vector) if vector else None,
                {"0": "contiguous", "1": "channels-last"}.get(last),
                ", ".join(
                    [*(["any size"] if whole == "0" else []), *(["SiLU"] if silu == "1" else [])]
                )
                or None,
                capability,
                int(registers),
                int(stack),
                int(stored) + int(loaded),
                int(shared[1]) if shared else 0,
                threads[kernel],
                dict(widths["LDG"]),
                dict(widths["STG"]),
                len(re.findall(r"\b(?:DADD|DMUL|DFMA|DSETP|DMNMX)\b|\.F64\b", code[name])),
                "UCGABAR_WAIT" in code[name],
                "HMMA" in code[name],
                counted(code[name]),
            )
        )
    return proofs


def _cuobjdump():
    """The cuobjdump on PATH, or Triton's."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    triton = importlib.util.find_spec("triton")
    return (
        Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if triton
        else "cuobjdump"
    )


def table(proofs):
    """A line for each kernel and GPU."""
    result = narrow_table(
        "kernel\n  elements, layout, case, GPU",
        *("registers", "spilled", "threads", "loads", "stores", "double"),
        caption=(
            "elements: per thread and step. loads, stores: bytes per instruction. threads: resident"
            " on a processor, as limited by registers."
        ),
    )
    for proof in sorted(
        proofs,
        key=lambda proof: (
            proof.kernel,
            *map(str, (proof.vector, proof.layout, proof.case)),
            proof.capability,
        ),
    ):
        widths = [
            ", ".join(map(str, sorted(found, reverse=True)))
            for found in (proof.loads, proof.stores)
        ]
        of = (proof.vector, proof.layout, proof.case, f"sm_{proof.capability}")
        result.add_row(
            f"{proof.kernel.removesuffix('_kernel')}\n  {', '.join(str(one) for one in of if one)}",
            str(proof.registers),
            str(proof.spilled),
            str(proof.resident),
            *widths,
            str(proof.double),
        )
    return result
