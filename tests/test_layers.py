"""SPADE and its residual block against the reference modules with the same weights."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from agree import NETWORK, assert_agree, assert_agree_beside
from label_maps import patches

import spade_fast
from spade_fast import SPADE, reference
from spade_fast.agreement import excess
from spade_fast.nn import pixels, spade
from spade_fast.nn.modules import CONVOLUTIONS
from spade_fast.nn.pixels import resize
from spade_fast.nn.spectral import convolve
from spade_fast.nn.upsampled import RepeatPixels, convolve_repeated, repeat_pixels, repeats

pytestmark = pytest.mark.usefixtures("backend")


def numbers(module, x, segmap, dy):
    """y, the gradients of x, the condition and all parameters, and the buffers, by name."""
    x, segmap = (tensor.detach().clone().requires_grad_() for tensor in (x, segmap))
    y = module(x, segmap)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, [x, segmap, *parameters.values()], dy)
    named = {
        f"d{name}": gradient for name, gradient in zip(["x", "segmap", *parameters], gradients)
    }
    buffers = {
        name: buffer.clone()
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point()
    }
    return {"y": y.detach(), **named, **buffers}


def assert_same(ours, eager, x_shape, segmap_shape, fout=None, dtype=torch.float32, steps=2):
    """Compares every output, gradient and buffer by the rule of agreement, over some steps in train
    mode and one in eval mode.
    """
    ours, eager = ours.to(dtype), eager.to(dtype)
    eager.load_state_dict(ours.state_dict())
    truth = copy.deepcopy(eager).double()
    for step in range(steps + 1):
        for module in (ours, eager, truth):
            module.train(step < steps)
        x, segmap = torch.randn(x_shape, dtype=dtype), torch.randn(segmap_shape, dtype=dtype)
        dy = torch.randn(x_shape[0], fout or x_shape[1], *x_shape[2:], dtype=dtype)
        found, yardstick = numbers(ours, x, segmap, dy), numbers(eager, x, segmap, dy)
        true = numbers(truth, x.double(), segmap.double(), dy.double())
        for name in true:
            scale = true[name].abs().max().item()
            if name.endswith(
                "bias"
            ):  # the gradient of a bias before an instance norm is zero in exact arithmetic
                weight = name.removesuffix("bias") + "weight"
                scale = max(
                    scale, true[weight if weight in true else weight + "_orig"].abs().max().item()
                )
            if name.endswith(
                "running_mean"
            ):  # means nearly cancel: their error is the momentum, 0.1, times a rounding of x
                scale = max(scale, 0.1)
            assert excess(found[name], yardstick[name], true[name], scale) <= 1, (step, name)


@pytest.mark.parametrize("pixels", [(8, 7), pytest.param((64, 64), marks=pytest.mark.large)])
def test_inference_writes_only_to_its_own_memory(pixels, monkeypatch):
    monkeypatch.setattr(spade, "ALWAYS_FRESH", 0)
    block, seen = spade_fast.SPADEResnetBlock(6, 5, "spadeinstance3x3", 4), []
    x, segmap = torch.randn(2, 6, *pixels), torch.randn(2, 4, *pixels)
    given, expected = (x.clone(), segmap.clone()), block(x, segmap)
    with torch.no_grad():
        assert_agree(block(x, segmap), expected)
        # A hook may keep a convolution's result, which must not change.
        parts = [block.conv_s, block.conv_0, block.norm_0.mlp_gamma]
        for part in parts:
            part.register_forward_hook(lambda part, inputs, y: seen.append((y, y.clone())))
        assert_agree(block(x, segmap), expected)
    assert len(seen) == 3 and all(torch.equal(y, before) for y, before in seen)
    assert torch.equal(x, given[0]) and torch.equal(segmap, given[1])


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", ["instance", "batch", "syncbatch", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_layer(norm, affine, dtype):
    layers = (
        module.SPADE(6, 5, 8, norm=norm, affine=affine, num_groups=3)
        for module in (spade_fast, reference)
    )
    assert_same(*layers, (2, 6, 8, 7), (2, 5, 16, 9), dtype=dtype)


@pytest.mark.parametrize("spatial", [(9,), (6, 5), (4, 3, 5)])
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_layer_in_one_to_three_dimensions(spatial, norm, kernel_size):
    settings = {"norm": norm, "num_groups": 2, "spatial_dims": len(spatial)}
    layers = (module.SPADE(4, 3, 6, kernel_size, **settings) for module in (spade_fast, reference))
    assert_same(*layers, (2, 4, *spatial), (2, 3, *(2 * size + 1 for size in spatial)))


@pytest.mark.parametrize("size", [(8, 7), (16, 14), (24, 7), (16, 15), (3, 20), (1, 1)])
def test_the_condition_may_have_any_size(size):
    assert_same(spade_fast.SPADE(4, 3, 6), reference.SPADE(4, 3, 6), (2, 4, 8, 7), (2, 3, *size))


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GroupNorm(2, 4),
        nn.LocalResponseNorm(2),
        nn.Identity(),
        nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()),
    ],
    ids=repr,
)
def test_a_users_own_norm(norm):
    norm = copy.deepcopy(norm).to(torch.get_default_device())
    layers = (module.SPADE(4, 3, 6, norm=copy.deepcopy(norm)) for module in (spade_fast, reference))
    assert_same(*layers, (2, 4, 5, 6), (2, 3, 5, 6), steps=3)


@pytest.mark.parametrize("size", [(8, 6), (16, 18), (8, 13), (4, 3), (5, 7), (80, 6)])
def test_resize_picks_the_same_pixels_as_torch(size):
    segmap = torch.arange(2 * 3 * size[0] * size[1]).float().reshape(2, 3, *size)
    expected = nn.functional.interpolate(segmap, size=(8, 6), mode="nearest")
    assert torch.equal(resize(segmap, torch.Size((8, 6))), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize(
    "shape", [(2, 8, 5, 6), (1, 3, 4, 7), (2, 6, 3), (2, 4, 3, 2, 5), (0, 4, 2, 2)]
)
def test_pixels_are_repeated_as_in_torch(shape, factor, dtype):
    x = torch.randint(-8, 8, shape).to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    repeated = RepeatPixels.apply(x, factor)
    expected = nn.functional.interpolate(x, scale_factor=factor, mode="nearest")
    dy = torch.randint_like(expected, -8, 8)
    assert torch.equal(repeated, expected)
    gradients = (torch.autograd.grad(y, x, dy)[0] for y in (repeated, expected))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("names", [("weight",), ("weight", "bias")])
@pytest.mark.parametrize("mode", ["always", "never"])
def test_weights_that_are_no_parameters(names, mode):
    """As a hypernetwork gives them, or FSDP."""
    ours, eager = (package.SPADE(8, 5, 6) for package in (spade_fast, reference))
    eager.load_state_dict(ours.state_dict())
    for part in ("mlp_shared.0", "mlp_gamma", "mlp_beta"):
        for name in names:
            weight = ours.get_parameter(f"{part}.{name}").detach().clone()
            for module in (ours.get_submodule(part), eager.get_submodule(part)):
                del module._parameters[name]
                setattr(module, name, weight)
    x = torch.randn(2, 8, 12, 10)
    layout = spade_fast.SemanticLayout.from_labels(patches((2, 12, 10), 5), 5)
    segmap = layout.to_segmap()
    with spade_fast.window_mode(mode):
        for condition in (layout, segmap):
            assert_agree(ours(x, condition), eager(x, segmap))


def test_settings_of_the_norm_are_read_when_they_are_used():
    ours, eager = (
        module.SPADE(4, 3, 6, norm="batch", eps=0.3, momentum=0.6)
        for module in (spade_fast, reference)
    )
    assert_same(ours, eager, (2, 4, 5, 6), (2, 3, 5, 6))
    for layer in (ours, eager):
        layer.param_free_norm.eps, layer.param_free_norm.momentum = 0.7, 0.2
    assert_same(ours, eager, (2, 4, 5, 6), (2, 3, 5, 6))
    ours, eager = (nn.SyncBatchNorm.convert_sync_batchnorm(layer) for layer in (ours, eager))
    assert type(ours.param_free_norm) is nn.SyncBatchNorm
    assert_same(ours, eager, (2, 4, 5, 6), (2, 3, 5, 6))


def test_hooks_on_submodules_are_called():
    ours, eager = spade_fast.SPADE(4, 3, 6), reference.SPADE(4, 3, 6)
    for layer in (ours, eager):
        nn.utils.spectral_norm(layer.mlp_gamma)
        nn.utils.parametrizations.weight_norm(layer.mlp_beta)
        layer.param_free_norm.register_forward_hook(lambda module, inputs, output: output * 2)
    eager.load_state_dict(ours.state_dict())
    for part in ("mlp_gamma", "mlp_beta"):
        getattr(eager, part).eval(), getattr(ours, part).eval()
    x, segmap = torch.randn(2, 4, 5, 6), torch.randn(2, 3, 5, 6)
    assert_agree(ours(x, segmap), eager(x, segmap))


class InOneTuple(nn.Module):
    """A parametrization of a list of tensors, which has one."""

    def forward(self, weight):
        return weight * 2

    def right_inverse(self, weight):
        return (weight / 2,)


class Product(nn.Module):
    """A parametrization of several tensors, none of which has the weight's shape."""

    def forward(self, rows, columns):
        return (rows @ columns).unflatten(1, (6, 3, 3))

    def right_inverse(self, weight):
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return u * s, v


