"""Whether operations run on values, or are recorded or transformed."""

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)
_RECORDERS = (
    torch._C._TorchDispatchModeKey.PROXY,  # make_fx
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def is_recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether operations on these tensors are recorded or transformed: by torch.export,
    torch.jit.trace, make_fx, torch.func or forward-mode differentiation, or because the tensors
    have no values (meta, fake, and other classes that dispatch for themselves).

    If so, nothing may depend on values, and everything is computed in plain PyTorch, which all of
    these understand. torch.compile is not among them: it knows this package's operators.
    """
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDERS)
        )
    ):
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_meta):
            if not has_values(tensor):
                return True
    return False


def always(condition: bool | torch.SymBool) -> bool:
    """Whether a comparison of sizes is true; where operations are recorded, whether it is true of
    all sizes that the graph takes. A plain `if` would restrict the graph to sizes for which the
    answer is the same.

    A size that torch.jit.trace records may be any, and torch.compile compiles again where the
    answer changes.
    """
    if torch._C._get_tracing_state() is not None:
        return False
    if torch.compiler.is_compiling():
        is_symbolic = torch.compiler._is_exporting_flag
    else:
        is_symbolic = not isinstance(condition, bool)
    if not is_symbolic:
        return bool(condition)
    from torch.fx.experimental import symbolic_shapes  # takes a second, for SymPy

    return symbolic_shapes.statically_known_true(condition)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie in memory as its strides say, whatever its subclass."""
    return not tensor.is_meta and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def may_overwrite() -> bool:
    """Whether a result that only its caller holds may be overwritten: operations are not recorded,
    and no mode of `torch.utils._python_dispatch` is active, which might keep their results
    (selective checkpointing does). A compiler decides by itself what it overwrites.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and not is_recorded()


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; outside inference mode, a copy of an inference tensor that autograd may save."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor if torch.is_inference_mode_enabled() else tensor.clone()


def constant(number: float) -> float:
    """A number as a constant of the compiled graph: another value causes a recompilation.

    Dynamo turns a number that has changed once into a symbol, and fails if several
    autograd.Functions of one graph have the same symbol in their backward.
    """
    # Dynamo takes the keys of a dict for constants.
    return {number: number}[number] if torch.compiler.is_compiling() else number


def is_transformed(gradient: torch.Tensor) -> bool:
    """Whether a backward is itself differentiated or transformed: it then runs in plain PyTorch."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or is_recorded(gradient)


def gradients_of(
    result: torch.Tensor, inputs: list[torch.Tensor | None], gradient: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients of these inputs, from a result that a transformed backward has recomputed; None
    for inputs that need none. The gradients are differentiable if grad mode is on.
    """
    needed = [tensor is not None and tensor.requires_grad for tensor in inputs]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(
        torch.autograd.grad(result, wanted, gradient, create_graph=torch.is_grad_enabled())
    )
    return [next(found) if needs else None for needs in needed]


def of_their_class(y: torch.Tensor, *others: object) -> torch.Tensor:
    """y in the class that an operation on it and the other tensors would return, since some tensor
    subclasses propagate. No data is copied.
    """
    theirs = [
        other
        for other in others
        if type(other) not in PLAIN and isinstance(other, torch.Tensor) and other.numel()
    ]
    if not theirs or torch.compiler.is_compiling() or is_recorded(*theirs):
        return y
    return torch.broadcast_tensors(y, *(other.detach().flatten()[:1] for other in theirs))[0]
