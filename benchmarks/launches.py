"""A GPU's launches and allocations, and the host's waits for it, counted without a GPU.

Everything runs on the CPU, with the layout's true values, while each tensor reports that it is on a
GPU. A TorchFunctionMode intercepts the queries, so that the package takes the code paths of a GPU,
and a TorchDispatchMode counts the operators, including those of backward. An operator of PyTorch
counts as the number of launches in its CUDA implementation (KERNELS; one by default), a view as
none, and an operator of this package as its launches in csrc/cuda. Operators from floating-point to
floating-point tensors are not computed, because no count depends on their results.

A wait is where the host needs a value from the device, or copies pageable memory to it. Bytes are
those that operators return in new memory; workspaces are not counted. Tensors created on the host
inside a counted call count as the device's.

predictions.py makes times of the counts, which are printed beside them.
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
from rich.table import Table
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import spade_fast
from spade_fast import SemanticLayout, kernels, reference
from spade_fast.graphs import with_room, write_over
from spade_fast.kernels import contract, cuda_backend, numbering

from . import predictions
from .cases.networks import COCO_NORM
from .cases.problem import Settings
from .cases.scenes import conditions
from .predictions import Work
from .tables import narrow_table

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
DTYPE = torch.bfloat16


class Limit(NamedTuple):
    """The most launches and waits that a path may have."""

    launches: int
    waits: int


# Limits of the paths below. A change that lowers a count lowers its limit here, too.
LIMITS = {
    "from_segmap": Limit(8, 1),
    "numbering, six sizes": Limit(11, 1),
    "numbering, into a graph's memory": Limit(26, 1),
    "layer": Limit(7, 0),
    "layer, training": Limit(29, 0),
    "block": Limit(34, 0),
    "generator, new layout": Limit(242, 2),
    "generator, windows known": Limit(221, 0),
    "generator, frozen": Limit(95, 0),
    "generator, folded, frozen": Limit(77, 0),
    "generator, training": Limit(1103, 0),
    "discriminator, new layout": Limit(140, 3),
    "discriminator, windows known": Limit(83, 0),
    "training step, windows known": Limit(1419, 0),
}

# Launches of PyTorch's operators, by names without overloads; one if not listed.
KERNELS = {
    "sort": 12,  # a radix sort of integers: histogram, eight passes, the order
    "cumsum": 2,
    "cummax": 2,
    "_unique2": 16,
    "nonzero": 3,
    "bincount": 4,
    "convolution": 2,  # with a conversion of weights or images to cuDNN's memory format
    "convolution_backward": 4,
    "constant_pad_nd": 2,  # fills, then copies
    "native_batch_norm": 2,
    "equal": 2,
}
# Launches of this package's operators, dense and with a table; one if not listed.
OWN = {
    "plane_moments": (2, 2),
    "instance_forward": (1, 1),
    "backward_sums": (2, 6),
    "instance_backward": (3, 7),
    "sum_lists": (2, 2),
}
# Launches of the operators that number, including copies and fills, for the calls of the paths
# below: test_cuda.py runs the kernels and counts. Others may have another number of passes in their
# sort.
NUMBERING = {"find_codes": 5, "find_windows": 11, "find_patches": 8}
UNREAD = {
    "running_planes",
    "batch_planes",
    "batch_terms",
}  # operators that read no element of their first argument
WAITS = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "unique_dim", "bincount"}
WAITS |= {"masked_select", "repeat_interleave"}
UPLOADS = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor}
DOWNLOADS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}


@dataclass
class Counts:
    """The counts of one call."""

    launches: int = 0
    waits: int = 0
    allocations: int = 0
    bytes: int = 0
    operators: Counter = field(default_factory=Counter)
    work: list[Work] = field(default_factory=list)

    def launch(self, name: str, number: int = 1, moved: int = 0, operations: int = 0) -> None:
        """Counts an operator. moved: bytes of its tensors and results."""
        self.launches += number
        self.operators[name] += number
        self.work.append(Work(name, number, moved, operations))


class OnGPU(TorchFunctionMode):
    """Inside, every tensor reports that it is on a GPU, and new tensors for a GPU are created on
    the host.
    """

    ANSWERS = {
        torch.Tensor.device.__get__: GPU,
        torch.Tensor.is_cuda.__get__: True,
        torch.Tensor.is_cpu.__get__: False,
        torch.Tensor.get_device: 0,
    }

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, classes, arguments=(), named=None):
        if function in self.ANSWERS:
            return self.ANSWERS[function]
        if function is torch.Tensor.cuda:
            return arguments[0]
        if function in UPLOADS:
            self.counts.waits += 1
            self.counts.launch("copy to the device")
        elif function in DOWNLOADS:
            self.counts.waits += 1
            self.counts.launch("copy to the host")
        named = {name: on_host(value) for name, value in (named or {}).items()}
        return function(*map(on_host, arguments), **named)


def on_host(value):
    """Replaces a GPU by the host, where the tensors really are. Other values are unchanged."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return HOST
    return value


