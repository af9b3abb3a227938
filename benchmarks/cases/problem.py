"""What every case is made of: plans, problems and their variants; and the settings."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

FORWARD, BACKWARD = "forward", "forward+backward"
MEMORIES = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# What is timed on a GPU (measure.timed): the device's time without or with the host's.
DEVICE_ALONE, WHOLE_CALLS = "device alone", "whole calls"
# By what a variant's name begins with: norm(x), which stands in place of SPADE(x, segmap). These
# variants compute something else than the others, and are not compared with them.
BARE = {"floor": F.instance_norm, "limit": lambda x: x}
# The names of all variants. No problem has all of them.
VARIANTS = (
    "eager",
    "eager, channels-last",
    "torch.compile",
    "spade_fast",
    "spade_fast, pixels",
    "spade_fast, windows",
    "spade_fast, by itself",
    "spade_fast, new condition",
    "spade_fast, prepared",
    "spade_fast, page",
    "spade_fast, frozen",
    "spade_fast, folded, frozen",
    "spade_fast, graph",
    "spade_fast, graph, prepared",
    "ONNX Runtime",
    "spade_fast, ONNX Runtime",
    "spade_fast, ONNX Runtime, pixels",
    "floor",
    "floor, contiguous",
    "floor, channels-last",
    "limit, contiguous",
    "limit, channels-last",
)


@dataclass
class Plan:
    """A problem that is not built yet."""

    name: str
    mode: str  # FORWARD or BACKWARD
    build: Callable  # without arguments: the Problem


@dataclass
class Problem:
    """One group of rows in the table."""

    name: str  # the plan's name, with facts that are known only after building
    mode: str  # FORWARD or BACKWARD
    # By name, "eager" among them. Those whose name begins with one of BARE are not checked.
    variants: dict[str, Callable]
    truth: Callable
    jittered: Callable  # takes a run's number; eager, on inputs that differ by a rounding
    in_double: Callable | None = None  # ours in float64, where no rounding hides a mistake
    # All are checked; each round of timing takes the next one.
    scenes: list = field(default_factory=lambda: [None])
    scene: int = 0  # the number of the scene that the functions compute now
    # Variants that compute spectral norm's σ once. They get no time over the limit's, because the
    # limit computes σ in each call.
    folding: tuple[str, ...] = ()
    # Called with a variant's name before each call of that variant; not timed.
    prepare: Callable = lambda name: None
    clock: str = WHOLE_CALLS  # or DEVICE_ALONE
    # The bytes that the operation has to move: every input and output once.
    least_bytes: int | None = None
    least_rounds: int = 5  # minimum number of rounds of timing


@dataclass
class Settings:
    """The options of the command line."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    labels: str | None = None
    instances: str | None = None
    scenes: int = 1
    batch: int = 1  # images of an operation, or scenes that a network computes at once
    compile_mode: str = "default"  # torch.compile's mode for networks
    without: tuple = ()  # variants whose names begin with one of these are not built

    def wanted(self, makers):
        """Builds the variants that are not left out. makers: functions that build them, by name.

        Raises:
            ValueError: VARIANTS lacks a name.
        """
        if unknown := makers.keys() - set(VARIANTS):
            raise ValueError(f"VARIANTS lacks {', '.join(sorted(unknown))}")
        return {name: make() for name, make in makers.items() if not name.startswith(self.without)}


def plan_of(build, settings, name, mode, *arguments):
    """The plan whose problem is build(settings, name, mode, *arguments)."""
    return Plan(name, mode, functools.partial(build, settings, name, mode, *arguments))


def name_of(settings, name):
    """The name of a problem of networks, with the batch size and the number of scenes."""
    name += f", batch {settings.batch}" if settings.batch > 1 else ""
    return name + (f", {settings.scenes} scenes" if settings.scenes > 1 else "")


def results_of(y, wanted, dy, mode):
    """y, a tensor or a list of tensors, and with BACKWARD the gradients of `wanted`, by name."""
    outputs = (
        {f"y{number}": part for number, part in enumerate(y)} if isinstance(y, list) else {"y": y}
    )
    if mode == FORWARD:
        return outputs
    gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), dy)
    return {name: part.detach() for name, part in outputs.items()} | {
        f"d{name}": gradient for name, gradient in zip(wanted, gradients)
    }


def jitter(x):
    """x with each element changed by at most about a rounding."""
    rounding = torch.finfo(x.dtype).eps * (torch.rand_like(x) - 0.5)
    return (x.detach() * (1 + rounding)).requires_grad_(x.requires_grad)