@pytest.mark.parametrize("made", [InOneTuple, Product])
@pytest.mark.parametrize("mode", ["always", "never"])
def test_a_weight_that_is_made_of_a_list_of_tensors(made, mode):
    ours, eager = (package.SPADE(8, 5, 6) for package in (spade_fast, reference))
    for module in (ours, eager):
        nn.utils.parametrize.register_parametrization(module.mlp_gamma, "weight", made())
    eager.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 12, 10)
    layout = spade_fast.SemanticLayout.from_labels(patches((2, 12, 10), 5), 5)
    with spade_fast.window_mode(mode):
        assert_agree(ours(x, layout), eager(x, layout.to_segmap()))


def test_activation_of_the_layer():
    layer = spade_fast.SPADE(4, 3, 6)
    x, segmap = torch.randn(2, 4, 5, 6), torch.randn(2, 3, 5, 6)
    expected = nn.functional.leaky_relu(layer(x, segmap), 0.3)
    assert_agree(layer(x, segmap, activation="leaky_relu", negative_slope=0.3), expected)


@pytest.mark.parametrize(
    "norm_G",
    [
        "spadeinstance3x3",
        "spectralspadesyncbatch3x3",
        "spadespectralinstance",
        "spadebatch5x5",
        "spade",
    ],
)
@pytest.mark.parametrize("fin,fout", [(6, 6), (8, 4), (4, 8)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_block(norm_G, fin, fout, dilation):
    blocks = (
        module.SPADEResnetBlock(fin, fout, norm_G, 3, dilation=dilation, nhidden=6)
        for module in (spade_fast, reference)
    )
    assert_same(*blocks, (2, fin, 8, 7), (2, 3, 16, 14), fout)


@pytest.mark.parametrize("spatial", [(9,), (6, 7), (4, 3, 5)])
def test_block_with_squeeze_and_excitation(spatial):
    arguments = (32, 64, "spadeinstance3x3", 3, True)
    blocks = (
        module.SPADEResnetBlock(*arguments, nhidden=6, spatial_dims=len(spatial))
        for module in (spade_fast, reference)
    )
    assert_same(*blocks, (2, 32, *spatial), (2, 3, *spatial), 64)


@pytest.mark.parametrize("last", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.01)])
def test_a_last_part_that_is_an_activation(last):
    """It does not replace the activations before the convolutions."""
    ours, eager = (
        module.SPADEResnetBlock(6, 4, "spadeinstance3x3", 3, nhidden=6)
        for module in (spade_fast, reference)
    )
    ours.se = eager.se = last
    assert_same(ours, eager, (2, 6, 8, 7), (2, 3, 8, 7), 4)


