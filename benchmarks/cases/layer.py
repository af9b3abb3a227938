"""The case `layer`: one SPADE, computed at pixels and at distinct windows."""

import copy
import functools

import torch

import spade_fast
from spade_fast import SemanticLayout, reference

from .problem import BACKWARD, FORWARD, Problem, jitter, plan_of, results_of
from .scenes import conditions


def layer(settings):
    """One SPADE computed at pixels, at distinct windows, and as the layer chooses itself: where
    windows pay, and the cost of finding out.

    The conditions are a scene, random labels for cells of 4² pixels and for each pixel, and dense
    features, which have no windows.
    """
    # (channels, size, nhidden)
    shapes = [(64, 32, 128)]
    if not settings.quick:
        shapes = [(1024, 8, 128), (1024, 16, 128), (1024, 32, 128), (512, 32, 128)]
        shapes += [(512, 64, 128), (256, 128, 128), (64, 256, 128), (64, 32, 64), (32, 128, 16)]

    @functools.cache
    def scene():
        return SemanticLayout.from_segmap(next(conditions(settings)))

    @functools.lru_cache(1)  # shared by both modes
    def condition(kind, size):
        pixels = (len(scene()), size, size)
        if kind == "scene":
            return scene().resize(pixels[1:])
        if kind == "dense features":
            return torch.randn(pixels[0], 184, size, size)
        labels = torch.randint(183, pixels)
        if kind == "cells of 4²":
            labels = labels[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2)
        return SemanticLayout.from_labels(labels, 184)

    def build(settings, name, mode, channels, size, nhidden, kind):
        given = condition(kind, size)
        return _layer_problem(settings, name, mode, channels, size, nhidden, given)

    for channels, size, nhidden in shapes:
        for kind in ("scene", "cells of 4²", "noise", "dense features"):
            for mode in (FORWARD, BACKWARD):
                name = f"{channels} at {size}², nhidden {nhidden}, {kind}"
                yield plan_of(build, settings, name, mode, channels, size, nhidden, kind)


def _layer_problem(settings, name, mode, channels, size, nhidden, condition):
    torch.manual_seed(0)
    eager, ours = (kind(channels, 184, nhidden) for kind in (reference.SPADE, spade_fast.SPADE))
    ours.load_state_dict(eager.state_dict())
    exact = copy.deepcopy(eager).double()
    x, dy = torch.randn(2, len(condition), channels, size, size)
    as_layout = isinstance(condition, SemanticLayout)
    segmap = condition.to_segmap() if as_layout else condition
    x, dy, segmap = (tensor.to(settings.device, settings.dtype) for tensor in (x, dy, segmap))
    condition = condition.to(settings.device) if as_layout else segmap

    def variant(module, x, condition, windows="auto", fresh=False):
        module = module.to(settings.device)
        x = x.detach().requires_grad_(mode == BACKWARD)

        def run():  # each view is a new tensor, for which nothing is cached
            with spade_fast.window_mode(windows):
                y = module(x, condition.view_as(condition) if fresh else condition)
            return results_of(y, {"x": x} | dict(module.named_parameters()), dy.to(x.dtype), mode)

        return run

    eager, ours = eager.to(settings.dtype), ours.to(settings.dtype)
    return Problem(
        name,
        mode,
        settings.wanted(
            {
                "eager": lambda: variant(eager, x, segmap),
                "spade_fast, pixels": lambda: variant(ours, x, segmap, "never"),
                "spade_fast, windows": lambda: variant(ours, x, condition, "always"),
                "spade_fast, by itself": lambda: variant(ours, x, condition),
                "spade_fast, new condition": lambda: variant(ours, x, segmap, fresh=True),
            }
        ),
        variant(exact, x.double(), segmap.double()),
        lambda number: variant(eager, jitter(x), jitter(segmap))(),
    )