class Counting(TorchDispatchMode):
    """Counts the launches, waits and allocations of operators."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, operator, classes, arguments=(), named=None):
        space, _, name = operator._schema.name.partition("::")
        own, named = space.startswith("spade_fast"), named or {}
        if decides_nothing(operator, name, own, tensors_in((arguments, named))):
            results = only_allocated(operator, arguments, named)
        else:
            results = operator(*arguments, **named)
        self.counts.waits += name in WAITS
        given = {memory(tensor) for tensor in tensors_in((arguments, named))}
        made = {memory(tensor): tensor for tensor in tensors_in(results)}
        new = [tensor for key, tensor in made.items() if key not in given and tensor.nbytes]
        self.counts.allocations += len(new)
        self.counts.bytes += sum(tensor.untyped_storage().nbytes() for tensor in new)
        is_view = not new and not operator._schema.is_mutable
        moved = bytes_of((arguments[name in UNREAD :], named, results))
        operations = operations_of(operator, arguments, named, results)
        if own:
            launches = own_launches(operator, name, arguments)
            self.counts.launch(f"{space}::{name}", launches, moved, operations)
        elif name not in FREE and not (is_view and name not in WAITS):
            self.counts.launch(name, KERNELS.get(name, 1), moved, operations)
        return results


def bytes_of(values):
    """The bytes of all distinct tensors."""
    distinct = {id(tensor): tensor for tensor in tensors_in(values)}
    return sum(tensor.nbytes for tensor in distinct.values())


def operations_of(operator, arguments, named, results):
    """The operations of multiplying matrices, none for other operators."""
    formula = flop_counter.flop_registry.get(operator.overloadpacket)
    with OnGPU(Counts()):  # a formula may depend on the device
        return 0 if formula is None else formula(*arguments, **named, out_val=results)


def own_launches(operator, name, arguments):
    """The number of launches of an operator of this package."""
    dense, table = OWN.get(name, (1, 1))
    given = dict(zip((argument.name for argument in operator._schema.arguments), arguments))
    if name == "convolve_windows":
        return 2  # the weights are first copied to the kernel's order
    return dense if given.get("index") is None else table


def decides_nothing(operator, name, own, tensors):
    """Whether no count can depend on an operator's results: kernels of the modulation, and
    operators from floating-point to floating-point tensors.
    """
    if own:
        return name in contract.OPERATIONS
    of_floats = tensors and all(tensor.is_floating_point() for tensor in tensors)
    schema = operator._schema
    changes_or_views = schema.is_mutable or any(result.alias_info for result in schema.returns)
    return of_floats and not changes_or_views and name not in WAITS


def only_allocated(operator, arguments, named):
    """An operator's results, allocated but not computed."""
    shapes = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (arguments, named))
    results = operator(*shapes[0], **shapes[1])
    together = operator._schema.name.startswith("aten::convolution") and any(
        map(contract.is_channels_last, tensors_in(arguments))
    )
    return tree_map_only(torch.Tensor, functools.partial(allocated, together), results)


def allocated(together, shape):
    """Memory for a tensor of the meta device. Integers are zeros, because they may be indices.

    together: the result is channels-last, as cuDNN's convolution of a channels-last tensor is and
        that of the meta device is not.
    """
    kind = {"memory_format": torch.channels_last} if together and shape.dim() == 4 else {}
    memory = torch.empty_like(shape, device=HOST, **kind)
    return memory if memory.is_floating_point() else memory.zero_()


def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage()._cdata