@pytest.mark.parametrize("scale", [0, -1, 1.5, "2", None])
def test_block_with_a_wrong_scale(scale):
    block = spade_fast.SPADEResnetBlock(6, 4, "spadeinstance3x3", 3, nhidden=6)
    with pytest.raises((TypeError, ValueError), match=f"scale is {scale!r}; it should be"):
        block(torch.randn(2, 6, 8, 7), torch.randn(2, 3, 8, 7), scale)


def test_block_with_group_norm():
    blocks = (
        module.SPADEResnetBlock(64, 32, "spadegroup", 3, nhidden=6)
        for module in (spade_fast, reference)
    )
    assert_same(*blocks, (2, 64, 5, 4), (2, 3, 5, 4), 32)


@pytest.mark.parametrize("spatial", [(9,), (4, 3, 5)])
def test_block_in_one_and_three_dimensions(spatial):
    arguments = (6, 4, "spectralspadebatch3x3", 3)
    blocks = (
        module.SPADEResnetBlock(*arguments, nhidden=6, spatial_dims=len(spatial))
        for module in (spade_fast, reference)
    )
    assert_same(*blocks, (2, 6, *spatial), (2, 3, *spatial), 4)


@pytest.mark.parametrize("spatial", [(8,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_block_whose_x_is_smaller_than_its_spectral_weights(spatial, dtype):
    arguments = (24, 20, "spectralspadebatch3x3", 3)
    blocks = [
        module.SPADEResnetBlock(*arguments, nhidden=6, spatial_dims=len(spatial))
        for module in (spade_fast, reference)
    ]
    assert_same(*blocks, (2, 24, *spatial), (2, 3, *spatial), 20, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size,divides_x", [(4, True), (16, False)])
def test_spectral_norm_divides_the_smaller_of_x_and_weight(dtype, size, divides_x):
    ours = nn.utils.spectral_norm(nn.Conv2d(24, 20, 3, padding=1))
    left, _, right = torch.linalg.svd(ours.weight_orig.detach().flatten(1))
    ours.weight_u, ours.weight_v = (
        left[:, 0].clone(),
        right[0].clone(),
    )  # with its initial random vectors, σ may be about zero
    ours, stale = ours.to(dtype), ours.weight
    eager = copy.deepcopy(ours)
    truth = copy.deepcopy(eager).double()
    x, dy = (
        torch.randn(1, 24, size, size, dtype=dtype).requires_grad_(),
        torch.randn(1, 20, size, size, dtype=dtype),
    )

    def numbers(forward, module, x, dy):
        y = forward(module, x)
        names = ["x", *dict(module.named_parameters())]
        gradients = torch.autograd.grad(y, [x, *module.parameters()], dy)
        return {"y": y.detach(), "u": module.weight_u} | dict(zip(names, gradients))

    found, yardstick = numbers(convolve, ours, x, dy), numbers(nn.Module.__call__, eager, x, dy)
    true = numbers(nn.Module.__call__, truth, x.detach().double().requires_grad_(), dy.double())
    for name in true:
        assert excess(found[name], yardstick[name], true[name]) <= 1, name
    assert (ours.weight is stale) == divides_x


@pytest.mark.parametrize("size", [2, 9])  # x is smaller, or the weight is
def test_second_derivatives_through_spectral_norm(size):
    ours = nn.utils.spectral_norm(nn.Conv2d(6, 5, 3, padding=1)).double()
    eager = copy.deepcopy(ours)
    x = torch.randn(1, 6, size, size, dtype=torch.float64, requires_grad=True)

    def numbers(forward, module):
        inputs = [x, module.weight_orig]
        y = forward(module, x)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), inputs)
        again = torch.autograd.grad(forward(module, x).square().sum(), inputs)
        return [y, *first, *second, *again, module.weight_u, module.weight_v]

    assert_agree(numbers(convolve, ours), numbers(nn.Module.__call__, eager))


def test_hooks_beside_spectral_norm_are_called():
    block, calls = spade_fast.SPADEResnetBlock(24, 20, "spectralspadebatch3x3", 3), []
    block.conv_0.register_forward_hook(lambda *arguments: calls.append("forward"))
    block.conv_1.register_full_backward_hook(lambda *arguments: calls.append("backward"))
    block(torch.randn(2, 24, 2, 2), torch.randn(2, 3, 2, 2)).sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.float64
def test_two_forwards_before_a_backward_through_spectral_norm():
    ours, eager = (
        module.SPADEResnetBlock(24, 20, "spectralspadebatch3x3", 3).double()
        for module in (spade_fast, reference)
    )
    eager.load_state_dict(ours.state_dict())
    x, segmap = torch.randn(2, 2, 24, 3, 3).double(), torch.randn(2, 3, 3, 3).double()
    for block in (ours, eager):
        (block(x[0], segmap).square().sum() + block(x[1], segmap).square().sum()).backward()
    assert_agree_beside(
        *({name: one.grad for name, one in block.named_parameters()} for block in (ours, eager))
    )


@pytest.mark.float64
def test_block_in_float64_is_the_reference():
    blocks = (
        module.SPADEResnetBlock(6, 4, "spadebatch3x3", 3, nhidden=6)
        for module in (spade_fast, reference)
    )
    assert_same(*blocks, (2, 6, 8, 8), (2, 3, 8, 8), 4, dtype=torch.float64)


def test_block_by_its_shorter_name():
    ours, eager = (
        spade_fast.SPADEResBlk(6, 4, 3),
        reference.SPADEResnetBlock(6, 4, "spadeinstance3x3", 3),
    )
    assert_same(ours, eager, (2, 6, 5, 4), (2, 3, 5, 4), 4)


def test_norm_0_and_norm_s_share_one_pass_of_moments(monkeypatch):
    calls = []
    chosen = spade_fast.kernels.select(torch.randn(2, 3, 4, 4))
    watched = replace(
        chosen, plane_moments=lambda x: calls.append(x.shape) or chosen.plane_moments(x)
    )
    monkeypatch.setattr(spade_fast.kernels, "BEST_FIRST", (watched,))
    block = spade_fast.SPADEResnetBlock(8, 4, "spadebatch3x3", 3)
    block(torch.randn(2, 8, 5, 5), torch.randn(2, 3, 5, 5))
    assert calls == [(2, 8, 5, 5), (2, 4, 5, 5)]
    assert torch.equal(
        block.norm_0.param_free_norm.running_mean, block.norm_s.param_free_norm.running_mean
    )
    assert block.norm_s.param_free_norm.running_mean.any()
    calls.clear()
    block.eval()(torch.randn(2, 8, 5, 5), torch.randn(2, 3, 5, 5))
    assert calls == []


def test_gamma_and_beta_from_one_convolution(monkeypatch):
    """On a GPU, γ and β come from one convolution; here the CPU is made to do the same."""
    calls = []
    convolve = nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d,
        "_conv_forward",
        lambda *arguments: calls.append(arguments[2].shape[0]) or convolve(*arguments),
    )
    monkeypatch.setattr(
        spade_fast.nn.pixels, "convolve_apart", spade_fast.nn.pixels.convolve_jointly
    )
    assert_same(spade_fast.SPADE(4, 3, 6), reference.SPADE(4, 3, 6), (2, 4, 5, 6), (2, 3, 5, 6))
    assert calls[:2] == [6, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [None, torch.float32])
def test_autocast(dtype, x_dtype):
    ours, eager = (
        spade_fast.SPADEResnetBlock(6, 4, "spadebatch3x3", 3),
        reference.SPADEResnetBlock(6, 4, "spadebatch3x3", 3),
    )
    eager.load_state_dict(ours.state_dict())
    truth = copy.deepcopy(eager).double()
    x, segmap, dy = torch.randn(2, 6, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    x = x.to(x_dtype or dtype)
    with torch.autocast("cpu", dtype):
        found, yardstick = (
            numbers(ours, x, segmap, dy.to(dtype)),
            numbers(eager, x, segmap, dy.to(dtype)),
        )
    true = numbers(truth, x.double(), segmap.double(), dy.to(dtype).double())
    for name in (
        "y",
        "dx",
        "dconv_0.weight",
        "dnorm_0.mlp_gamma.weight",
        "dnorm_s.mlp_shared.0.weight",
    ):
        assert excess(found[name], yardstick[name], true[name], eps=torch.finfo(dtype).eps) <= 1, (
            name
        )


def test_channels_last_in_channels_last_out():
    block = spade_fast.SPADEResnetBlock(16, 8, "spadeinstance3x3", 3).to(
        memory_format=torch.channels_last
    )
    x, segmap = (torch.randn(2, c, 8, 8).to(memory_format=torch.channels_last) for c in (16, 3))
    assert block.norm_0(x, segmap).is_contiguous(memory_format=torch.channels_last)
    assert block(x, segmap).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "cpu,gradients,height,expected",
    [
        ("cpu", True, 64, torch.channels_last),
        ("avx2", True, 64, torch.contiguous_format),
        ("cpu", True, 63, torch.contiguous_format),
        ("avx2", False, 16, torch.channels_last),
        ("cpu", False, 15, torch.contiguous_format),
    ],
)
def test_the_memory_format_is_the_one_that_convolutions_prefer(
    cpu, gradients, height, expected, monkeypatch
):
    monkeypatch.setattr(pixels, "CPU", cpu)
    layer, x = spade_fast.SPADE(5, 3, 4), torch.randn(1, 5, height, 64)
    with torch.set_grad_enabled(gradients):
        y = layer(x, torch.randn(1, 3, height, 64))
    assert y.is_contiguous(memory_format=torch.channels_last if x.is_cuda else expected)


def test_inference_mode():
    layer = spade_fast.SPADE(4, 3, 6, norm="batch")
    x, segmap = torch.randn(2, 4, 5, 6), torch.randn(2, 3, 5, 6)
    for training in (True, False):
        layer.train(training)
        expected = copy.deepcopy(layer)(x, segmap)
        with torch.inference_mode():
            y = copy.deepcopy(layer)(x, segmap)
        assert y.is_inference() and torch.equal(y, expected)


def test_deepcopy_pickle_and_state_dict():
    block = spade_fast.SPADEResnetBlock(6, 4, "spectralspadebatch3x3", 3, True, nhidden=6)
    x, segmap = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        block(x, segmap)
    block.eval()
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    loaded = spade_fast.SPADEResnetBlock(6, 4, "spectralspadebatch3x3", 3, True, nhidden=6).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert torch.equal(copied(x, segmap), block(x, segmap))


@pytest.mark.parametrize("norm_G", ["spectralspadesyncbatch3x3", "spadeinstance3x3"])
@pytest.mark.parametrize("fin,fout", [(6, 6), (8, 4)])
def test_keys_and_the_order_of_parameters_are_the_references(norm_G, fin, fout):
    ours, eager = (
        module.SPADEResnetBlock(fin, fout, norm_G, 3) for module in (spade_fast, reference)
    )
    assert list(ours.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in eager.named_parameters()
    ]  # an optimizer's state refers to parameters by their order
    restored = reference.SPADEResnetBlock(fin, fout, norm_G, 3)
    restored.load_state_dict(ours.state_dict())
    again = spade_fast.SPADEResnetBlock(fin, fout, norm_G, 3)
    again.load_state_dict(restored.state_dict())
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items()
    )


