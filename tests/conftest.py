"""What every test shares: the backends that the suite runs on, and fixed random numbers."""

import contextlib

import pytest
import torch

import spade_fast
from spade_fast.kernels import cpu_backend

BACKENDS = ["cpu", "torch"]  # a new backend joins the whole suite here
INSTRUCTION_SETS = cpu_backend.library.instruction_sets() if cpu_backend.library else []


@contextlib.contextmanager
def use_instruction_set(name):
    before = cpu_backend.library.instruction_set()
    cpu_backend.library.use_instruction_set(name)
    try:
        yield
    finally:
        cpu_backend.library.use_instruction_set(before)


@contextlib.contextmanager
def use_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with spade_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[*BACKENDS, *(f"cpu {name}" for name in INSTRUCTION_SETS[1:])])
def backend_and_instruction_set(request):
    """The backends, and the CPU's once more for each lesser instruction set that it has."""
    name, *instruction_set = request.param.split()
    with spade_fast.use_backend(name), use_instruction_set(*instruction_set) if instruction_set else contextlib.nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
