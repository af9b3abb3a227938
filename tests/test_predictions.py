"""Predicted times on a GPU: the counts that they are made of, and the model."""

import pytest

from benchmarks import launches, predictions
from benchmarks.predictions import Model, Work

MODEL = Model(1e12, 1e14, 1e-6, 1e-5, 1e-4, 2e-5)


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
    files = (predictions.GENERATOR, predictions.BATCH, *predictions.OPERATIONS)
    assert {predictions.results(file)["environment"]["commit"] for file in files} == {
        predictions.COMMIT
    }
    assert predictions.LAUNCHES_THEN.keys() == predictions.ROWS.keys()
