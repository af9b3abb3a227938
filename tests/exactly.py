"""Exact comparisons, bit for bit."""

import torch


def assert_same(found, expected, place="state"):
    """Asserts that nested containers and their tensors are the same, bit for bit."""
    assert type(found) is type(expected), place
    if isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), place
    elif isinstance(found, dict):
        assert list(found) == list(expected), place
        for name in found:
            assert_same(found[name], expected[name], f"{place}.{name}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected)):
            assert_same(one, other, f"{place}.{number}")
    else:
        assert found == expected, place
