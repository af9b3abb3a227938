"""What follows a modulation in other people's code, SiLU and a convolution, keeps nothing for
backward: what it would keep is computed again from what the modulation keeps.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_any, tree_map

from ..ops.modulate import Modulate, modulated_again

KEEPING = {F.silu, torch.conv1d, torch.conv2d, torch.conv3d}  # these keep their argument
# The results of these can be computed again: SiLU's, and frames before those of a causal
# convolution.
FOLLOWING = {F.silu, torch.cat, torch.Tensor.__getitem__}


class Recipe:
    """A call that returns the same numbers when it is repeated. In its arguments, recipes stand for
    the results of other calls.
    """

    def __init__(self, func: Callable, *args: Any, **kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs

    def make(self, made: dict["Recipe", torch.Tensor]) -> torch.Tensor:
        """The result. made: results of recipes, to which those that are needed are added."""
        if self not in made:
            args, kwargs = tree_map(
                lambda own: own.make(made) if isinstance(own, Recipe) else own,
                (self.args, self.kwargs),
            )
            made[self] = self.func(*args, **kwargs)
        return made[self]


class Again(torch.Tensor):
    """A tensor that can be computed again. A function of KEEPING keeps its recipe in its place;
    every operation is otherwise that of an ordinary tensor, and so is its result.
    """

    recipe: Recipe | None = None  # a copy of the object has none

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not all(issubclass(cls, kind) for kind in types):
            return NotImplemented  # another class of tensors decides
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # graphs cannot have a subclass as an input (torch 2.13)
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.__reduce_ex__:
                return args[0].as_subclass(torch.Tensor).__reduce_ex__(*args[1:])
            hooks: Any = torch._C._autograd
            if kwargs.get("inplace") or not hooks._saved_tensors_hooks_is_enabled():
                return func(*args, **kwargs)
            if func in KEEPING and args:
                with torch.autograd.graph.saved_tensors_hooks(_packing(args[0]), _unpack):
                    result = func(*args, **kwargs)
            else:
                result = func(*args, **kwargs)
            follows = func in FOLLOWING and result.requires_grad
            return _following(result, func, args, kwargs) if follows else result


def again(y: torch.Tensor) -> torch.Tensor:
    """y, as an Again if a modulation by tables has just computed it for a backward, and nothing
    else decides what is kept for that (checkpointing, which recomputes, or offloading).
    """
    if torch.compiler.is_compiling() or not y.requires_grad or type(y) is not torch.Tensor:
        return y
    decides = torch._C._autograd._top_saved_tensors_default_hooks(False)
    node: Any = y.grad_fn
    if decides or not isinstance(node, Modulate._backward_cls) or not node.by_tables:
        return y
    return _with_recipe(y, Recipe(modulated_again, node))


def _with_recipe(tensor, recipe):
    tensor = tensor.as_subclass(Again)
    tensor.recipe = recipe
    return tensor


def _has_recipe(tensor):
    """Whether a recipe says what is in a tensor now."""
    return isinstance(tensor, Again) and tensor.recipe is not None and tensor._version == 0


def _packing(tensor):
    """A function that replaces a tensor's values by its recipe, if it has one."""
    if not _has_recipe(tensor):
        return lambda kept: kept
    memory, recipe = _memory(tensor), tensor.recipe
    return lambda kept: recipe if _memory(kept) == memory else kept


def _memory(tensor):
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@torch.no_grad()
def _unpack(kept):
    return kept.make({}) if isinstance(kept, Recipe) else kept


def _following(result, func, args, kwargs):
    """A result as an Again, if all that it was computed from has a recipe or is small."""
    small = result.nbytes // 2

    def is_large(own):
        return isinstance(own, torch.Tensor) and own.untyped_storage().nbytes() > small

    def ingredient(own):
        if _has_recipe(own):
            return own.recipe
        is_tensor = isinstance(own, torch.Tensor)
        return Recipe(_unchanged, own.detach(), own._version) if is_tensor else own

    given = tree_map(lambda own: own.recipe if _has_recipe(own) else own, (args, kwargs))
    if tree_any(is_large, given):
        return result
    args, kwargs = tree_map(ingredient, (args, kwargs))
    return _with_recipe(result, Recipe(func, *args, **kwargs))


def _unchanged(tensor, version):
    if tensor._version != version:
        raise RuntimeError(
            "a tensor that is needed for backward has been modified by an inplace operation"
        )
    return tensor
