"""What is measured: the modulation, the residual blocks and the generator, each beside its rivals and its floor.

A problem has variants, functions that each compute the same thing once and return it by name, and a truth in float64. The floor
is what the same network costs with plain instance norm and leaky ReLU in place of every SPADE: the least that anyone can hope for.
"""

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import spade_fast
from spade_fast import SemanticLayout, reference

from . import layouts

FORWARD, BACKWARD = "forward", "forward+backward"
# (channels, size) of the 18 SPADEs of the published COCO generator at 256², and of LivePortrait's decoder.
COCO_SHAPES = [(1024, 8), (1024, 16), (1024, 32), (512, 32), (512, 64), (256, 64), (256, 128), (128, 128), (128, 256), (64, 256)]
LIVEPORTRAIT_SHAPES = [(512, 64), (512, 128), (256, 128), (256, 256), (64, 256)]
# (fin, fout, size) of the COCO generator's blocks.
COCO_BLOCKS = [(1024, 1024, 8), (1024, 1024, 16), (1024, 512, 32), (512, 256, 64), (256, 128, 128), (128, 64, 256)]
COCO_NORM = "spectralspadesyncbatch3x3"


@dataclass
class Problem:
    """One row group of the table."""

    name: str
    mode: str  # FORWARD or BACKWARD
    variants: dict[str, Callable]  # "eager" among them; those called "floor…" compute something else and are not checked
    truth: Callable
    jittered: Callable  # eager, from inputs that differ by a rounding, for the number of the run
    in_double: Callable | None = None  # ours in float64, where no rounding hides a mistake
    scenes: list = field(default_factory=lambda: [None])  # each round measures the next one, each is checked
    scene: int = 0  # which of them the functions compute now
    least_bytes: int | None = None  # that the operation has to read and write, every input and output once


