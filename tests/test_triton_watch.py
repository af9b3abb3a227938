"""The watch over Triton's kernels finds deliberate faults, and nothing else."""

import pytest
import torch
from conftest import BACKENDS

if BACKENDS.get("triton") != "cpu":
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

import triton
import triton.language as tl
from triton_watch import Watch


@triton.jit
def right_kernel(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < count), at < count)


@triton.jit
def no_mask_kernel(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), at < count)


@triton.jit
def store_too_far_kernel(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at + 1, tl.load(x + at, at < count), at < count)


@triton.jit
def same_place_kernel(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at // 2 * 2 % BLOCK, tl.load(x + at, at < count), at < count)


@triton.jit
def one_number_kernel(x, y, count, BLOCK: tl.constexpr):
    tl.store(y, tl.load(x + tl.program_id(0)))


@triton.jit
def from_the_next_kernel(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(y + at + 1, at + 1 < count, 0) + tl.load(x + at, at < count)
    tl.store(y + at, number, at < count)


@triton.jit
def from_the_last_kernel(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(y + at - 1, at > 0, 0) + tl.load(x + at, at < count)
    tl.store(y + at, number, at < count)


WRONG = {
    no_mask_kernel: "loads outside of its arguments",
    store_too_far_kernel: "stores outside of its arguments",
    same_place_kernel: "a program stores several numbers to one address",
    one_number_kernel: "several programs store to one address",
    from_the_next_kernel: "programs load what others store",
    from_the_last_kernel: "programs load what others store",
}


def faults(kernel, dtype):
    memory = torch.zeros(100, dtype=dtype)  # faulty accesses stay inside this memory
    x, y = memory[10:40], memory[50:80]
    with Watch() as watch:
        kernel[4,](x, y, x.numel(), BLOCK=8)
    return watch.faults


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("kernel", WRONG, ids=lambda kernel: kernel.fn.__name__)
def test_deliberate_faults_are_found(kernel, dtype):
    found = faults(kernel, dtype)
    assert any(f"{kernel.fn.__name__}: {WRONG[kernel]}" in fault for fault in found), found
    assert not faults(right_kernel, dtype)


def test_new_memory_is_full_of_nan_only_inside_the_watch():
    before = torch.are_deterministic_algorithms_enabled()
    with Watch():
        assert torch.empty(1000).isnan().all() and torch.zeros(2).new_empty(9).isnan().all()
        assert (torch.empty(9, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before
