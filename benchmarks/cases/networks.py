"""What the cases of whole networks share: the problem of a network and ours on scenes, and the same
network without SPADE.
"""

import contextlib
import copy
import functools

import torch
import torch.nn as nn

import spade_fast
from spade_fast import SemanticLayout, reference
from spade_fast.nn.pixels import FORMATS

from .problem import BACKWARD, BARE, FORWARD, MEMORIES, Problem, jitter, results_of

COCO_NORM = "spectralspadesyncbatch3x3"  # norm_G of the published COCO generator


def published_generators(settings, size):
    """The published COCO generator in plain PyTorch, in eval mode, and ours with its weights."""
    wiring = {"crop_size": size, "ngf": 8 if settings.quick else 64, "norm_G": COCO_NORM}
    torch.manual_seed(0)
    eager = settle(reference.SPADEGenerator(184, **wiring)).eval()
    ours = spade_fast.SPADEGenerator.official(184, **wiring)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def with_converted(network):
    """The network and its converted copy."""
    ours = copy.deepcopy(settle(network))
    spade_fast.convert(ours)
    return network, ours


def converted_problem(settings, name, mode, networks, segmaps, *arguments, **named):
    """The problem of copies of a network and of its converted copy."""
    return network_problem(
        settings, name, mode, *copy.deepcopy(networks), segmaps, *arguments, **named
    )


def network_problem(
    settings,
    name,
    mode,
    eager,
    ours,
    segmaps,
    inputs=(),
    call=lambda network, segmap, *inputs: network(segmap, *inputs),
    our_call=None,
    bare_call=None,
    *,
    bare=(),
    keeps_tables=False,
    takes_layouts=False,
    graphed=False,
    counts_kept=False,
):
    """The problem of call(network, segmap, *inputs) on each scene's segmap in turn; with BACKWARD,
    also the gradients of all parameters and of all inputs that require them.

    Args:
        our_call: the call of our network, if it differs.
        bare_call: the call of a network without SPADE, if it differs.
        bare: which of BARE are measured. Every SPADE of eager's network is one of reference.py.
        keeps_tables: our network keeps its tables during each call.
        takes_layouts: our network takes SemanticLayouts, and is also measured on prepared ones. If
            it has SPADEs to leave out (`bare`) and the mode is FORWARD, it is measured frozen, too.
        graphed: our network is also measured as CUDA graphs.
        counts_kept: with BACKWARD, what each network keeps for backward is counted, too.
    """
    our_call, bare_call = our_call or call, bare_call or call
    settle(eager.to(settings.device))
    ours.load_state_dict(eager.state_dict())
    eager, ours = (_set_mode(network.to(settings.device), mode) for network in (eager, ours))
    exact, ours_in_double = (copy.deepcopy(network).double() for network in (eager, ours))
    eager, ours = eager.to(settings.dtype), ours.to(settings.dtype)
    on_scenes = _OnScenes(settings, mode, segmaps, inputs, counts_kept and mode == BACKWARD)
    around = spade_fast.frozen if keeps_tables else contextlib.nullcontext
    is_spectral = any(hasattr(module, "weight_orig") for module in eager.modules())

    def without_spades(kind, layout):
        return on_scenes.variant(without_spade(eager, BARE[kind]), bare_call, layout=layout)

    makers = {
        "eager": lambda: on_scenes.variant(eager, call),
        "torch.compile": lambda: on_scenes.compiled(copy.deepcopy(eager), call),
        "spade_fast": lambda: on_scenes.variant(ours, our_call, around=around),
    }
    if settings.device != "cpu" and segmaps[0].dim() == 4:  # a GPU's tensor cores work in it
        ours = ours.to(memory_format=torch.channels_last)
        makers["eager, channels-last"] = lambda: on_scenes.variant(
            copy.deepcopy(eager), call, layout=torch.channels_last
        )
    if takes_layouts:
        makers["spade_fast, prepared"] = lambda: on_scenes.variant(
            ours, our_call, condition=on_scenes.prepared
        )
    if takes_layouts and bare and mode == FORWARD:
        makers["spade_fast, frozen"] = lambda: on_scenes.frozen(copy.deepcopy(ours), our_call)
        if is_spectral:
            makers["spade_fast, folded, frozen"] = lambda: on_scenes.frozen(
                spade_fast.fold_spectral_norm(copy.deepcopy(ours)), our_call
            )
    if graphed:
        makers["spade_fast, graph"] = lambda: on_scenes.graph(ours, SemanticLayout.from_segmap)
        makers["spade_fast, graph, prepared"] = lambda: on_scenes.graph(ours, on_scenes.prepared)
    for kind in bare:
        for memory, layout in MEMORIES.items():
            makers[f"{kind}, {memory}"] = functools.partial(without_spades, kind, layout)
    variants = settings.wanted(makers)

    # Alternately in channels-last, where PyTorch's convolutions round five times as much.
    rounding = list(zip((eager, copy.deepcopy(eager)), MEMORIES.values()))

    def jittered(number):
        network, layout = rounding[number % 2]
        return on_scenes.variant(network, call, layout=layout, jitters=True)()

    on_scenes.problem = Problem(
        name,
        mode,
        variants,
        on_scenes.variant(exact, call, dtype=torch.float64),
        jittered,
        on_scenes.variant(ours_in_double, our_call, dtype=torch.float64, around=around),
        on_scenes.segmaps,
        folding=tuple(name for name in variants if is_spectral and name.endswith("frozen")),
    )
    return on_scenes.problem


