"""What every test shares: the backends that the suite runs on, and fixed random numbers."""

import pytest
import torch

import spade_fast

BACKENDS = ["cpu", "torch"]  # a new backend joins the whole suite here


@pytest.fixture(params=BACKENDS)
def backend(request):
    with spade_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
