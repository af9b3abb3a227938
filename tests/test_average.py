"""The moving average of a network, and the network with the averaged weights."""

import copy

import pytest
import torch
import torch.nn as nn
from agree import assert_agree
from torch.nn.utils import parametrizations, spectral_norm
from torch.optim.swa_utils import AveragedModel

from spade_fast import MultiscaleDiscriminator, SPADEGenerator, checkpoint, initialise
from spade_fast.training.average import average, settled


def generator(**arguments):
    settings = {"norm_G": "spectralspadebatch3x3", "nhidden": 4, "ngf": 1} | arguments
    return SPADEGenerator.official(3, crop_size=32, **settings)


def steps(network, averaged, number=3):
    """Takes steps of an optimizer, and updates the average after each."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(number):
        optimizer.zero_grad()
        network(torch.rand(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(network)
    return averaged


def test_numbers():
    """0.75 · 4 + 0.25 · 8 = 5, then 0.75 · 5 + 0.25 · 1 = 4."""
    network = nn.Linear(2, 1)
    averaged = average(network, 0.75)
    for number in (4.0, 8.0, 1.0):
        nn.init.constant_(network.weight, number)
        nn.init.constant_(network.bias, -2 * number)
        averaged.update_parameters(network)
    assert averaged.module.weight.tolist() == [[4.0, 4.0]] and averaged.module.bias.item() == -8.0
    into = nn.Linear(2, 1)
    assert settled(averaged, into) is into and not into.training
    assert into.weight.tolist() == [[4.0, 4.0]] and into.bias.item() == -8.0


def test_numbers_of_buffers():
    """Running means of ones: 0.1, 0.19, 0.271. Averaged: 0.9 · 0.1 + 0.1 · 0.19 = 0.109, then 0.9 ·
    0.109 + 0.1 · 0.271 = 0.1252. Batches are counted, not averaged.
    """
    network = nn.BatchNorm1d(1).double()
    averaged = average(network, 0.9)
    for _ in range(3):
        network(torch.ones(4, 1).double())
        averaged.update_parameters(network)
    assert averaged.module.running_mean.item() == pytest.approx(0.1252, abs=1e-12)
    assert averaged.module.num_batches_tracked.item() == 3
    assert settled(averaged, nn.BatchNorm1d(1).double()).num_batches_tracked.item() == 3


@pytest.mark.parametrize("when", ["new", "after a forward", "after a backward"])
def test_an_average_can_start_at_any_time(when):
    """Even when spectral norm's weight is the result of differentiable operations, whose graph the
    network keeps.
    """
    network = nn.Sequential(spectral_norm(nn.Conv2d(2, 2, 3)))
    loss = network(torch.rand(1, 2, 4, 4)).square().sum() if when != "new" else None
    if when == "after a backward":
        loss.backward(retain_graph=True)
    weight = network[0].weight
    averaged = average(network, 0.5)
    assert network[0].weight is weight
    averaged.update_parameters(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(averaged.module.state_dict()[name], tensor)
    if loss is not None:
        assert weight.grad_fn is not None and loss.backward() is None


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("kind", ["convolution", "transposed", "linear"])
def test_sigma_is_the_largest_singular_value(norm, kind):
    """Even though the averaged vectors are shorter than one and belong to different weights."""
    make = {
        "convolution": lambda: nn.Conv2d(3, 4, 3),
        "transposed": lambda: nn.ConvTranspose2d(3, 4, 3),
        "linear": lambda: nn.Linear(5, 6),
    }[kind]
    network = norm(make())
    averaged = average(network, 0.9)
    for _ in range(20):
        initialise(network, "normal", 1.0)
        x = torch.rand(2, 5) if kind == "linear" else torch.rand(1, 3, 4, 4)
        network(x)
        averaged.update_parameters(network)
    into = settled(averaged, norm(make()))
    own = dict(into.named_parameters())
    weight = next(tensor for name, tensor in own.items() if "orig" in name).detach().double()
    matrix = (weight.transpose(0, 1) if kind == "transposed" else weight).flatten(1)
    largest = torch.linalg.svdvals(matrix)[0]
    vectors = [buffer for name, buffer in into.named_buffers()]
    for vector in vectors:
        assert vector.norm().item() == pytest.approx(1, abs=1e-6)
    of_average = [buffer for name, buffer in averaged.module.named_buffers()]
    assert all(vector.norm() < 0.9 for vector in of_average)
    u, v = vectors if vectors[0].numel() == len(matrix) else vectors[::-1]
    assert (u.double() @ matrix @ v.double()).item() == pytest.approx(largest.item(), rel=1e-5)
    into(x)
    divided = into.weight.detach().double()
    assert_agree(divided.float(), weight / largest)


def test_the_average_is_unchanged_by_its_network():
    network = generator()
    averaged = steps(network, average(network, 0.9))
    before = copy.deepcopy(averaged.state_dict())
    into = settled(averaged, generator())
    into.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    after = averaged.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    shared = {tensor.data_ptr() for tensor in after.values()}
    assert not shared & {tensor.data_ptr() for tensor in into.state_dict().values()}


def test_resumes_from_its_state_dict():
    network = generator()
    averaged = steps(network, average(network, 0.9))
    again = average(network, 0.9)
    again.load_state_dict(averaged.state_dict())
    for one in (averaged, again):
        one.update_parameters(network)
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("use_vae", [False, True])
def test_checkpoint(use_vae, tmp_path):
    """A file of the settled average needs no arguments, and its network computes the same image."""
    network = generator(use_vae=use_vae)
    into = settled(steps(network, average(network, 0.9)), generator(use_vae=use_vae))
    for path in (tmp_path / "generator.pt", tmp_path / "generator.safetensors"):
        checkpoint.write(into, path)
        loaded, inputs = checkpoint.load(path), [torch.rand(1, 3, 32, 32)]
        inputs += [torch.randn(1, 256)] if use_vae else []
        assert loaded.arguments == network.arguments
        assert torch.equal(loaded(*inputs), into(*inputs))


def test_refuses():
    network = MultiscaleDiscriminator(3, ndf=1)
    for decay in (1, -0.1, float("nan"), "0.9", True):
        with pytest.raises(ValueError, match=f"decay is {decay!r}; it should be a number"):
            average(network, decay)
    with pytest.raises(TypeError, match="network is a list"):
        average([network], 0.9)
    averaged = average(network, 0.9)
    with pytest.raises(TypeError, match="averaged is a MultiscaleDiscriminator"):
        settled(network, network)
    with pytest.raises(TypeError, match="into is a SPADEGenerator; it should be a Multiscale"):
        settled(averaged, generator())
    with pytest.raises(ValueError, match="into is the averaged network itself"):
        settled(averaged, averaged.module)
    other = MultiscaleDiscriminator(3, ndf=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"into has \S+ \[2, 3, 4, 4\]; it should be \[1, 3, 4"):
        settled(averaged, other)
    with pytest.raises(ValueError, match=r"into has \S+ absent; it should be"):
        settled(AveragedModel(MultiscaleDiscriminator(3, 3, 1)), MultiscaleDiscriminator(3, 2, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
