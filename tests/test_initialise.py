"""The published initialisation."""

import math

import pytest
import torch
import torch.nn as nn
from agree import assert_agree
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from spade_fast import (
    ConvEncoder,
    MultiscaleDiscriminator,
    SPADEGenerator,
    SPADEResnetBlock,
    initialise,
)

DRAWS = {
    "xavier": lambda weight: nn.init.xavier_normal_(weight, 0.3),
    "xavier_uniform": lambda weight: nn.init.xavier_uniform_(weight, 0.3),
    "normal": lambda weight: nn.init.normal_(weight, 0, 0.3),
    "kaiming": lambda weight: nn.init.kaiming_normal_(weight),
    "orthogonal": lambda weight: nn.init.orthogonal_(weight, 0.3),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_equals_torch(kind):
    """Every weight in the order of the modules, and nothing else is drawn."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        spectral_norm(nn.Conv1d(4, 5, 3, bias=False)),
        nn.BatchNorm1d(5),
        nn.InstanceNorm2d(5),
        parametrizations.spectral_norm(nn.Linear(5, 6)),
        nn.ConvTranspose2d(6, 2, 3),
    )
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    torch.manual_seed(3)
    assert initialise(network, kind, 0.3) is network
    after = torch.rand(1)
    first, group, spectral, batch, _, parametrized, transposed = network
    original = parametrized.parametrizations.weight.original
    found = (first.weight, group.weight, spectral.weight_orig, batch.weight, original)
    torch.manual_seed(3)
    for weight in (*found, transposed.weight):
        draw = DRAWS[kind] if weight.dim() > 1 else lambda weight: nn.init.normal_(weight, 1, 0.3)
        assert torch.equal(weight, draw(torch.empty_like(weight)))
    assert torch.equal(after, torch.rand(1))
    for module in (first, group, batch, parametrized, transposed):
        assert not module.bias.any()
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize(
    "network",
    [
        SPADEGenerator(5, z_dim=7, ngf=2, nhidden=16, norm_G="spectralspadebatch3x3"),
        MultiscaleDiscriminator(8, ndf=8),
        ConvEncoder(ndf=4, z_dim=3),
    ],
    ids=lambda network: type(network).__name__,
)
def test_deviation_of_each_layer(network):
    """Within six standard errors of a normal distribution's standard deviation and mean."""
    initialise(network)
    layers = 0
    for module in network.modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        weight, layers = getattr(module, "weight_orig", module.weight).detach(), layers + 1
        taps = weight[0, 0].numel()
        wanted = 0.02 * math.sqrt(2 / (taps * (weight.shape[0] + weight.shape[1])))
        count = weight.numel()
        assert abs(weight.std() / wanted - 1) < 6 / math.sqrt(2 * count)
        assert abs(weight.mean()) < 6 * wanted / math.sqrt(count)
        assert module.bias is None or not module.bias.any()
    assert layers > 5


@pytest.mark.parametrize("after_a_forward", [False, True])
def test_forward_has_the_new_spectral_weight(after_a_forward):
    block = SPADEResnetBlock(3, 4, "spectralspadeinstance3x3", 2, nhidden=8).eval()
    x, segmap = torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4)
    if after_a_forward:
        block(x, segmap)
    initialise(block, "normal")
    convolution = block.conv_s
    sigma = convolution.weight_u @ convolution.weight_orig.flatten(1) @ convolution.weight_v
    wanted = nn.functional.conv2d(x, convolution.weight_orig / sigma)
    assert_agree(convolution(x), wanted)
    seen = []
    hook = convolution.register_forward_hook(
        lambda _, inputs, result: seen.append((inputs, result))
    )
    block(x, segmap)
    hook.remove()
    ((inputs, result),) = seen
    wanted = nn.functional.conv2d(*inputs, convolution.weight_orig / sigma)
    assert_agree(result, wanted)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((nn.Linear(1, 1).weight,), TypeError, "network is a Parameter"),
        ((nn.Linear(2, 2), "xavir"), ValueError, "kind is 'xavir'; it should be one of xavier, "),
        ((nn.Linear(2, 2), ["xavier"]), ValueError, "kind is "),
        ((nn.Linear(2, 2), "xavier", 0), ValueError, "gain is 0; it should be a positive"),
        ((nn.Linear(2, 2), "xavier", "1"), ValueError, "gain is '1'"),
        ((nn.Linear(2, 2), "xavier", math.nan), ValueError, "gain is nan"),
        ((nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)),), ValueError, "without values"),
        ((nn.Linear(2, 2, device="meta"),), ValueError, "without values"),
    ],
)
def test_refuses(arguments, error, words):
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        initialise(*arguments)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_refuses_weight_norm(norm):
    network = nn.Sequential(nn.Linear(2, 2), norm(nn.Linear(2, 2)))
    before = network[0].weight.clone()
    with pytest.raises(ValueError, match="the weight of 1 is computed from other parameters"):
        initialise(network)
    assert torch.equal(network[0].weight, before)