@dataclass
class Settings:
    """What the command line says."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    labels: str | None = None
    instances: str | None = None
    scenes: int = 1
    batch: int = 1  # of `modulate`


def modulate(settings):
    """spade_modulate on the shapes of the published generators, both memory layouts, with the leaky ReLU that follows."""
    shapes = [(64, 32)] if settings.quick else dict.fromkeys(COCO_SHAPES + LIVEPORTRAIT_SHAPES)
    for channels, size in shapes:
        for layout in (torch.contiguous_format, torch.channels_last):
            for mode in (FORWARD, BACKWARD):
                yield _modulate_problem(settings, channels, size, layout, mode)


def _modulate_problem(settings, channels, size, layout, mode):
    def tensor():
        values = torch.randn(settings.batch, channels, size, size, device=settings.device).to(settings.dtype)
        return values.to(memory_format=layout).requires_grad_(mode == BACKWARD)

    inputs, dy = {"x": tensor(), "gamma": tensor(), "beta": tensor()}, tensor().detach()

    def floor(x, gamma, beta, activation):
        return F.leaky_relu(F.instance_norm(x), 0.2)

    def variant(function, inputs, dy, names=("x", "gamma", "beta")):
        def run():
            y = function(**inputs, activation="leaky_relu")
            return _outputs(y, {name: inputs[name] for name in names}, dy, mode)

        return run

    exact = {name: value.detach().double().requires_grad_(mode == BACKWARD) for name, value in inputs.items()}
    # Forward reads x, γ, β and writes y; backward reads dy, x, γ and writes dx, dγ, dβ; both have a bit an element for the leaky ReLU.
    streams, bits = (4, 0) if mode == FORWARD else (10, 2)
    least_bytes = dy.numel() * streams * dy.element_size() + dy.numel() * bits // 8
    return Problem(
        f"{channels} × {size}² {'channels-last' if layout is torch.channels_last else 'contiguous'}",
        mode,
        {
            "eager": variant(reference.spade_modulate, inputs, dy),
            "torch.compile": variant(_compiled(reference.spade_modulate), inputs, dy),
            "spade_fast": variant(spade_fast.spade_modulate, inputs, dy),
            "floor": variant(floor, inputs, dy, ["x"]),
        },
        variant(reference.spade_modulate, exact, dy.double()),
        lambda number: variant(reference.spade_modulate, {name: jitter(value) for name, value in inputs.items()}, dy)(),
        least_bytes=least_bytes,
    )


def layer(settings):
    """One SPADE at every pixel, at every distinct window, and as it chooses: where windows pay, and what finding out costs."""
    shapes = [(64, 32)] if settings.quick else [(1024, 8), (1024, 16), (1024, 32), (512, 32), (512, 64), (256, 128), (64, 256)]
    scene = SemanticLayout.from_segmap(next(conditions(settings)))
    for channels, size in shapes:
        pixels = (1, size, size)
        noise = SemanticLayout.from_labels(torch.randint(183, pixels), 183, torch.randint(2, pixels)).to_segmap()
        scene_here = scene.resize(pixels[1:]).to_segmap()
        for name, segmap in {"scene": scene_here, "noise": noise, "dense features": torch.randn(1, 184, size, size)}.items():
            for mode in (FORWARD, BACKWARD):
                yield _layer_problem(settings, channels, size, name, segmap, mode)


def _layer_problem(settings, channels, size, name, segmap, mode):
    torch.manual_seed(0)
    eager, ours = reference.SPADE(channels, 184), spade_fast.SPADE(channels, 184)
    ours.load_state_dict(eager.state_dict())
    exact = copy.deepcopy(eager).double()
    x, dy = torch.randn(1, channels, size, size), torch.randn(1, channels, size, size)
    x, dy, segmap = (tensor.to(settings.device, settings.dtype) for tensor in (x, dy, segmap))

    def variant(module, x, segmap, windows="auto", fresh=False):
        module = module.to(settings.device)
        x = x.detach().requires_grad_(mode == BACKWARD)

        def run():  # a view is another tensor each time: nothing is known of it
            with spade_fast.window_mode(windows):
                y = module(x, segmap.view_as(segmap) if fresh else segmap)
            return _outputs(y, {"x": x} | dict(module.named_parameters()), dy.to(x.dtype), mode)

        return run

    eager, ours = eager.to(settings.dtype), ours.to(settings.dtype)
    return Problem(
        f"{channels} at {size}², {name}",
        mode,
        {
            "eager": variant(eager, x, segmap),
            "spade_fast, pixels": variant(ours, x, segmap, "never"),
            "spade_fast, windows": variant(ours, x, segmap, "always"),
            "spade_fast, by itself": variant(ours, x, segmap),
            "spade_fast, new condition": variant(ours, x, segmap, fresh=True),
        },
        variant(exact, x.double(), segmap.double()),
        lambda number: variant(eager, jitter(x), jitter(segmap))(),
    )


def block(settings):
    """The residual blocks of the published COCO generator, with a COCO-Stuff layout at 256² as their condition."""
    segmaps = list(conditions(settings))
    for fin, fout, size in [(128, 64, 64)] if settings.quick else COCO_BLOCKS:
        for mode in (FORWARD, BACKWARD):
            def make(block_type, fin=fin, fout=fout):
                return block_type(fin, fout, COCO_NORM, 184)

            x, dy = torch.randn(1, fin, size, size), torch.randn(1, fout, size, size)
            yield _network_problem(settings, f"{fin} → {fout} at {size}²", mode, make, (x,), dy, segmaps)


def generator(settings):
    """The published COCO generator at 256², wired as published, from each kind of block."""
    ngf, size = (8, 64) if settings.quick else (64, 256)

    def make(block_type):
        return reference.SPADEGenerator(184, ngf, crop_size=size, norm_G=COCO_NORM, block=block_type)

    segmaps = list(conditions(settings))
    for mode in (FORWARD, BACKWARD):
        yield _network_problem(settings, f"COCO {size}²", mode, make, (), torch.randn(1, 3, size, size), segmaps)


def converted(settings):
    """Models of others, and what `spade_fast.convert` makes of them: the published generator, MONAI's for volumes and its diffusion."""
    segmaps = list(conditions(settings))
    generator = settle(reference.SPADEGenerator(184, 8 if settings.quick else 64, crop_size=segmaps[0].shape[-1], norm_G=COCO_NORM))
    for mode in (FORWARD, BACKWARD):
        yield _converted_problem(settings, f"COCO {segmaps[0].shape[-1]}²", mode, generator, segmaps)
    decoder = settle(FaceDecoder(*((16, 8, 8) if settings.quick else (512, 256, 64))))
    features = [torch.randn(1, decoder.fc.in_channels, *[8 if settings.quick else 64] * 2) for _ in range(settings.scenes)]
    for mode in (FORWARD, BACKWARD):
        yield _converted_problem(settings, "LivePortrait's decoder", mode, decoder, features)
    nets, schedulers = _monai()
    size, channels, steps = (32, (8, 16), 2) if settings.quick else (96, (16, 32, 64), 50)
    torch.manual_seed(0)
    volumes = [SemanticLayout.from_labels(layouts.draw_volume(number, size)[None], 8).to_segmap() for number in range(settings.scenes)]
    network, z = nets.SPADENet(3, 1, 1, 8, [size] * 3, list(channels), 16, False), (torch.randn(1, 16),)
    for mode in (FORWARD, BACKWARD):
        yield _converted_problem(settings, f"MONAI SPADENet {size}³", mode, network, volumes, lambda model, segmap, z: model(segmap, z), z)

    scheduler = schedulers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)

    def sample(model, segmap, image):
        for step in scheduler.timesteps.to(image.device):
            image, _ = scheduler.step(model(image, step[None], segmap), step, image)
        return image

    size, channels = (16, (8, 16)) if settings.quick else (64, (64, 128, 256))
    labels = [torch.as_tensor(layouts.resized(*layouts.draw_scene(number), (size, size))[0])[None].long() % 8
              for number in range(settings.scenes)]
    segmaps = [SemanticLayout.from_labels(label, 8).to_segmap() for label in labels]
    network = nets.SPADEDiffusionModelUNet(2, 3, 3, 8, (2,) * len(channels), channels, (*[False] * (len(channels) - 1), True),
                                           norm_num_groups=8, num_head_channels=channels[-1] // 4)
    for parameter in network.parameters():
        if not parameter.any():  # its last convolutions begin with zeros
            nn.init.normal_(parameter, std=0.01)
    yield _converted_problem(settings, f"MONAI diffusion UNet {size}², {steps} steps", FORWARD, network, segmaps, sample,
                             (torch.randn(1, 3, size, size),), frozen=True)


def _monai():
    try:
        from monai.networks import nets, schedulers
    except ImportError as error:
        raise ModuleNotFoundError(f"the case converted needs MONAI: pip install monai einops ({error})") from error
    return nets, schedulers


def _converted_problem(settings, name, mode, network, segmaps, call=lambda model, segmap: model(segmap), inputs=(), frozen=False):
    """call(model, segmap, *inputs) is what is measured, of each scene's segmap in turn; frozen: tables are kept inside of each call."""
    network = _set_mode(network, mode)
    ours, exact = copy.deepcopy(network), copy.deepcopy(network).double()
    spade_fast.convert(ours)
    *inputs, = (tensor.to(settings.device, settings.dtype) for tensor in inputs)
    segmaps = [segmap.to(settings.device, settings.dtype) for segmap in segmaps]
    name += f", {len(segmaps)} scenes" if len(segmaps) > 1 else ""

    def variant(model, segmaps, inputs, compile=False, freeze=False):
        model = model.to(settings.device)
        wanted, forward = dict(model.named_parameters()), torch.compile(model, dynamic=False) if compile else model
        dy = None

        def run():
            nonlocal dy
            segmap = segmaps[problem.scene % len(segmaps)]
            with spade_fast.frozen(model) if freeze else contextlib.nullcontext():
                y = call(forward, segmap.view_as(segmap), *inputs)  # a view is another tensor each time: nothing is known of it
            y = y[0] if isinstance(y, tuple) else y
            dy = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape) if dy is None else dy
            return _outputs(y, wanted, dy.to(y.dtype), mode)

        return run

    network, ours = network.to(settings.dtype), ours.to(settings.dtype)
    variants = {
        "eager": variant(network, segmaps, inputs),
        "torch.compile": variant(copy.deepcopy(network), segmaps, inputs, compile=True),
        "spade_fast": variant(ours, segmaps, inputs, freeze=frozen),
    }
    in_double = [segmap.double() for segmap in segmaps], [tensor.double() for tensor in inputs]

    def jittered(number):
        segmap = segmaps[problem.scene % len(segmaps)]
        return variant(network, [jitter(segmap)], [jitter(tensor) for tensor in inputs])()

    ours_in_double = variant(copy.deepcopy(ours).double(), *in_double, freeze=frozen)
    problem = Problem(name, mode, variants, variant(exact, *in_double), jittered, ours_in_double, segmaps)
    return problem


