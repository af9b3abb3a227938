"""Whether operations run on values, or somebody records or transforms them."""

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
    torch.jit.trace, make_fx, torch.func or forward-mode differentiation, or on tensors without
    values (meta, fake, and other classes that dispatch for themselves).

    Then nothing may depend on values, and everything is plain PyTorch, which each of these
    understands. torch.compile is none of them: it knows this package's operators.
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


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers lie in memory as it says, whatever subclass it is of."""
    return not tensor.is_meta and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def may_overwrite() -> bool:
    """Whether a tensor that only its maker holds may be written over: nobody keeps what operations
    return, as the modes of `torch.utils._python_dispatch` may (selective checkpointing does), or
    records them. A compiler finds out by itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and not is_recorded()


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that autograd may keep, though it was made in inference mode."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor if torch.is_inference_mode_enabled() else tensor.clone()


def constant(number: float) -> float:
    """A number that a compiled graph may depend on: for another value the graph is made anew.

    A number that has changed once is a symbol to Dynamo, and several autograd.Functions of one
    graph whose backward has the same symbol are an error of its own there.
    """
    return {number: number}[number] if torch.compiler.is_compiling() else number  # as a key it is


def is_transformed(gradient: torch.Tensor) -> bool:
    """Whether a backward is itself differentiated, or transformed: then it is plain PyTorch."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or is_recorded(gradient)


def gradients_of(
    result: torch.Tensor, inputs: list[torch.Tensor | None], gradient: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients of these inputs of a result that a transformed backward has made anew, None
    for those that need none; themselves differentiable where gradients are on.
    """
    needed = [tensor is not None and tensor.requires_grad for tensor in inputs]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(
        torch.autograd.grad(result, wanted, gradient, create_graph=torch.is_grad_enabled())
    )
    return [next(found) if needs else None for needs in needed]


def of_their_class(y: torch.Tensor, *others: object) -> torch.Tensor:
    """y as what an operation on it and the other tensors gives: some classes of tensors pass
    themselves on. The operation moves nothing.
    """
    theirs = [
        other
        for other in others
        if type(other) not in PLAIN and isinstance(other, torch.Tensor) and other.numel()
    ]
    if not theirs or torch.compiler.is_compiling() or is_recorded(*theirs):
        return y
    return torch.broadcast_tensors(y, *(other.detach().flatten()[:1] for other in theirs))[0]
