"""A generator's step is the same whether fakes and reals are judged separately or in one batch."""

import copy

import pytest
import torch
import torch.nn as nn
from agree import assert_agree
from label_maps import LABEL_NC, layout_of
from torch.utils.flop_counter import FlopCounterMode

from spade_fast import MultiscaleDiscriminator
from spade_fast.training.judge import judge, judges_each_image


def discriminator(**settings):
    return MultiscaleDiscriminator(LABEL_NC + 3, ndf=4, **settings).double()


def inputs(images=2, size=32):
    fakes, reals = torch.rand(2, images, 3, size, size, dtype=torch.float64)
    layout = layout_of((2, size, size))
    return fakes.requires_grad_(), reals, layout


def loss_of(of_fakes, of_reals):
    """The hinge loss and feature matching."""
    loss = 0
    for fake, real in zip(of_fakes, of_reals):
        loss = loss - fake[-1].mean()
        for ours, theirs in zip(fake[:-1], real[:-1]):
            loss = loss + 10 * (ours - theirs.detach()).abs().mean()
    return loss


def in_one_batch(network, fakes, reals, layout):
    results = network(torch.cat([fakes, reals]), layout)
    count = len(fakes)
    return tuple(
        [[one[rows] for one in of] for of in results] for rows in (slice(count), slice(count, None))
    )


def numbers(run, network, fakes, reals, layout):
    results = run(network, fakes, reals, layout)
    (gradient,) = torch.autograd.grad(loss_of(*results), fakes)
    flat = [tensor.detach() for half in results for scale in half for tensor in scale]
    return [*flat, gradient, *(buffer.clone() for buffer in network.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [2, 4])
@pytest.mark.parametrize("dense", [False, True])
def test_judging_separately_equals_one_batch(training, images, dense):
    """Results, the fakes' gradient and spectral norm's vectors, over several steps."""
    network, (fakes, reals, layout) = discriminator().train(training), inputs(images)
    other = copy.deepcopy(network)
    seen = layout.to_segmap(torch.float64) if dense else layout
    for _ in range(3):
        found = numbers(judge, network, fakes, reals, seen)
        wanted = numbers(in_one_batch, other, fakes, reals, seen)
        assert_agree(found, wanted)
        for one in (network, other):
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.mul_(1.1)


def test_the_discriminator_is_unchanged():
    network, (fakes, reals, layout) = discriminator(), inputs()
    of_fakes, of_reals = judge(network, fakes, reals, layout)
    loss_of(of_fakes, of_reals).backward()
    assert network.training and all(part.training for part in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(one.requires_grad for scale in of_reals for one in scale)
    with pytest.raises(ValueError, match="x has 2 channels"):
        judge(network, fakes[:, :2], reals[:, :2], layout)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_backward_takes_half_the_flops():
    """And less than a third of a batch whose parameters' gradients are computed, too."""
    network, (fakes, reals, layout) = discriminator(), inputs(size=64)
    spent = {}
    for run in (judge, in_one_batch):
        for trains in (True, False):
            network.requires_grad_(trains)
            loss = loss_of(*run(network, fakes, reals, layout))
            with FlopCounterMode(display=False) as counter:
                loss.backward()
            spent[run, trains] = counter.get_total_flops()
    assert spent[judge, True] == spent[judge, False]
    assert spent[in_one_batch, False] / spent[judge, True] == pytest.approx(2, rel=0.01)
    assert spent[in_one_batch, True] / spent[judge, True] > 3


class Watched(list):
    def __call__(self, module, arguments):
        self.append(len(arguments[0]))


def changed(network, how):
    calls = Watched()
    if how == "hook":
        network.discriminator_1.register_forward_pre_hook(calls)
    elif how == "hook inside":
        network.discriminator_0.model1[0][1].register_forward_pre_hook(calls)
    elif how == "batch norm":
        network.discriminator_0.model1[0][1] = nn.BatchNorm2d(8).double()
    elif how == "running statistics":
        norm = nn.InstanceNorm2d(8, track_running_stats=True).double()
        network.discriminator_0.model1[0][1] = norm
    else:
        network = type("Other", (MultiscaleDiscriminator,), {})(LABEL_NC + 3, ndf=4).double()
    return network, calls


HOW = ["hook", "hook inside", "batch norm", "running statistics", "another class"]


@pytest.mark.parametrize("how", HOW)
def test_a_changed_discriminator_gets_one_batch(how):
    (network, calls), (fakes, reals, layout) = changed(discriminator(), how), inputs()
    other = copy.deepcopy(network)
    assert judges_each_image(discriminator()) and not judges_each_image(network)
    found = numbers(judge, network, fakes, reals, layout)
    assert calls == ([4] if how.startswith("hook") else [])
    for ours, theirs in zip(found, numbers(in_one_batch, other, fakes, reals, layout)):
        assert torch.equal(ours, theirs)
    _, of_reals = judge(network, fakes, reals, layout)
    assert not any(one.requires_grad for scale in of_reals for one in scale)


def test_refuses():
    network, (fakes, reals, layout) = discriminator(), inputs()
    for arguments, error, words in (
        (
            (fakes[:1], reals),
            ValueError,
            r"fakes has shape \[1, 3, 32, 32\]; .* that of reals, \[2",
        ),
        ((fakes[:1], reals[:1]), ValueError, "fakes has 1 images; it should have a multiple of"),
        ((fakes, [reals]), TypeError, "reals is a list; it should be a tensor of images"),
    ):
        with pytest.raises(error, match=words):
            judge(network, *arguments, layout)
    with pytest.raises(TypeError, match="layout is a NoneType; it should be a SemanticLayout"):
        judge(network, fakes, reals, None)
