"""Predicted times on a GPU: the counts that they are made of, and the model."""

import dataclasses
import os
import shutil

import pytest
from rich.console import Console

from benchmarks import launches, predictions, shares
from benchmarks.cases.modulation import COCO_SHAPES
from benchmarks.cases.problem import BACKWARD, FORWARD
from benchmarks.cuda_proofs import Proof
from benchmarks.instructions import Counted, Path, counted
from benchmarks.predictions import Model, Work
from benchmarks.shares import MEMORIES, Problem

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler"
)
MODEL = Model(1e12, 1e14, 1e-6, 1e-5, 1e-4, 2e-5)


def listing(*code):
    """Machine code as cuobjdump prints it."""
    return "\n".join(
        f"        /*{16 * at:04x}*/   {text} ;  /* 0x0 */" for at, text in enumerate(code)
    )


def test_instructions_are_those_of_the_path_with_wide_accesses():
    found = counted(
        listing(
            "MOV R1, c[0x0][0x28]",
            "@P0 BRA 0x50",  # to the fast path
            "LDG.E.U16 R2, [R4]",
            "LDG.E.U16 R3, [R4+0x2]",
            "BRA 0x60",
            "LDG.E.128.CONSTANT R4, [R4]",
            "FADD R2, R2, R3",
            "@P1 BRA 0x90",  # skips one instruction
            "FADD R2, R2, R3",
            "STG.E.128 [R6], R8",
            "@P2 BRA 0x10",
            "EXIT",
            "BRA 0xc0",
        )
    )
    loop = Path(6, ("LDG", "STG"))
    assert found == Counted(Path(8, loop.wide), (loop,))


def test_loops_within_loops_and_without_wide_accesses():
    inner = ["LDS.128 R4, [R2]", "@P0 BRA 0x10"]
    found = counted(
        listing("NOP", *inner, "@P1 BRA 0x0", "IADD3 R1, R1, R2, R3", "@P3 BRA 0x40", "EXIT")
    )
    assert found.loops == (Path(2, ("LDS",)),)
    assert found.kernel == Path(7, ("LDS",))


def test_a_device_takes_the_longer_of_bytes_and_operations():
    both = Work("mm", 2, 10**6, 10**9)
    assert MODEL.device([both]) == pytest.approx(1e-5 + 2e-6)
    assert MODEL.device([both._replace(operations=0)]) == pytest.approx(1e-6 + 2e-6)
    assert MODEL.device([both, both], launches=1) == pytest.approx(2e-5 + 1e-6)


def test_a_call_takes_the_longer_of_device_and_host():
    work = [Work("spade_fast::apply", 3, 10**6, 0), Work("mul", 1, 0, 0)]
    assert MODEL.call("a path", work) == pytest.approx(4e-5 + 1e-4)
    assert MODEL.call(predictions.EAGER, work) == pytest.approx(8e-5)
    assert MODEL.call("a path", [work[0]._replace(bytes=10**9)]) == pytest.approx(1e-3 + 3e-6)


def test_counted_bytes_and_operations():
    import torch

    a, b = torch.ones(3, 4), torch.ones(4, 5)
    (work,) = launches.count(lambda: a @ b).work
    assert work == Work("mm", 1, 4 * (12 + 20 + 15), 2 * 3 * 4 * 5)
    (work,) = launches.count(lambda: a.add_(1)).work
    assert work == Work("add_", 1, 48, 0)


def test_measurements_are_of_the_commit_whose_launches_are_known():
    files = (predictions.GENERATOR, predictions.BATCH)
    assert {predictions.results(file)["environment"]["commit"] for file in files} == {
        predictions.COMMIT
    }
    assert predictions.LAUNCHES_THEN.keys() == predictions.ROWS.keys()


def proof(kernel, layout, loops, registers=64):
    """One of a kernel whose loops take an item."""
    paths = tuple(Path(number, (name,) * count) for number, name, count in loops)
    return Proof(
        *(kernel, 8, layout, None, shares.CAPABILITY, registers, 0, 0, 0, 512, {}, {}),
        *(0, False, False, Counted(Path(500, ()), paths)),
    )


LOOPS = {
    "forward_kernel": [(20, "LDGSTS", 1), (300, "LDS", 2)],
    "backward_kernel": [(20, "LDGSTS", 2), (300, "LDS", 4)],
    "plane_moments_kernel": [(60, "LDG", 4)],
    "apply_kernel": [(150, "STG", 1)],
    "backward_sums_kernel": [(200, "STG", 2)],
    "backward_input_kernel": [(150, "STG", 1)],
}
PROOFS = [proof(kernel, layout, loops) for kernel, loops in LOOPS.items() for layout in MEMORIES]


def test_instructions_grow_with_the_items():
    forward, moments = PROOFS[0], PROOFS[4]
    assert shares.instructions_of(forward, 1) == 500
    assert shares.instructions_of(forward, 5) == 500 + 4 * 20 + 2 * 300
    assert shares.instructions_of(moments, 4) == 500
    assert shares.instructions_of(moments, 5) == 500 + 60


@needs_compiler
def test_every_kernel_has_a_share_and_more_work_takes_longer():
    sizes = [
        Problem(images, 64, size, memory)
        for images in (1, 16)
        for size in (16, 64, 256)
        for memory in MEMORIES
    ]
    found = shares.shares(PROOFS, 3e-6, sizes)
    assert {one.kernel for one in found} == LOOPS.keys()
    assert all(0 < one.share <= 1 and one.resident > 0 for one in found)
    times = shares.operations(found)
    for (problem, mode), seconds in times.items():
        assert seconds >= times[problem, FORWARD]
        larger = dataclasses.replace(problem, size=4 * problem.size), mode
        assert seconds < times.get(larger, 1)
    shares_are_longer_with_more_instructions(sizes, times)
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(shares.table(found), shares.table_of_operations(found), sep="\n")
    assert capture.get().count("predicted") == 2 and "…" not in capture.get()


def shares_are_longer_with_more_instructions(sizes, times):
    slow = [dataclasses.replace(one, counted=Counted(Path(50_000, ()), ())) for one in PROOFS]
    for key, seconds in shares.operations(shares.shares(slow, 3e-6, sizes)).items():
        assert seconds > times[key]


@needs_compiler
def test_one_pass_uses_the_processors_and_whole_transfers():
    problems = [
        Problem(images, channels, size, "channels-last")
        for images in (1, 16)
        for channels, size in COCO_SHAPES
    ]
    for problem, divided in shares.divisions(problems).items():
        for d in divided[:2]:
            few = d.items <= 4 * d.lanes
            assert d.blocks == 0 or few or 2 * d.blocks >= shares.PROCESSORS, problem
            assert d.blocks == 0 or few or 16 * d.columns >= shares.TRANSFER, problem
        assert all(d.blocks > 0 for d in divided[2:])
    ((forward, backward, *_),) = shares.divisions([Problem(1, 512, 64, "channels-last")]).values()
    assert forward.blocks == backward.blocks == 128


def test_measured_operations_are_those_of_the_results():
    found = shares.measured_operations()
    assert found[16, "128 × 256² channels-last", FORWARD] == pytest.approx(3.63e-4, rel=2e-3)
    row = next(
        row
        for row in predictions.results(predictions.OPERATIONS[0])["rows"]
        if (row["problem"], row["mode"]) == ("256 × 128² contiguous", BACKWARD)
    )
    assert shares.least_bytes(Problem(16, 256, 128, "contiguous"), BACKWARD) == row["least_bytes"]
