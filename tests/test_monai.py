"""`convert` on MONAI's networks from PyPI, whose γ and β are normalised over space, in two and
three dimensions.
"""

import copy

import pytest
import torch
from agree import NETWORK, assert_agree, assert_agree_beside
from label_maps import patches

import spade_fast
from spade_fast import SemanticLayout
from spade_fast.nn import tables as tables_of_windows

pytestmark = pytest.mark.needs("monai", "einops")
LABELS = 4


def spade_net(dims):
    from monai.networks import nets

    return nets.SPADENet(dims, 1, 1, LABELS, [16] * dims, [8, 16], 8, True, 6)


def autoencoder(dims):
    from monai.networks import nets

    return nets.SPADEAutoencoderKL(
        dims, LABELS, 1, 1, (1, 1), (8, 8), (False, False), 2, 4, 1e-6, False, False, 6
    )


def unet(dims):
    from monai.networks import nets

    return nets.SPADEDiffusionModelUNet(
        dims,
        1,
        1,
        LABELS,
        (1, 1),
        (8, 16),
        (False, True),
        4,
        1e-6,
        num_head_channels=4,
        spade_intermediate_channels=6,
    )


NETWORKS = {
    "SPADENet": spade_net,
    "SPADEAutoencoderKL": autoencoder,
    "SPADEDiffusionModelUNet": unet,
}


def arguments(name, dims, batch=2):
    """The network's arguments, and the layout of its condition."""
    layout = SemanticLayout.from_labels(patches((batch, *[16] * dims), LABELS), LABELS)
    image, segmap = (
        torch.randn(batch, 1, *[16] * dims, dtype=torch.float64),
        layout.to_segmap(torch.float64),
    )
    if name == "SPADEDiffusionModelUNet":
        return image, torch.tensor([3, 700][:batch]), segmap
    return (image, segmap) if name == "SPADEAutoencoderKL" else (segmap, image)


def outcome(network, name, inputs):
    torch.manual_seed(1)  # for the latent noise
    y = network(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    wanted = {key: tensor for key, tensor in network.named_parameters() if tensor.requires_grad}
    gradients = torch.autograd.grad(
        y,
        list(wanted.values()),
        torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape),
        allow_unused=True,
    )
    return {"y": y.detach()} | {
        key: tensor for key, tensor in zip(wanted, gradients) if tensor is not None
    }


@pytest.mark.parametrize("mode", ["always", "auto"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_outputs_and_gradients(name, dims, mode):
    torch.manual_seed(0)
    network = NETWORKS[name](dims).double()
    own = copy.deepcopy(network)
    report = spade_fast.convert(network)
    assert report.converted == len(report) > 3, report
    for train in (True, False):
        inputs = arguments(name, dims)
        with spade_fast.window_mode(mode):
            ours = outcome(network.train(train), name, inputs)
        assert_agree_beside(ours, outcome(own.train(train), name, inputs), NETWORK)


def test_a_sampler_computes_its_tables_once(monkeypatch):
    from monai.networks import schedulers

    tables, compute = [], tables_of_windows.compute_table
    monkeypatch.setattr(
        tables_of_windows,
        "compute_table",
        lambda *arguments: tables.append(True) or compute(*arguments),
    )
    torch.manual_seed(0)
    network = unet(2).double().eval()
    own = copy.deepcopy(network)
    layers = spade_fast.convert(network).converted
    tables.clear()  # drops the probes' tables
    scheduler = schedulers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(50)
    noise, _, segmap = arguments("SPADEDiffusionModelUNet", 2, batch=1)

    def sample(model):
        image = noise
        for step in scheduler.timesteps:
            image, _ = scheduler.step(model(image, step[None], segmap), step, image)
        return image

    with torch.no_grad(), spade_fast.frozen(network):
        ours = sample(network)
    assert len(tables) == layers
    with torch.no_grad():
        assert_agree(ours, sample(own))
