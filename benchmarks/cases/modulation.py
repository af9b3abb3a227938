"""The cases `modulate` and `lookup`: the operation alone, with dense γ and β and with tables."""

import functools

import torch
import torch.nn.functional as F

import spade_fast
from spade_fast import SemanticLayout, reference

from .problem import BACKWARD, DEVICE_ALONE, FORWARD, MEMORIES, Problem, jitter, plan_of, results_of
from .scenes import conditions

# The distinct (channels, size) of the SPADEs of the published COCO generator at 256², and of
# LivePortrait's decoder.
COCO_SHAPES = [
    (1024, 8),
    (1024, 16),
    (1024, 32),
    (512, 32),
    (512, 64),
    (256, 64),
    (256, 128),
    (128, 128),
    (128, 256),
    (64, 256),
]
LIVEPORTRAIT_SHAPES = [(512, 64), (512, 128), (256, 128), (256, 256), (64, 256)]


def modulate(settings):
    """spade_modulate with a leaky ReLU, on the shapes of the published generators, in both memory
    formats.
    """
    shapes = [(64, 32)] if settings.quick else dict.fromkeys(COCO_SHAPES + LIVEPORTRAIT_SHAPES)
    for channels, size in shapes:
        for memory, layout in MEMORIES.items():
            for mode in (FORWARD, BACKWARD):
                name, shape = f"{channels} × {size}² {memory}", (channels, size, layout)
                yield plan_of(modulate_problem, settings, name, mode, *shape)


def lookup(settings):
    """The case modulate with γ and β looked up, pixel by pixel, in the table of a scene's
    windows.
    """

    @functools.cache
    def scene():
        return SemanticLayout.from_segmap(next(conditions(settings))).to(settings.device)

    def build(settings, name, mode, channels, size):
        windows = scene().windows((size, size), 3)
        name = f"{channels} × {size}² {windows.count} windows"
        return modulate_problem(settings, name, mode, channels, size, torch.channels_last, windows)

    for channels, size in [(64, 32)] if settings.quick else COCO_SHAPES:
        for mode in (FORWARD, BACKWARD):
            yield plan_of(build, settings, f"{channels} × {size}² windows", mode, channels, size)


def modulate_problem(settings, name, mode, channels, size, layout, windows=None):
    """The operation alone. windows: γ and β are tables with a row for each of these windows; if
    None, γ and β are dense.
    """

    def tensor(*shape):
        values = torch.randn(*shape, device=settings.device).to(settings.dtype)
        return values.to(
            memory_format=layout if len(shape) == 4 else torch.contiguous_format
        ).requires_grad_(mode == BACKWARD)

    shape = (settings.batch, channels, size, size)
    rows = shape if windows is None else (windows.count, channels)
    inputs, dy = (
        {"x": tensor(*shape), "gamma": tensor(*rows), "beta": tensor(*rows)},
        tensor(*shape).detach(),
    )

    def eager(x, gamma, beta, activation):
        if windows is not None:
            gamma, beta = (table[windows.index.long()].movedim(-1, 1) for table in (gamma, beta))
        return reference.spade_modulate(x, gamma, beta, activation=activation)

    def ours(x, gamma, beta, activation):
        lookup = {} if windows is None else {"index": windows.index, "order": windows.order}
        return spade_fast.spade_modulate(x, gamma, beta, activation=activation, **lookup)

    def floor(x, gamma, beta, activation):
        return F.leaky_relu(F.instance_norm(x), 0.2)

    def variant(function, inputs, dy, names=("x", "gamma", "beta")):
        def run():
            y = function(**inputs, activation="leaky_relu")
            return results_of(y, {name: inputs[name] for name in names}, dy, mode)

        return run

    exact = {
        name: value.detach().double().requires_grad_(mode == BACKWARD)
        for name, value in inputs.items()
    }
    # Forward reads x, γ, β and writes y; backward reads dy, x, γ and writes dx, dγ, dβ. With
    # backward, the leaky ReLU's signs are written and read: a bit per element each time.
    streams, tables, bits = (2, 2, 0) if mode == FORWARD else (5, 5, 2)
    least_bytes = (
        streams * dy.numel() + tables * inputs["gamma"].numel()
    ) * dy.element_size() + dy.numel() * bits // 8
    if windows is not None:  # both read the index; backward also reads the pixels in its order
        least_bytes += (
            (1 if mode == FORWARD else 3) * windows.index.numel() * windows.index.element_size()
        )
    return Problem(
        name,
        mode,
        settings.wanted(
            {
                "eager": lambda: variant(eager, inputs, dy),
                "torch.compile": lambda: variant(_compiled(eager), inputs, dy),
                "spade_fast": lambda: variant(ours, inputs, dy),
                "floor": lambda: variant(floor, inputs, dy, ["x"]),
            }
        ),
        variant(eager, exact, dy.double()),
        lambda number: variant(
            eager, {name: jitter(value) for name, value in inputs.items()}, dy
        )(),
        least_bytes=least_bytes,
        clock=DEVICE_ALONE,
    )


def _compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)
