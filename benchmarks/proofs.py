"""Proofs about the Triton kernels that need no GPU: every configuration is compiled, and its
machine code is read.

The package's own functions are called on small CPU tensors, with a driver that reports a GPU.
Instead of launching, they compile the kernels and record them. The proofs therefore hold for the
shipped kernels, with their tiles, their warps and the properties known of each argument.
"""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from spade_fast.progress import progress_bar

from .covering import covering
from .tables import narrow_table

CAPABILITIES = (80, 90, 100)
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32, γ bfloat16": (torch.float32, torch.bfloat16),
}
ACTIVATIONS = {
    "none": None,
    "leaky_relu": "leaky_relu",
    "silu": "silu",
}  # relu is compiled like leaky_relu
# Layout and modulation. Convolutions at windows, which have neither, are compiled with the second.
FORMS = tuple(itertools.product(("contiguous", "channels-last"), ("dense", "table")))
ROWS = 100  # of a table
# Images, channels, rows of a table, size, and whether the sizes are aligned.
SHAPES = (
    # Backward takes two passes at the last of these sizes, and always with a table.
    (2, 128, ROWS, (32, 32), True),
    (2, 128, ROWS, (64, 64), True),
    (2, 128, ROWS, (128, 128), True),
    # The last of these is nearly the largest plane that one pass holds.
    (2, 35, ROWS, (5, 9), False),
    (2, 35, ROWS, (45, 45), False),
    (2, 35, ROWS, (91, 89), False),
)
# Triton compiles another kernel where an argument is 1. Only the last activation is compiled with
# these.
ONES = (
    (1, 128, 1, (64, 64), True),
    (2, 1, ROWS, (5, 9), False),
    (1, 1, 1, (1, 1), False),
)
TAPS = ((7, 7), (5, 5, 5))  # of convolutions, besides 3 × 3
WINDOWS = (100, 1000, 3000, 30000)  # of convolutions; their tiles have different sizes
PROCESSORS = 132  # of the GPU that is reported


@dataclasses.dataclass(frozen=True)
class Proof:
    """One kernel, compiled for one configuration."""

    kernel: str
    dtype: str
    layout: str
    modulation: str  # dense or table
    activation: str | None
    aligned: bool
    capability: int
    registers: int
    stack: int  # bytes of spilled registers, and of arrays that are not in registers
    shared: int  # bytes
    loads: dict  # number of instructions by their width in bytes
    stores: dict
    double: int  # number of instructions in double precision
    tensor_cores: int  # number of tensor core instructions

    @property
    def failures(self):
        """The faults of the kernel, in words."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack, for spilled registers or arrays")
        if self.double:
            found.append(f"{self.double} instructions in double precision")
        if self.kernel == "convolve_windows_kernel" and not self.tensor_cores:
            found.append("no tensor cores")
        if self.aligned and self.streams and 16 not in self.loads:
            found.append("no 16-byte loads")
        if self.aligned and self.streams and self.kernel != "sum_pieces_kernel" and 2 in self.loads:
            found.append("half-precision values are loaded one by one")
        return found

    @property
    def streams(self):
        """Whether the kernel accesses memory in order."""
        return (
            self.kernel not in OUT_OF_ORDER
            and IN_ORDER.get(self.kernel, self.layout) == self.layout
        )


IN_ORDER = {
    "sum_pieces_kernel": "channels-last",
    "hash_kernel": "contiguous",
}  # in this layout only
OUT_OF_ORDER = (
    "batch_planes_kernel",
    "batch_terms_kernel",
    "combine_moments_kernel",
    "combine_sums_kernel",
    "find_pieces_kernel",
    "list_pieces_kernel",
    "running_planes_kernel",
    "sum_planes_kernel",
    "sum_rows_kernel",
    "differ_kernel",
)


def prove(
    capabilities=CAPABILITIES, dtypes=DTYPES, activations=ACTIVATIONS, pairs=False, processes=None
):
    """The proofs of all configurations of these names, or with `pairs` of a few in which every two
    names, forms or shapes occur together that do so in any.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1: interpreted kernels are not compiled")
    tasks = {}
    for *key, activation, shape in configurations(capabilities, dtypes, activations, pairs):
        tasks.setdefault(tuple(key), []).append((activation, shape))
    proofs = {}
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        done = pool.imap(_prove, tasks.items())
        for (_, dtype, _), found in zip(tasks, progress_bar(done, len(tasks), "Compiling")):
            for key, proof in found.items():
                proofs.setdefault((dtype, key), proof)
    return list(proofs.values())