class _OnScenes:
    """Makes a problem's variants: functions that compute a network's results on the scene of the
    problem's round.

    Each takes call(network, condition, *inputs), of which condition(segmap) makes the condition.
    """

    def __init__(self, settings, mode, segmaps, inputs, counts_kept):
        self.mode, self.compile_mode, self.counts_kept = mode, settings.compile_mode, counts_kept
        self.segmaps, self.inputs = (
            [_like(tensor, settings.device, settings.dtype) for tensor in tensors]
            for tensors in (segmaps, inputs)
        )
        self.problem = None  # the variants', once they are made
        self.dy = None  # the gradients of the outputs: made of those that are computed first
        self.layouts = {}  # by the scene's number
        self.converted = {}  # the segmaps, by dtype and memory format

    def variant(
        self,
        network,
        call,
        *,
        through=None,
        condition=lambda segmap: segmap.view_as(segmap),
        around=contextlib.nullcontext,
        layout=torch.contiguous_format,
        dtype=None,
        jitters=False,
    ):
        """The variant that computes `network`.

        Args:
            through: the function that is called in place of the network.
            condition: the default makes a new tensor in each call, so that finding its windows is
                measured, as for a new layout.
            around: around(network) is a context manager for each call.
            jitters: the scene and the inputs differ by a rounding.
        """
        if layout is torch.channels_last:
            for parameter in network.parameters():
                parameter.data = _like(parameter.data, layout=layout)
        change = jitter if jitters else lambda tensor: tensor
        segmaps = self.segmaps_in(dtype, layout)
        inputs = [_like(change(tensor), dtype=dtype, layout=layout) for tensor in self.inputs]
        wanted = dict(network.named_parameters()) | {
            f"input{i}": tensor for i, tensor in enumerate(inputs) if tensor.requires_grad
        }

        def outputs():
            segmap = change(segmaps[self.scene()])
            with around(network):
                return flat(call(through or network, condition(segmap), *inputs))

        def run():
            y = outputs()
            if self.dy is None:
                self.dy = [_gradient_of(part) for part in y]
            dy = [gradient.to(part.dtype) for gradient, part in zip(self.dy, y)]
            return results_of(y, wanted, dy, self.mode)

        if self.counts_kept:
            setattr(run, "outputs", outputs)
        return run

    def compiled(self, network, call):
        """The variant through torch.compile."""
        through = torch.compile(network, dynamic=False, mode=self.compile_mode)
        return self.variant(network, call, through=through)

    def frozen(self, network, call):
        """The variant that keeps the tables of all layouts, for as long as it exists."""
        tables = spade_fast.frozen(network, max_bytes=8 << 30)
        tables.__enter__()
        return self.variant(
            network,
            call,
            condition=self.prepared,
            around=lambda network: contextlib.nullcontext(tables),
        )

    def graph(self, network, condition):
        """The variant as a CUDA graph, which the first call captures."""
        captured = []

        def call(network, layout, *inputs):
            if not captured:
                captured.append(spade_fast.Graphed(network, layout, *inputs))
            return captured[0](layout, *inputs)

        return self.variant(network, call, condition=condition)

    def prepared(self, segmap):
        """The layout of this round's scene. Its windows stay numbered after the first call."""
        if self.scene() not in self.layouts:
            self.layouts[self.scene()] = SemanticLayout.from_segmap(segmap)
        return self.layouts[self.scene()]

    def segmaps_in(self, dtype, layout):
        """The scenes' segmaps in a dtype, or their own, and a memory format; converted once."""
        if (dtype, layout) not in self.converted:
            self.converted[dtype, layout] = [
                _like(tensor, dtype=dtype, layout=layout) for tensor in self.segmaps
            ]
        return self.converted[dtype, layout]

    def scene(self):
        """The number of this round's scene."""
        return self.problem.scene % len(self.segmaps)


def _gradient_of(y):
    """A gradient for y, zero where y is zero: there a final activation's derivative may jump."""
    return torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape) * y.detach()


@torch.no_grad()
def settle(network):
    """Lets spectral norm's power iteration converge, as in a trained network: with its initial
    random vectors, σ is about zero.
    """
    for module in network.modules():
        for _ in range(20 if hasattr(module, "weight_orig") else 0):
            module(module.weight_orig.new_zeros(1, module.in_channels, 1, 1))
    return network


def _set_mode(network, mode):
    """Sets inference, or training without spectral norm's power iteration, whose gradient
    torch.compile gets wrong (torch 2.13).
    """
    network.train(mode == BACKWARD)
    for module in network.modules():
        if hasattr(module, "weight_orig"):
            module.eval()
    return network


def _like(tensor, device=None, dtype=None, layout=torch.contiguous_format):
    """A leaf with a tensor's values, on a device, in a dtype and in a memory format, of which
    channels-last is for maps and volumes alone.
    """
    if layout is torch.channels_last:
        layout = FORMATS.get(tensor.dim(), torch.contiguous_format)
    copied = tensor.detach().to(device=device or tensor.device, dtype=dtype)
    return copied.contiguous(memory_format=layout).requires_grad_(tensor.requires_grad)


def flat(results):
    """The tensors in nested lists of results."""
    return (
        [tensor for part in results for tensor in flat(part)]
        if isinstance(results, (list, tuple))
        else [results]
    )


def without_spade(network, norm):
    """A copy of a network with norm(x) in place of every SPADE: the same convolutions with the same
    weights, no γ and no β.
    """
    bare = copy.deepcopy(network)
    for module in list(bare.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, reference.SPADE):
                setattr(module, name, Instead(norm))
    return bare


class Instead(nn.Module):
    """norm(x), in place of SPADE(x, segmap)."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, segmap):
        return self.norm(x)
