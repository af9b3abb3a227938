"""A model beside its plain twin: a call's results, its gradients, the buffers after it and its
errors must be the same.
"""

import torch
from agree import assert_agree, assert_agree_beside
from label_maps import patches
from torch.utils._pytree import tree_leaves

from spade_fast import SemanticLayout

REFUSALS = (RuntimeError, NotImplementedError, ValueError, TypeError)
ACCIDENTS = (AttributeError, IndexError)  # from a forward with unexpected arguments
# A refusal says what to do in the caller's terms; PyTorch's internal messages do not.
WORDS = ("should", "use_backend", "window_mode", "spade_fast", "convert", "call it", "instead")
INSIDE = ("INTERNAL ASSERT", "Cannot access data pointer", "unhashable type", "please report a bug")


def pictures(batch=2, channels=8, size=(6, 5), seed=1):
    """x [batch, channels, *size], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def label_map(batch=2, classes=5, size=(12, 10), seed=0):
    """A one-hot condition [batch, classes, *size], float64."""
    return layout_of(batch, classes, size, seed).to_segmap(torch.float64)


def layout_of(batch=2, classes=5, size=(12, 10), seed=0):
    return SemanticLayout.from_labels(patches((batch, *size), classes, seed), classes)


def dense_map(batch=2, classes=5, size=(12, 10), seed=2):
    """A condition of noise that requires gradients."""
    return pictures(batch, classes, size, seed).requires_grad_()


def outcome(call, module, *inputs, seed=0):
    """The results of call(module, *inputs) by name: tensors, the gradients of parameters and
    inputs, and buffers; or the error.

    Each call has the same random numbers, and copies of the inputs.
    """
    inputs = [copy_of(tensor) for tensor in inputs]
    torch.manual_seed(seed)
    try:
        tensors = [leaf for leaf in tree_leaves(call(module, *inputs)) if is_float(leaf)]
    except Exception as error:  # the twin's call decides which errors are allowed
        return error
    found = {f"output {number}": tensor.detach() for number, tensor in enumerate(tensors)}
    differentiable = [tensor for tensor in tensors if tensor.requires_grad]
    if differentiable:
        wanted = {f"input {number}": tensor for number, tensor in enumerate(inputs)}
        wanted |= dict(module.named_parameters())
        wanted = {name: tensor for name, tensor in wanted.items() if is_float(tensor, True)}
        dy = [weights_like(tensor) for tensor in differentiable]
        try:
            gradients = torch.autograd.grad(
                differentiable, list(wanted.values()), dy, allow_unused=True
            )
        except RuntimeError as error:  # such as from a hook that overwrites what backward needs
            return error
        found |= {f"gradient of {name}": one for name, one in zip(wanted, gradients)}
    return found | {f"buffer {name}": one.clone() for name, one in module.named_buffers()}


def weights_like(y):
    """Weights for a sum of y's elements that is not symmetric in them."""
    return torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y)


def is_float(value, requires_grad=False):
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and (value.requires_grad or not requires_grad)
    )


def copy_of(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def assert_same(ours, theirs, roundings=None):
    """Asserts that two outcomes agree. An error must have the twin's type or a type derived from
    it, or explain more than a missing attribute.
    """
    if isinstance(theirs, Exception):
        kinds = (type(theirs), *(REFUSALS if isinstance(theirs, ACCIDENTS) else ()))
        assert isinstance(ours, kinds), f"{describe(ours)} for {describe(theirs)}"
        return
    assert not isinstance(ours, Exception), f"{describe(ours)} where the twin has a result"
    assert_agree_beside(ours, theirs, roundings)
    for name, their in theirs.items():
        assert their is None or ours[name].dtype == their.dtype, name


def describe(outcome):
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__} ({outcome})"
    return "a result"


def assert_same_calls(call, ours, theirs, *inputs, roundings=None):
    """Asserts that a call of both has the same outcome."""
    assert_same(outcome(call, ours, *inputs), outcome(call, theirs, *inputs), roundings)


def right_or_refused(compute, expected, compare=assert_agree):
    """Asserts that compute() gives the expected result, or refuses in words that say what to do."""
    try:
        found = compute()
    except REFUSALS as error:
        message = str(error)
        assert any(word in message for word in WORDS) and not any(
            word in message for word in INSIDE
        ), f"not clear: {describe(error)}"
        return
    compare(found, expected)