@pytest.mark.float64
def test_an_optimizer_step_changes_both_in_the_same_way():
    ours, eager = (
        module.SPADEResnetBlock(6, 4, "spectralspadebatch3x3", 3).double()
        for module in (spade_fast, reference)
    )
    eager.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.Adam(one.parameters(), 1e-2, eps=1e-3) for one in (ours, eager)]
    for _ in range(3):
        x, segmap = torch.randn(2, 6, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
        for block, optimizer in zip((ours, eager), optimizers):
            optimizer.zero_grad()
            block(x, segmap).square().mean().backward()
            optimizer.step()
    assert_agree(dict(ours.state_dict()), dict(eager.state_dict()), NETWORK)


@pytest.mark.float64
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_a_dense_condition_smaller_than_x_is_not_enlarged(
    kernel_size, factor, spatial_dims, monkeypatch
):
    small = (4, 3, 2)[:spatial_dims]
    settings = dict(kernel_size=kernel_size, spatial_dims=spatial_dims)
    ours, theirs = (
        SPADE(3, 2, 5, **settings).double(),
        reference.SPADE(3, 2, 5, **settings).double(),
    )
    theirs.load_state_dict(ours.state_dict())
    x, segmap = (
        torch.randn(2, 3, *[factor * length for length in small]).double(),
        torch.randn(2, 2, *small).double(),
    )
    found, resized = [], []
    monkeypatch.setattr(pixels, "resize", lambda *arguments: resized.append(arguments))
    for module in (ours, theirs):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, segmap)]
        y = module(*inputs)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [*inputs, *module.parameters()])])
    assert not resized
    assert_agree(*found)