def stand_in(counts: Counts) -> contract.Backend:
    """The CUDA backend, whose operators the CPU implements, too. The operators that number have no
    CPU implementation; functions that find the same and count replace them.
    """
    numbers = {name: functools.partial(numbered, counts, name) for name in NUMBERING}
    return replace(cuda_backend.BACKEND, why_not=lambda x=None, gamma=None: None, **numbers)


def numbered(counts, name, *arguments):
    """Replaces an operator of csrc/cuda/numbering.cpp, and counts its launches and its one wait,
    for the size of its results.
    """
    counts.waits += 1
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        results = getattr(numbering, name)(*arguments)
        moved = bytes_of((arguments, results))
    counts.launch(f"spade_fast::{name}", NUMBERING[name], moved)
    return results


@contextmanager
def on_gpu(counts: Counts) -> Iterator[None]:
    """Inside, calls are counted."""
    with (
        mock.patch.object(kernels, "BEST_FIRST", (stand_in(counts),)),
        # The counting modes keep no tensors, so results may be overwritten.
        mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True),
        mock.patch.object(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=0)),
        OnGPU(counts),
        Counting(counts),
    ):
        yield


def count(call: Callable[[], object]) -> Counts:
    """The counts of a call."""
    counts = Counts()
    with on_gpu(counts):
        call()
    return counts


class Networks:
    """The published networks for COCO at 256², and their inputs for one scene, in bfloat16."""

    def __init__(self) -> None:
        (segmap,) = conditions(Settings())
        self.segmap = segmap.to(DTYPE)
        self.generator = in_inference(spade_fast.SPADEGenerator.official("coco"))
        self.discriminator = in_inference(spade_fast.MultiscaleDiscriminator(187, 2))
        self.layer = in_inference(spade_fast.SPADE(128, 184))
        self.block = in_inference(spade_fast.SPADEResnetBlock(128, 64, COCO_NORM, 184))
        self.eager = in_inference(reference.SPADEGenerator(184, crop_size=256, norm_G=COCO_NORM))
        self.images = torch.zeros(2, 3, 256, 256, dtype=DTYPE)
        self.x = torch.zeros(1, 128, 256, 256, dtype=DTYPE)
        self.x = self.x.to(memory_format=torch.channels_last)

    def found(self) -> SemanticLayout:
        """A new layout of the scene, whose windows are not numbered yet."""
        return SemanticLayout.from_segmap(self.segmap)

    @functools.cached_property
    def layout(self) -> SemanticLayout:
        """A layout of the scene, prepared at all sizes of the generator."""
        return self.found().prepare(self.generator.sizes, 3)


def in_inference(network: nn.Module) -> nn.Module:
    return network.eval().to(DTYPE)


def numbering_windows(networks, stack):
    layout = networks.found()
    return lambda: layout.prepare(networks.generator.sizes, 3)


def numbering_for_graph(networks, stack):
    room, layout = with_room(networks.layout, 1.5), networks.found()
    return lambda: write_over(room, layout)


def generator_known(networks, stack):
    networks.generator(networks.layout)
    return lambda: networks.generator(networks.layout)


def generator_frozen(networks, stack):
    stack.enter_context(spade_fast.frozen(networks.generator))
    return generator_known(networks, stack)


def generator_folded(networks, stack):
    generator = spade_fast.fold_spectral_norm(copy.deepcopy(networks.generator))
    stack.enter_context(spade_fast.frozen(generator))
    generator(networks.layout)
    return lambda: generator(networks.layout)


def discriminator_new(networks, stack):
    layout = networks.found()
    return lambda: networks.discriminator(networks.images, layout)


def discriminator_known(networks, stack):
    networks.discriminator(networks.images, networks.layout)
    return lambda: networks.discriminator(networks.images, networks.layout)


def layer_trained(networks, stack):
    """Forward and backward of a layer: the gradients of its weights and of x."""
    x = networks.x.clone().requires_grad_()
    wanted = [x, *networks.layer.parameters()]

    def step():
        with torch.enable_grad():
            torch.autograd.grad(networks.layer(x, networks.layout).sum(), wanted)

    return step


def generator_trained(networks, stack):
    """Forward and backward of the generator: the gradients of its weights."""
    generator = networks.generator
    stack.callback(generator.train().eval)
    weights = list(generator.parameters())

    def step():
        with torch.enable_grad():
            torch.autograd.grad(generator(networks.layout).sum(), weights)

    return step