def _network_problem(settings, name, mode, make, inputs, dy, segmaps):
    """make(block_type) makes the network; it is called with the inputs and the condition of each scene in turn."""
    torch.manual_seed(0)
    eager, ours = settle(make(reference.SPADEResnetBlock)), make(spade_fast.SPADEResnetBlock)
    ours.load_state_dict(eager.state_dict())
    exact = copy.deepcopy(eager).double()
    *arguments, dy = (tensor.to(settings.device, settings.dtype) for tensor in (*inputs, dy))
    segmaps = [segmap.to(settings.device, settings.dtype) for segmap in segmaps]
    name += f", {len(segmaps)} scenes" if len(segmaps) > 1 else ""

    def variant(network, arguments, segmaps, layout=torch.contiguous_format, compile=False, fresh=False, frozen=False):
        network = _set_mode(network.to(settings.device, memory_format=layout), mode)
        arguments, segmaps = ([tensor.contiguous(memory_format=layout) for tensor in tensors] for tensors in (arguments, segmaps))
        wanted = dict(network.named_parameters())
        if mode == BACKWARD and arguments:  # x, in a network that has one before it
            arguments[0] = wanted["x"] = arguments[0].requires_grad_()
        forward = _compiled(network) if compile else network
        tables = spade_fast.frozen(network, max_bytes=8 << 30) if frozen else None
        if frozen:
            tables.__enter__()  # until nothing refers to it: run does

        def run(tables=tables):
            # A view is another tensor each time: finding its windows is part of what is measured, as for a new layout.
            segmap = segmaps[problem.scene % len(segmaps)]
            return _outputs(forward(*arguments, segmap.view_as(segmap) if fresh else segmap), wanted, dy.to(segmap.dtype), mode)

        return run

    eager, ours = eager.to(settings.dtype), ours.to(settings.dtype)
    floor = settle(make(FloorBlock)).to(settings.dtype)
    eager_channels_last = copy.deepcopy(eager)
    variants = {
        "eager": variant(eager, arguments, segmaps),
        "torch.compile": variant(copy.deepcopy(eager), arguments, segmaps, compile=True),
        "spade_fast": variant(ours, arguments, segmaps, fresh=True),
    }
    if mode == FORWARD:
        variants["spade_fast, frozen"] = variant(copy.deepcopy(ours), arguments, segmaps, frozen=True)
    variants["floor, contiguous"] = variant(floor, arguments, segmaps)
    variants["floor, channels-last"] = variant(copy.deepcopy(floor), arguments, segmaps, torch.channels_last)

    def jittered(number):  # every other time in channels-last, where PyTorch's convolutions have five times the rounding error
        network, layout = [(eager, torch.contiguous_format), (eager_channels_last, torch.channels_last)][number % 2]
        segmap = segmaps[problem.scene % len(segmaps)]
        return variant(network, [jitter(tensor) for tensor in arguments], [jitter(segmap)], layout)()

    in_double = ([tensor.double() for tensor in arguments], [segmap.double() for segmap in segmaps])
    ours_in_double = variant(copy.deepcopy(ours).double(), *in_double)
    problem = Problem(name, mode, variants, variant(exact, *in_double), jittered, ours_in_double, segmaps)
    return problem


