"""The rule for two computations in one dtype can fail, too."""

import pytest
import torch
from agree import (
    NETWORK,
    ROUNDINGS,
    agrees,
    assert_agree,
    assert_agree_beside,
    assert_layers_agree,
    largest_of,
)

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16)}
Y = torch.linspace(-4, 4, 9, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_few_roundings_of_the_largest_are_allowed_and_no_more(dtype):
    y, one = Y.to(dtype), EPS[dtype] * 4
    for number, is_right in ((0, True), (ROUNDINGS - 1, True), (ROUNDINGS + 2, False)):
        other = y.clone()
        other[3] += number * one
        assert agrees(other, y) == agrees(y, other) == is_right
        assert agrees(other, y, NETWORK) and agrees(other, y, 0) == (number == 0)
        assert agrees(other, y, largest=10.0) and agrees(other, y, largest=0.1) == is_right


def test_half_precision_is_rounded_once():
    y = torch.tensor([1.0, 1.5], dtype=torch.bfloat16)
    eps = EPS[torch.bfloat16]
    assert agrees(y + eps, y) and not agrees(y + 2 * eps, y) and agrees(y + 2 * eps, y, ROUNDINGS)


def test_the_coarser_dtype_counts():
    y = torch.ones(2)
    assert agrees(y.double() + 1e-6, y) and agrees(y, y.double() + 1e-6)
    assert not agrees(y.double() + 1e-6, y.double())
    assert agrees(y.bfloat16(), y + 4e-3) and not agrees(y.bfloat16(), y + 1e-2)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 0.5])
def test_what_is_not_finite_is_in_the_same_places(special):
    for other in (float("nan"), float("inf"), -float("inf"), 0.5):
        ours, theirs = torch.ones(3), torch.ones(3)
        ours[1], theirs[1] = special, other
        assert agrees(ours, theirs) == (str(special) == str(other))
        theirs[2] = 1.1
        assert not agrees(ours, theirs)


def test_trees_have_one_shape_and_what_is_no_number_is_equal():
    tree = {"a": [Y, (Y[:0], None)], "b": torch.arange(3), "c": 2}
    assert_agree(tree, {"c": 2, "a": (Y.clone(), [Y[:0], None]), "b": torch.arange(3)})
    for other in (
        Y,
        [],
        tree | {"d": Y},
        tree | {"c": 3},
        tree | {"c": True},
        tree | {"b": torch.arange(1, 4)},
        tree | {"b": torch.arange(3.0)},
        tree | {"a": [Y, (Y[:0], Y[0])]},
        tree | {"a": [Y, (Y[:1], None)]},
        tree | {"a": [Y[:, None], (Y[:0], None)]},
        tree | {"a": [Y + 1e-9, (Y[:0], None)]},
    ):
        assert not agrees(other, tree) and not agrees(tree, other)


def test_nothing_but_zero_agrees_with_zeros():
    zeros = torch.zeros(2)
    assert agrees(zeros, zeros) and not agrees(zeros + 1e-30, zeros)
    assert agrees(zeros + 1e-7, zeros, largest=1.0)


def test_the_error_says_where_and_how_far():
    ours = {"weight": [Y.view(3, 3).clone()]}
    ours["weight"][0][1, 2] += 4 * 100 * EPS[torch.float64]
    words = r"dx\['weight'\]\[0\] at \[1, 2\] is .*; it should be 1.0: 100 roundings of 4, not 64"
    with pytest.raises(AssertionError, match=words):
        assert_agree(ours, {"weight": [Y.view(3, 3)]}, name="dx")


def test_a_gradient_of_rounding_is_judged_beside_the_others():
    noise, large = torch.full((3,), 1e-15, dtype=torch.float64), torch.tensor([1.0, float("inf")])
    ours, theirs = ({"a.bias": one, "a.weight": large, "b": Y} for one in (noise, -noise))
    assert largest_of(ours) == 4 and largest_of([None, 3]) == 0
    assert not agrees(ours, theirs)
    assert_agree_beside(ours, theirs)
    assert_layers_agree(ours, theirs)
    with pytest.raises(AssertionError):
        assert_layers_agree(ours, {"b": Y})
    ours["c.bias"], theirs["c.bias"] = noise, -noise  # of a layer that has nothing larger
    assert_agree_beside(ours, theirs)
    with pytest.raises(AssertionError, match="c.bias"):
        assert_layers_agree(ours, theirs)
