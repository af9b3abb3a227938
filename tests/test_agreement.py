"""The rule of agreement can fail: a rule that cannot would prove nothing."""

import pytest
import torch

from spade_fast.agreement import excess

TRUTH = torch.linspace(-3, 3, 100, dtype=torch.float64)
EAGER = TRUTH.float()


def test_equal_values_agree_and_visible_errors_do_not():
    assert excess(EAGER.clone(), EAGER, TRUTH) <= 1
    assert excess(EAGER + 1e-5, EAGER, TRUTH) > 1
    assert excess(TRUTH * (1 + 1e-13), TRUTH, TRUTH) <= 1
    assert excess(TRUTH * (1 + 1e-11), TRUTH, TRUTH) > 1


def test_at_most_twice_eagers_error_is_allowed():
    eager = EAGER + 1e-4
    assert excess(EAGER + 1.9e-4, eager, TRUTH) <= 1
    assert excess(EAGER + 2.2e-4, eager, TRUTH) > 1


def test_the_worst_of_several_yardsticks_counts():
    assert excess(EAGER + 1.9e-4, [EAGER, EAGER - 1e-4, EAGER], TRUTH) <= 1
    assert excess(EAGER + 1.9e-4, [EAGER, EAGER], TRUTH) > 1


def test_scale_and_eps():
    zero, noise = torch.zeros(9, dtype=torch.float64), torch.full((9,), 1e-7)
    assert excess(noise, torch.zeros(9), zero) > 1
    assert excess(noise, torch.zeros(9), zero, scale=1.0) <= 1
    assert (
        excess(EAGER.double() + 1e-6, EAGER.double(), TRUTH, eps=torch.finfo(torch.float32).eps)
        <= 1
    )


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_values_that_are_not_finite_must_match_eagers(special):
    for other in (float("nan"), float("inf"), -float("inf")):
        ours, eager, truth = EAGER.clone(), EAGER.clone(), TRUTH.clone()
        ours[3], eager[3], truth[3] = special, other, other
        same = special == other or (special != special and other != other)
        assert (excess(ours, eager, truth) <= 1) == same
    ours = EAGER.clone()
    ours[3] = special
    assert excess(ours, EAGER, TRUTH) > 1


def test_shape_and_dtype_must_match():
    assert excess(EAGER[:-1], EAGER, TRUTH) == float("inf")
    assert excess(EAGER.double(), EAGER, TRUTH) == float("inf")
    assert excess(EAGER[:0], EAGER[:0], TRUTH[:0]) == 0