def conditions(settings):
    """Of the first scenes of the folder that was named, else of the drawn ones, the condition [1, 184, 256, 256] (or 64²)."""
    if settings.labels is None:
        scenes = map(layouts.draw_scene, range(settings.scenes))
    else:
        scenes = layouts.load_scenes(settings.labels, settings.instances)[: settings.scenes]
    for labels, instances in scenes:
        instances = np.zeros_like(labels) if instances is None else instances
        labels, instances = layouts.resized(labels, instances, (64, 64) if settings.quick else (256, 256))
        yield layouts.condition(labels, instances)


class FaceDecoder(nn.Module):
    """LivePortrait's decoder in its shapes: features [N, 256, 64, 64], which are the condition of every SPADE too, to an image at 512²."""

    def __init__(self, wide, middle, narrow):
        super().__init__()
        self.fc = nn.Conv2d(wide // 2, wide, 3, padding=1)
        pairs = [(wide, wide)] * 6 + [(wide, middle), (middle, narrow)]
        self.blocks = nn.ModuleList(reference.SPADEResnetBlock(*pair, "spadespectralinstance3x3", wide // 2) for pair in pairs)
        self.conv_img = nn.Conv2d(narrow, 12, 3, padding=1)

    def forward(self, features):
        x = self.fc(features)
        for number, block in enumerate(self.blocks):
            x = block(x if number < 6 else F.interpolate(x, scale_factor=2), features)
        return torch.sigmoid(F.pixel_shuffle(self.conv_img(F.leaky_relu(x, 0.2)), 2))


class FloorBlock(reference.SPADEResnetBlock):
    """The block with F.instance_norm and leaky ReLU where the SPADEs are: same convolutions, no condition."""

    def __init__(self, fin, fout, norm_G, label_nc):
        super().__init__(fin, fout, norm_G, label_nc)
        del self.norm_0, self.norm_1
        if self.learned_shortcut:
            del self.norm_s

    def forward(self, x, segmap):
        shortcut = self.conv_s(F.instance_norm(x)) if self.learned_shortcut else x
        dx = self.conv_0(F.leaky_relu(F.instance_norm(x), 0.2))
        return shortcut + self.conv_1(F.leaky_relu(F.instance_norm(dx), 0.2))


def jitter(x):
    """x with elements off by a rounding, or not."""
    rounding = torch.finfo(x.dtype).eps * (torch.rand_like(x) - 0.5)
    return (x.detach() * (1 + rounding)).requires_grad_(x.requires_grad)


@torch.no_grad()
def settle(network):
    """Lets spectral norm's power iteration converge, as it has in any trained network: σ of random vectors is about zero."""
    for module in network.modules():
        for _ in range(20 if hasattr(module, "weight_orig") else 0):
            module(torch.zeros(1, module.in_channels, 1, 1))
    return network


def _set_mode(network, mode):
    """Inference, or training but for spectral norm's power iteration: torch.compile gets its gradient wrong (torch 2.13)."""
    network.train(mode == BACKWARD)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.eval()
    return network


def _compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def _outputs(y, wanted, dy, mode):
    """y, and with BACKWARD the gradients of what is wanted, by name."""
    if mode == FORWARD:
        return {"y": y}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(wanted, gradients)}


CASES = {"modulate": modulate, "layer": layer, "block": block, "generator": generator, "converted": converted}