def configurations(capabilities, dtypes, activations, pairs=False):
    """All combinations of capability, dtype, form, activation and shape; a few if `pairs`."""
    *_, last = activations
    found = [
        (*names, shape)
        for *names, shape in itertools.product(
            capabilities, dtypes, FORMS, activations, SHAPES + ONES
        )
        if shape not in ONES or names[-1] == last
    ]
    if not pairs:
        return found
    together = [set(itertools.combinations(enumerate(names), 2)) for names in found]
    return [found[number] for number in sorted(covering(together))]


def _prove(task):
    """The proofs of the configurations with one capability, dtype and form, by their hashes."""
    (capability, dtype, form), others = task
    torch.set_num_threads(1)
    proofs = {}
    for activation, shape in others:
        *numbers, aligned = shape
        settings = (form[0] == "channels-last", form[1] == "table", ACTIVATIONS[activation])
        with _compiling(capability) as launched:
            _call_everything(*numbers, *DTYPES[dtype], *settings)
        _note(proofs, launched, dtype, *form, ACTIVATIONS[activation], aligned, capability)
    for taps in TAPS if form == FORMS[1] else ():
        with _compiling(capability) as launched:
            _convolve(128, taps, WINDOWS[1:2], *DTYPES[dtype])
        _note(proofs, launched, dtype, *form, None, True, capability)
    return proofs


def _note(proofs, launched, *configuration):
    for kernel, compiled in launched:
        if compiled.hash not in proofs:
            proofs[compiled.hash] = Proof(kernel, *configuration, **_read(compiled))


def _call_everything(images, channels, rows, size, dtype, gamma_dtype, last, table, activation):
    """Calls every function of the backend on one shape."""
    from spade_fast.kernels import numbering, triton_kernels

    def tensor(dtype):
        x = (
            torch.empty(images, *size, channels, dtype=dtype).movedim(-1, 1)
            if last
            else torch.empty(images, channels, *size, dtype=dtype)
        )
        return x

    x, dy, index, order = tensor(dtype), tensor(torch.promote_types(dtype, gamma_dtype)), None, None
    if table:
        gamma, beta = torch.empty(rows, 2 * channels, dtype=gamma_dtype).chunk(2, dim=1)
        index = torch.zeros(images, *size, dtype=torch.int32)
        order = numbering.sort_pixels(index)
    else:
        gamma, beta = tensor(gamma_dtype), tensor(gamma_dtype)
    kept_beta = beta if activation == "silu" else None
    planes = torch.empty(3, images, channels)
    modulation, settings = (planes, gamma, kept_beta, index), (activation, 0.2)
    triton_kernels.plane_moments(x)
    for own in (None, planes[0, 0]):
        triton_kernels.running_planes(x, *planes[:2, 0].to(dtype), own, own, 1e-5)
        triton_kernels.batch_planes(x, planes[:2], own, own, 1e-5)
        triton_kernels.batch_terms(x, planes[:2], planes[0, :1], own)
    _, signs = triton_kernels.apply(x, planes, gamma, beta, index, *settings, True)
    triton_kernels.instance_forward(x, gamma, beta, index, 1e-5, *settings, True)
    triton_kernels.instance_forward(x, gamma, beta, index, 1e-5, *settings, False)
    triton_kernels.backward_sums(dy, x, *modulation, order, signs, *settings)
    triton_kernels.backward_input(dy, x, *modulation, signs, planes[:2], *settings)
    triton_kernels.backward_input(dy, x, *modulation, signs, None, *settings)
    triton_kernels.instance_backward(dy, x, *modulation, order, signs, *settings)
    if table and not last:  # FORMS[1]
        _convolve(channels, (3, 3), WINDOWS, dtype, gamma_dtype)
    bits = x.view(numbering.BITS[x.element_size()]).flatten(2)
    triton_kernels.vectors_differ(
        bits, triton_kernels.hash_vectors(bits, numbering.multiplier(0)).flatten()
    )