def training_step(networks, stack):
    """Gradients of both networks' weights from the discriminator's results for both images."""
    generator, discriminator = networks.generator, networks.discriminator
    discriminator(networks.images, networks.layout)
    weights = [*generator.parameters(), *discriminator.parameters()]
    for network in (generator, discriminator):
        stack.callback(network.train().eval)

    def step():
        with torch.enable_grad():
            images = torch.cat([generator(networks.layout), networks.images[:1]])
            results = tree_leaves(discriminator(images, networks.layout))
            torch.autograd.grad(sum(result.mean() for result in results), weights)

    return step


# Functions that prepare a call and return it; only the call itself is counted. They take the
# networks, and an ExitStack for cleaning up afterwards.
PATHS = {
    "from_segmap": lambda networks, stack: networks.found,
    "numbering, six sizes": numbering_windows,
    "numbering, into a graph's memory": numbering_for_graph,
    "layer": lambda networks, stack: lambda: networks.layer(networks.x, networks.layout),
    "layer, training": layer_trained,
    "block": lambda networks, stack: lambda: networks.block(networks.x, networks.layout),
    "generator, new layout": lambda networks, stack: (
        lambda: networks.generator(networks.segmap.view_as(networks.segmap))
    ),
    "generator, windows known": generator_known,
    "generator, frozen": generator_frozen,
    "generator, folded, frozen": generator_folded,
    "generator, training": generator_trained,
    "generator, eager": lambda networks, stack: lambda: networks.eager(networks.segmap),
    "discriminator, new layout": discriminator_new,
    "discriminator, windows known": discriminator_known,
    "training step, windows known": training_step,
}


@torch.no_grad()
def count_all(names: Iterable[str] = PATHS) -> dict[str, Counts]:
    """The counts of each path, by its name."""
    networks, found = Networks(), {}
    for name in names:
        with ExitStack() as stack:
            with on_gpu(Counts()):
                _ = networks.layout  # created here, where it is not counted
                call = PATHS[name](networks, stack)
            found[name] = count(call)
    return found


def table(found: dict[str, Counts]) -> Table:
    """Counts beside their limits."""
    columns = ("launches", "at most", "waits", "at most", "allo-\ncations", "MiB")
    shown = narrow_table("one call", *columns)
    for name, counts in found.items():
        limit = LIMITS.get(name, Limit(None, None))  # eager has no limit
        shown.add_row(
            name,
            marked(counts.launches, limit.launches),
            "–" if limit.launches is None else str(limit.launches),
            marked(counts.waits, limit.waits),
            "–" if limit.waits is None else str(limit.waits),
            str(counts.allocations),
            f"{counts.bytes / 2**20:.0f}",
        )
    return shown


CAPTION = (
    "COCO at 256², one scene, bfloat16. launches: kernels and copies. waits: how often the host"
    " waits for the device. at most: the limit."
)


# Paths whose work is part of the model of predicted times, whichever are printed.
CALIBRATING = (predictions.KNOWN, predictions.FOLDED)


def predicted(everything: dict[str, Counts], names: list[str]) -> tuple[Table, Table, str]:
    """The tables of predicted times of the paths with these names, and a caption."""
    constants, shown = model(everything), {name: everything[name].work for name in names}
    return (
        predictions.table(constants, shown),
        predictions.table_of_operators(constants, shown),
        predictions.caption(constants),
    )


def model(everything: dict[str, Counts]) -> predictions.Model:
    """The model of predicted times, for the counts of at least the paths of CALIBRATING."""
    return predictions.Model.measured(*(everything[name].work for name in CALIBRATING))


def marked(number, limit):
    return str(number) if limit is None or number <= limit else f"[red]{number}"


def excesses(found: dict[str, Counts]) -> list[str]:
    """A sentence for each count above its limit."""
    return [
        f"{name}: {number} {what}, the limit is {limit}"
        for name, counts in found.items()
        if name in LIMITS
        for what, number, limit in (
            ("launches", counts.launches, LIMITS[name].launches),
            ("waits", counts.waits, LIMITS[name].waits),
        )
        if number > limit
    ]
