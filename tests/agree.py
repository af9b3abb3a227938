"""Whether two computations of one function agree, for tests without a truth in float64 or a run of
eager PyTorch to compare with. Those that have both use spade_fast/agreement.py.
"""

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

# Measured on a CPU: most tests need less than 4, layers and blocks up to 17, an encoder 27.
ROUNDINGS = 64
ONCE = 1  # for a sum in a wider dtype that is rounded at its end
NETWORK = 1024  # for a whole network, or sums over thousands of pixels; 479 were needed
# For small differences of large numbers, and networks after steps of SGD; 17,300 were needed.
CANCELLED = 2**16
# For Adam, which takes full steps where a gradient is only rounding; 330,000 were needed.
ADAM = 2**20


def assert_agree(ours, theirs, roundings=None, largest=None, name="y"):
    """Asserts that tensors, or lists, tuples and dicts of tensors, agree: in each tensor
    max|ours − theirs| is at most `roundings` · eps · max|theirs|, with the eps of the coarser of
    the two dtypes, and NaNs and infinities are in the same places. Anything but floating-point
    tensors must be equal.

    roundings: if None ROUNDINGS, or ONCE in half precision, whose sums are in float32.
    largest: a lower limit for max|theirs|.
    """
    words = disagreement(ours, theirs, roundings, largest, name)
    assert words is None, words


def agrees(ours, theirs, roundings=None, largest=None):
    """Whether assert_agree would pass."""
    return disagreement(ours, theirs, roundings, largest) is None


def largest_of(tree):
    """The largest finite absolute value in a tree of tensors."""
    tensors = [plain(leaf) for leaf in leaves_of(tree).values() if is_float(leaf)]
    finite = [tensor[tensor.isfinite()].abs() for tensor in tensors]
    return max((tensor.max().item() for tensor in finite if tensor.numel()), default=0.0)


def disagreement(ours, theirs, roundings, largest=None, name="y"):
    """The first disagreement, in words; None if all agrees."""
    ours, theirs = leaves_of(ours), leaves_of(theirs)
    if ours.keys() != theirs.keys():
        return f"{name} has {list(ours)}; it should have {list(theirs)}"
    faults = (fault(ours[key], theirs[key], roundings, largest or 0.0) for key in theirs)
    return next((f"{name}{key}{words}" for key, words in zip(theirs, faults) if words), None)


def fault(one, other, roundings, largest):
    """The disagreement of two leaves, without their name."""
    if not (is_float(one) and is_float(other)):
        return None if is_equal(one, other) else f" is {one}; it should be {other}"
    if one.shape != other.shape:
        return f" has shape {list(one.shape)}; it should be {list(other.shape)}"
    eps = max(torch.finfo(leaf.dtype).eps for leaf in (one, other))
    one, other = plain(one), plain(other)
    is_special = ~(one.isfinite() & other.isfinite())
    if not torch.allclose(one[is_special], other[is_special], 0, 0, equal_nan=True):
        return " has NaNs or infinities in other places"
    if roundings is None:
        roundings = ROUNDINGS if eps < 1e-6 else ONCE
    distance = (one - other).masked_fill(is_special, 0).abs()
    scale = max(largest_of(other), largest)
    if distance.numel() == 0 or distance.max() <= roundings * eps * scale:
        return None
    place = [index.item() for index in torch.unravel_index(distance.argmax(), distance.shape)]
    found = f"{one[tuple(place)]}; it should be {other[tuple(place)]}"
    away = f"{distance.max() / eps / scale:.3g} roundings of {scale:.3g}, not {roundings}"
    return f" at {place} is {found}: {away}"


def leaves_of(tree):
    """The leaves of a tree by their paths; the path of a single tensor is ""."""
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def is_float(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def is_equal(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def plain(tensor):
    return tensor.detach().as_subclass(torch.Tensor).double()


def assert_agree_beside(ours, theirs, roundings=None):
    """assert_agree with max|theirs| over all tensors: a gradient that is zero in exact arithmetic
    is only rounding compared with the others.
    """
    assert_agree(ours, theirs, roundings, largest_of(theirs))


def assert_layers_agree(ours, theirs, roundings=None):
    """assert_agree for named tensors, with max|theirs| over the tensors of a layer."""
    layers = {}
    for name in theirs:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    assert ours.keys() == theirs.keys()
    for names in layers.values():
        assert_agree_beside(
            *({name: one[name] for name in names} for one in (ours, theirs)), roundings
        )