def _convolve(channels, taps, windows, dtype, gamma_dtype):
    """Convolves each of these numbers of windows in half precision; other dtypes have no kernel."""
    from spade_fast.kernels import triton_kernels

    if dtype != gamma_dtype or dtype == torch.float32:
        return
    rows = torch.empty(ROWS, channels, dtype=dtype)
    weight = torch.empty(2 * channels, channels, *taps, dtype=dtype)
    for count in windows:
        lists = torch.empty(count + 1, dtype=torch.int32)
        bias = weight.new_empty(2 * channels)
        triton_kernels.convolve_windows(rows, [weight], [bias], lists, lists)


class _compiling:
    """Inside, Triton's driver reports a GPU. Kernels are not launched but compiled, and listed as
    (name, compiled kernel).
    """

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.capability, self.target = capability, GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target

    def __enter__(self):
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        from spade_fast.kernels.triton_kernels import plan

        self.run, self.processors, launched = JITFunction.run, plan.processors, []

        def compile_only(function, *arguments, grid, warmup, **settings):
            launched.append(
                (
                    function.fn.__name__,
                    self.run(function, *arguments, grid=grid, warmup=True, **settings),
                )
            )

        driver.set_active(self)
        JITFunction.run, plan.processors = compile_only, lambda device: PROCESSORS
        return launched

    def __exit__(self, *exception):
        from triton.runtime.jit import JITFunction

        from spade_fast.kernels.triton_kernels import plan

        JITFunction.run, plan.processors = self.run, self.processors


def _read(compiled):
    """Reads registers and memory of a compiled kernel from its machine code, and widths and types
    from its PTX, which already has the final ones.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = {
        name: int(number)
        for name, number in re.findall(
            r"\b(REG|STACK|LOCAL):(\d+)", listing.stdout + listing.stderr
        )
    }
    widths = {"ld": collections.Counter(), "st": collections.Counter()}
    for instruction, vector, bits in re.findall(
        r"\b(ld|st)\.global[.\w]*?(?:\.v(\d))?\.[busf](\d+)", compiled.asm["ptx"]
    ):
        widths[instruction][int(vector or 1) * int(bits) // 8] += 1
    for width in re.findall(
        r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], 0x(\w+)", compiled.asm["ptx"]
    ):  # asynchronous copies to shared memory
        widths["ld"][int(width, 16)] += 1
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "loads": dict(widths["ld"]),
        "stores": dict(widths["st"]),
        "double": len(re.findall(r"\.f64\b", compiled.asm["ptx"])),
        "tensor_cores": len(
            re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"])
        ),
    }


def table(proofs):
    """A line for each kernel, dtype, layout and kind of modulation, with the worst figures over
    activations and capabilities.
    """
    result = narrow_table(
        "kernel\n  dtype, layout, γ and β",
        *("registers", "stack", "shared", "loads", "stores", "double"),
        caption=(
            "registers, stack, shared: the maximum. loads, stores: bytes per instruction, on sizes"
            " divisible by 16."
        ),
    )
    groups = {}
    for proof in proofs:
        groups.setdefault((proof.kernel, proof.dtype, proof.layout, proof.modulation), []).append(
            proof
        )
    for key, group in sorted(groups.items()):
        most = [
            str(max(getattr(proof, name) for proof in group))
            for name in ("registers", "stack", "shared")
        ]
        widths = [
            ", ".join(
                map(
                    str,
                    sorted(
                        {
                            width
                            for proof in group
                            if proof.aligned
                            for width in getattr(proof, name)
                        },
                        reverse=True,
                    ),
                )
            )
            for name in ("loads", "stores")
        ]
        result.add_row(
            f"{key[0].removesuffix('_kernel')}\n  {', '.join(key[1:])}",
            *most,
            *widths,
            str(max(proof.double for proof in group)),
        )
    return result
