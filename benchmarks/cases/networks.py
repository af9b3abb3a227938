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
    inputs, segmaps = (
        [_like(tensor, settings.device, settings.dtype) for tensor in tensors]
        for tensors in (inputs, segmaps)
    )
    dy = None

    def variant(
        network,
        inputs,
        segmaps,
        call=call,
        layout=torch.contiguous_format,
        compile=False,
        prepared=False,
        frozen=False,
        keeps_tables=False,
    ):
        if layout is torch.channels_last:
            for parameter in network.parameters():
                parameter.data = _like(parameter.data, layout=layout)
        inputs, segmaps = (
            [_like(tensor, layout=layout) for tensor in tensors] for tensors in (inputs, segmaps)
        )
        wanted = dict(network.named_parameters()) | {
            f"input{i}": tensor for i, tensor in enumerate(inputs) if tensor.requires_grad
        }
        forward = (
            torch.compile(network, dynamic=False, mode=settings.compile_mode)
            if compile
            else network
        )
        tables = spade_fast.frozen(network, max_bytes=8 << 30) if frozen else None
        if frozen:
            tables.__enter__()  # stays open while `run`, which refers to it, exists

        def outputs():
            segmap = segmaps[problem.scene % len(segmaps)]
            # Each view is a new tensor, so finding its windows is measured, as for a new layout.
            segmap = prepared_layout() if prepared else segmap.view_as(segmap)
            with spade_fast.frozen(network) if keeps_tables else contextlib.nullcontext():
                return flat(call(forward, segmap, *inputs))

        def run(tables=tables):
            nonlocal dy
            y = outputs()
            if (
                dy is None
            ):  # zero where y is zero: there the derivative of a final activation may jump
                dy = [
                    torch.cos(torch.arange(part.numel(), device=part.device)).view(part.shape)
                    * part.detach()
                    for part in y
                ]
            return results_of(
                y, wanted, [gradient.to(part.dtype) for gradient, part in zip(dy, y)], mode
            )

        if counts_kept and mode == BACKWARD:
            setattr(run, "outputs", outputs)
        return run

    @functools.cache
    def layout_of_scene(number):
        return SemanticLayout.from_segmap(segmaps[number])

    def prepared_layout():
        """The layout of this round's scene. Its windows stay numbered after the first call."""
        return layout_of_scene(problem.scene % len(segmaps))

    def new_layout():
        return SemanticLayout.from_segmap(segmaps[problem.scene % len(segmaps)])

    def graph(layout):
        captured = []

        def through_graph(network, segmap, *inputs):
            condition = layout()
            if not captured:
                captured.append(spade_fast.Graphed(network, condition, *inputs))
            return captured[0](condition, *inputs)

        return variant(ours, inputs, segmaps, through_graph)

    def frozen(fold):
        own = fold(copy.deepcopy(ours))
        return variant(own, inputs, segmaps, our_call, prepared=True, frozen=True)

    def without_spades(kind, layout):
        return variant(without_spade(eager, BARE[kind]), inputs, segmaps, bare_call, layout=layout)

    makers = {
        "eager": lambda: variant(eager, inputs, segmaps),
        "torch.compile": lambda: variant(copy.deepcopy(eager), inputs, segmaps, compile=True),
        "spade_fast": lambda: variant(ours, inputs, segmaps, our_call, keeps_tables=keeps_tables),
    }
    if settings.device != "cpu" and segmaps[0].dim() == 4:  # a GPU's tensor cores work in it
        ours = ours.to(memory_format=torch.channels_last)
        makers["eager, channels-last"] = lambda: variant(
            copy.deepcopy(eager), inputs, segmaps, layout=torch.channels_last
        )
    if takes_layouts:
        makers["spade_fast, prepared"] = lambda: variant(
            ours, inputs, segmaps, our_call, prepared=True
        )
    is_spectral = any(hasattr(module, "weight_orig") for module in eager.modules())
    if takes_layouts and bare and mode == FORWARD:
        makers["spade_fast, frozen"] = lambda: frozen(lambda network: network)
        if is_spectral:
            makers["spade_fast, folded, frozen"] = lambda: frozen(spade_fast.fold_spectral_norm)
    if graphed:
        makers["spade_fast, graph"] = lambda: graph(new_layout)
        makers["spade_fast, graph, prepared"] = lambda: graph(prepared_layout)
    for kind in bare:
        for memory, layout in MEMORIES.items():
            make = functools.partial(without_spades, kind, layout)
            makers[f"{kind}, {memory}"] = make
    variants = settings.wanted(makers)
    eager_channels_last = copy.deepcopy(eager)

    def jittered(number):
        # Alternately in channels-last, where PyTorch's convolutions round five times as much.
        segmap = segmaps[problem.scene % len(segmaps)]
        kinds = [(eager, torch.contiguous_format), (eager_channels_last, torch.channels_last)]
        network, layout = kinds[number % 2]
        return variant(
            network, [jitter(tensor) for tensor in inputs], [jitter(segmap)], layout=layout
        )()

    in_double = [
        [_like(tensor, dtype=torch.float64) for tensor in tensors] for tensors in (inputs, segmaps)
    ]
    ours_in_double = variant(ours_in_double, *in_double, our_call, keeps_tables=keeps_tables)
    problem = Problem(
        name,
        mode,
        variants,
        variant(exact, *in_double),
        jittered,
        ours_in_double,
        segmaps,
        folding=tuple(name for name in variants if is_spectral and name.endswith("frozen")),
    )
    return problem


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