@pytest.mark.parametrize("dims,taps,factor", [(1, 3, 2), (2, 5, 4), (2, 1, 3), (3, 3, 2)])
def test_a_convolution_of_repeated_pixels(dims, taps, factor):
    """Including an infinite weight, which padding may multiply at the border."""
    conv = CONVOLUTIONS[dims](2, 3, taps, padding=taps // 2).double()
    x = torch.rand(1, 2, *[6] * dims, dtype=torch.float64) + 0.1
    inner = (..., *[slice(taps, -taps)] * dims)
    for weight in (None, float("inf")):
        if weight is not None:
            conv.weight.data[0, 0].view(-1)[0] = weight
        ours, eager = convolve_repeated(conv, x, factor), conv(repeat_pixels(x, factor))
        assert_agree(ours[inner], eager[inner])
        assert not ours.isnan().any()


@pytest.mark.parametrize("size", [(8, 12), (9, 12), (2, 3), (4, 18)])
def test_repeats_are_those_of_interpolate(size):
    segmap = torch.arange(24.0).view(1, 1, 4, 6)
    factor, resized = (
        repeats(segmap, size),
        torch.nn.functional.interpolate(segmap, size=size, mode="nearest"),
    )
    assert factor == (2 if size == (8, 12) else 1)
    if factor == 2:
        assert torch.equal(resized, segmap.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_in_half_precision_weights_are_not_summed():
    layer, segmap = SPADE(3, 2, 5).to(torch.bfloat16), torch.randn(1, 2, 4, 4).to(torch.bfloat16)
    hidden = layer.mlp_shared(torch.nn.functional.interpolate(segmap, scale_factor=2))
    assert torch.equal(pixels._hidden(layer.mlp_shared, segmap, torch.zeros(1, 3, 8, 8)), hidden)


@pytest.mark.large
@pytest.mark.parametrize("factor", [41, 47])
def test_a_quotient_that_is_rounded_repeats_other_pixels(factor):
    ours, theirs = SPADE(2, 3, 4), reference.SPADE(2, 3, 4)
    theirs.load_state_dict(ours.state_dict())
    segmap = torch.randn(1, 3, 8, 8, requires_grad=True)
    x = torch.randn(1, 2, 8 * factor, 8 * factor)
    assert_agree(ours(x, segmap), theirs(x, segmap))


def test_a_generator_of_a_quotient_that_is_rounded():
    stages = [("first", 16, 1), ("second", 8, 41)]
    settings = {"stages": stages, "last_scale": 47, "nhidden": 4, "spatial_dims": 1}
    ours = spade_fast.SPADEGenerator(3, None, 1, **settings)
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        module.register_forward_hook(lambda *_: None)
    segmap = torch.randn(1, 3, 8)
    assert_agree(ours(segmap), theirs(segmap))


@pytest.mark.float64
def test_one_activation_module_used_twice():
    ours, theirs = SPADE(4, 3, 5).double(), reference.SPADE(4, 3, 5).double()
    theirs.load_state_dict(ours.state_dict())
    activation = nn.GELU()
    for layer in (ours, theirs):
        layer.mlp_shared = nn.Sequential(layer.mlp_shared[0], activation, activation)
    x, segmap = torch.randn(1, 4, 6, 6).double(), torch.randn(1, 3, 6, 6).double()
    assert_agree(ours(x, segmap), theirs(x, segmap))


@pytest.mark.float64
def test_running_statistics_that_are_no_longer_tracked():
    ours, theirs = (
        package.SPADE(4, 3, 5, norm="batch").double() for package in (spade_fast, reference)
    )
    theirs.load_state_dict(ours.state_dict())
    x, segmap = torch.randn(2, 4, 6, 6).double() + 3, torch.randn(2, 3, 6, 6).double()
    for train in (True, False):
        for layer in (ours, theirs):
            layer.train(train).param_free_norm.track_running_stats = False
        assert_agree(ours(x, segmap), theirs(x, segmap))
    for name, buffer in theirs.named_buffers():
        assert torch.equal(dict(ours.named_buffers())[name], buffer)


def test_a_norm_of_fewer_dimensions_raises_its_own_error():
    layer = SPADE(4, 3, 5, norm=nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer(torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6))
