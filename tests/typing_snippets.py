"""Users' code for type checkers: `pyright` and `mypy` read this file, and nothing runs it."""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
from typing_extensions import assert_type

import spade_fast
from spade_fast import (
    SPADE,
    BackendStatus,
    ConvEncoder,
    Graphed,
    MultiscaleDiscriminator,
    SemanticLayout,
    Service,
    SPADEGenerator,
    SPADEResBlk,
    SPADEResnetBlock,
    backends,
    checkpoint,
    convert,
    fold_spectral_norm,
    frozen,
    initialise,
    losses,
    plane_moments,
    reparameterize,
    revert,
    spade_modulate,
    use_backend,
    window_mode,
)
from spade_fast.convert import Entry, Report
from spade_fast.generation import generate
from spade_fast.training import Config, Step, Trainer, preset, resume, train


def swap_in(x: torch.Tensor, segmap: torch.Tensor, layout: SemanticLayout) -> None:
    spade = SPADE(64, 184, norm="batch", kernel_size=5)
    assert_type(spade(x, segmap), torch.Tensor)
    assert_type(spade(x, layout, activation="leaky_relu"), torch.Tensor)
    SPADE(64, 184, norm=nn.LayerNorm(8))
    SPADE("spadesyncbatch3x3", 64, 184)
    assert_type(SPADE.from_config("spadeinstance3x3", 64, 184), SPADE)
    block = SPADEResnetBlock(64, 32, "spectralspadesyncbatch3x3", 184)
    assert_type(block(x, layout), torch.Tensor)
    SPADEResnetBlock(64, 32, argparse.Namespace(norm_G="spadebatch3x3", semantic_nc=184))
    assert_type(SPADEResBlk(64, 32, 184)(x, segmap), torch.Tensor)


def refused() -> None:
    """Each line is wrong, and a checker should report it: an unused ignore is an error, too."""
    SPADE(64, 184, norm="layer")  # type: ignore[arg-type]
    SPADE(64)  # type: ignore[call-arg]
    SPADE(64, 184, kernel_size="3")  # type: ignore[arg-type]
    window_mode("sometimes")  # type: ignore[arg-type]
    use_backend(torch)  # type: ignore[arg-type]
    SPADEGenerator.official("coco", num_upsampling_layers="many")  # type: ignore[arg-type]
    convert("model")  # type: ignore[arg-type]
    Config(no_such_setting=1)  # type: ignore[call-arg]


def make_images(segmap: torch.Tensor, layout: SemanticLayout, z: torch.Tensor) -> None:
    generator = SPADEGenerator.official("coco", use_vae=True, crop_size=512)
    assert_type(generator, SPADEGenerator)
    assert_type(initialise(generator), SPADEGenerator)
    assert_type(fold_spectral_norm(generator.eval()), SPADEGenerator)
    assert_type(generator.fold_spectral_norm(), SPADEGenerator)
    assert_type(generator.sizes, list[tuple[int, ...]])
    assert_type(generator(segmap), torch.Tensor)
    assert_type(generator(layout, z), torch.Tensor)
    SPADEGenerator(11, None, 16, stages=[("only", 1, 2)], start=(4, 8), norm_G="spadegroup3x3")
    with torch.no_grad(), frozen(generator) as tables:
        assert_type(tables.bytes, int)
    graphed = Graphed(generator, layout, z)
    assert_type(graphed(layout, z), torch.Tensor)


def train_networks(image: torch.Tensor, layout: SemanticLayout) -> None:
    mu, logvar = ConvEncoder()(image)
    assert_type(reparameterize(mu, logvar), torch.Tensor)
    results = MultiscaleDiscriminator(184 + 3)(image, layout)
    assert_type(results, list[list[torch.Tensor]])
    assert_type(losses.for_generator(results, "hinge"), torch.Tensor)
    fakes, reals = losses.halves(results)
    assert_type(losses.feature_matching(fakes, reals), torch.Tensor)
    assert_type(losses.Perceptual(Path("vgg19.pth"))(image, image), torch.Tensor)


def convert_a_model(model: nn.Module) -> None:
    report = convert(model, probe=False)
    assert_type(report, Report)
    for entry in report:
        assert_type(entry, Entry)
        assert_type(entry.converted, bool)
    assert_type(revert(model), int)


def weights_in_files(folder: Path) -> None:
    network = checkpoint.load(folder / "latest_net_G.pth", key="ema", crop_size=512)
    assert_type(network, nn.Module)
    checkpoint.write(network, folder / "generator.safetensors")
    checkpoint.write(network.state_dict(), "generator.pth")
    weights = checkpoint.read("generator.pth")
    assert_type(weights, dict[str, torch.Tensor])
    assert_type(checkpoint.load_into(SPADEGenerator(184), weights), SPADEGenerator)
    print(checkpoint.describe(weights))


def layouts(labels: torch.Tensor) -> None:
    layout = SemanticLayout.from_labels(labels, 182, instances=labels.numpy(), dont_care=255)
    assert_type(layout, SemanticLayout)
    assert_type(SemanticLayout.from_segmap(layout.to_segmap()), SemanticLayout | None)
    assert_type(SemanticLayout.stack([layout[0], layout[[1, 2]], layout[3:]]), SemanticLayout)
    assert_type(layout.flip(-1).crop((0, 0), (8, 8)).resize([4, 4]).to("cpu"), SemanticLayout)
    windows = layout.windows((16, 16), 3)
    assert_type(windows.index, torch.Tensor)
    assert_type(windows.count, int)


def the_operation(x: torch.Tensor, gamma: torch.Tensor) -> None:
    y = spade_modulate(x, gamma, gamma, norm="group", num_groups=8, activation="silu")
    assert_type(y, torch.Tensor)
    spade_modulate(x, gamma, gamma, norm=None, moments=plane_moments(x), plus_one=False, out=x)
    with use_backend("torch") as scope, window_mode("never"):
        assert_type(scope, use_backend)
    use_backend(None)
    for status in backends(x):
        assert_type(status, BackendStatus)
    print(spade_fast.__version__)


def serve(layout: SemanticLayout) -> None:
    with Service("generator.safetensors", threads=2, cache="1GB", dtype=torch.bfloat16) as service:
        assert_type(service.generate(layout), torch.Tensor)
        assert_type(service.submit(layout).result(), torch.Tensor)


def train_a_run(trainer: Trainer) -> None:
    config = Config(labels="labels", images="images", num_classes=182, out="run", steps=100)
    assert_type(train(config), Path)
    assert_type(resume("run", steps=200), Path)
    Config(**preset("small", out="run"))
    for step in trainer.fit([]):
        assert_type(step, Step)


def generate_from_folders() -> None:
    report = generate("run/generator.safetensors", "labels", Path("out"), samples=2, seed=1)
    print(report.made)
