"""A ValueError or TypeError for bad input names the argument, what it is and what it should be."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from agree import assert_agree

import spade_fast

X = torch.randn(2, 4, 5, 6)
INDEX = torch.zeros(2, 5, 6, dtype=torch.int64)
TABLE = {"gamma": torch.ones(3, 4), "beta": torch.ones(3, 4)}


def modulate(x=X, gamma=X, beta=X, **settings):
    return spade_fast.spade_modulate(x, gamma, beta, **settings)


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        ({"x": X.int()}, TypeError, ["x has dtype torch.int32", "floating-point"]),
        (
            {"x": X.to(torch.float8_e4m3fn)},
            TypeError,
            ["x has dtype torch.float8_e4m3fn", "16, 32 or 64 bits"],
        ),
        ({"x": X.numpy()}, TypeError, ["x is a ndarray", "torch.Tensor"]),
        ({"x": torch.randn(4, 5)}, ValueError, ["x has shape [4, 5]", "[N, C, *spatial]"]),
        ({"x": torch.randn(1, 1, 1, 1, 1, 2)}, ValueError, ["x has shape", "one to three"]),
        ({"gamma": X.cfloat()}, TypeError, ["gamma has dtype torch.complex64"]),
        ({"gamma": X[:, :3]}, ValueError, ["gamma has shape [2, 3, 5, 6]", "[2, 4, 5, 6]"]),
        ({"beta": X[:1]}, ValueError, ["beta has shape [1, 4, 5, 6]", "[2, 4, 5, 6]"]),
        ({"beta": X.double()}, TypeError, ["beta has dtype torch.float64", "torch.float32"]),
        ({"gamma": X.to("meta")}, ValueError, ["gamma is on meta", "cpu"]),
        ({"norm": "layer"}, ValueError, ["norm is 'layer'", "instance", "batch"]),
        ({"activation": "gelu"}, ValueError, ["activation is 'gelu'", "leaky_relu"]),
        ({"plus_one": 0}, TypeError, ["plus_one is 0", "True or False"]),
        ({"eps": "1"}, TypeError, ["eps is '1'", "should be a number"]),
        ({"momentum": None}, TypeError, ["momentum is None", "should be a number"]),
        ({"negative_slope": X}, TypeError, ["negative_slope is tensor", "should be a number"]),
        ({"norm": "group"}, ValueError, ["num_groups is None", "divides C, 4"]),
        ({"norm": "group", "num_groups": 3}, ValueError, ["num_groups is 3", "divides C, 4"]),
        ({"weight": torch.ones(5)}, ValueError, ["weight has shape [5]", "[4]"]),
        ({"bias": [1, 2, 3, 4]}, TypeError, ["bias is a list"]),
        ({"weight": torch.ones(4).int()}, TypeError, ["weight has dtype torch.int32"]),
        ({"norm": None, "weight": torch.ones(4)}, ValueError, ["weight", "None for norm=None"]),
        (
            {"running_mean": torch.ones(4)},
            ValueError,
            ["running_mean and running_var", "together or not at all"],
        ),
        (
            {"running_mean": torch.ones(4), "running_var": torch.ones(4)},
            ValueError,
            ["running_mean", "norm='instance'"],
        ),
        (
            {"norm": "batch", "training": False},
            ValueError,
            ["running_mean is None", "training=False"],
        ),
        ({"index": [0]}, TypeError, ["index is a list", "torch.Tensor"]),
        (
            {"index": X[:, 0], **TABLE},
            TypeError,
            ["index has dtype torch.float32", "whole numbers"],
        ),
        ({"index": INDEX[:, 1:], **TABLE}, ValueError, ["index has shape [2, 4, 6]", "[2, 5, 6]"]),
        ({"index": INDEX.to("meta"), **TABLE}, ValueError, ["index is on meta", "cpu"]),
        ({"index": INDEX + 3, **TABLE}, ValueError, ["index has numbers from 3 to 3", "0 to 2"]),
        ({"index": INDEX - 1, **TABLE}, ValueError, ["index has numbers from -1 to -1", "0 to 2"]),
        ({"index": INDEX}, ValueError, ["gamma has shape [2, 4, 5, 6]", "[K, 4]"]),
        (
            {"index": INDEX, "gamma": torch.ones(3, 5)},
            ValueError,
            ["gamma has shape [3, 5]", "[K, 4]"],
        ),
        (
            {"index": INDEX, "gamma": torch.ones(3, 4), "beta": torch.ones(2, 4)},
            ValueError,
            ["beta has shape [2, 4]", "[3, 4]"],
        ),
        ({"out": X[:1].clone()}, ValueError, ["out has shape [1, 4, 5, 6]", "[2, 4, 5, 6]"]),
        ({"out": X.double()}, TypeError, ["out has dtype torch.float64", "torch.float32"]),
        (
            {"out": X.to(memory_format=torch.channels_last)},
            ValueError,
            ["out has strides [120, 1, 24, 4]", "[120, 30, 6, 1]"],
        ),
        (
            {"out": X.clone(), "gamma": X.clone().requires_grad_()},
            ValueError,
            ["out is given", "None where gradients"],
        ),
        ({"moments": torch.ones(2, 4)}, ValueError, ["moments has shape [2, 4]", "[2, 2, 4]"]),
        (
            {"moments": torch.ones(2, 2, 4).bfloat16()},
            TypeError,
            ["moments has dtype torch.bfloat16", "torch.float32"],
        ),
        (
            {"moments": torch.ones(2, 2, 4, device="meta")},
            ValueError,
            ["moments is on meta", "cpu"],
        ),
    ],
)
def test_spade_modulate(arguments, error, words):
    with pytest.raises(error) as raised:
        modulate(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


SHAPE, MEMORY = (2, 4, 5, 6), torch.randn(600)


def at(place, shape=SHAPE, dtype=torch.float32, order=None):
    """A tensor at an offset into MEMORY, with its dimensions in this order in memory."""
    order = order or range(len(shape))
    sizes = torch.Size(shape[dim] for dim in order)
    tensor = MEMORY[place:].view(dtype)[: sizes.numel()].view(sizes)
    return tensor.permute([list(order).index(dim) for dim in range(len(shape))])


@pytest.mark.parametrize(
    "name,read",
    [
        *((name, {name: at(place)}) for name in ("x", "gamma", "beta") for place in (1, 199, 339)),
        ("gamma", {"gamma": at(100, order=(0, 2, 3, 1))}),  # in another order
        ("x", {"x": at(100, dtype=torch.bfloat16), "beta": X, "gamma": X}),  # in another dtype
        *((name, TABLE | {name: at(150, (3, 4)), "index": INDEX}) for name in ("gamma", "beta")),
        ("index", TABLE | {"index": at(200, (2, 5, 6), torch.int32)}),
    ],
)
def test_out_that_overlaps_an_input(name, read):
    out = at(100)
    if "index" in read:
        read["index"].zero_()
    before = MEMORY.clone()
    with pytest.raises(ValueError, match=f"out overlaps {name} in memory; it should be {name} it"):
        modulate(**read, out=out)
    assert torch.equal(MEMORY.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("place", [0, 240])
def test_out_next_to_an_input(place):
    x, gamma, out = at(place), at(place).clone(), at(240 - place)
    expected = modulate(x.clone(), gamma)
    assert_agree(modulate(x, gamma, out=out), expected)


def test_a_table_without_rows():
    table = torch.ones(0, 4)
    with pytest.raises(ValueError, match="gamma has no rows; it should have one for each number"):
        modulate(gamma=table, beta=table, index=INDEX)
    assert modulate(X[:0], table, table, index=INDEX[:0]).shape == (0, 4, 5, 6)


def test_plane_moments():
    with pytest.raises(TypeError, match="x has dtype torch.int32"):
        spade_fast.plane_moments(X.int())
    with pytest.raises(ValueError, match="x has shape"):
        spade_fast.plane_moments(X[0, 0])


def test_numbers_of_any_kind():
    expected = modulate(eps=0.5, activation="leaky_relu", negative_slope=0.25)
    for kind in (torch.tensor, np.float32):
        settings = {"eps": kind(0.5), "activation": "leaky_relu", "negative_slope": kind(0.25)}
        assert torch.equal(modulate(**settings), expected)


@pytest.mark.parametrize(
    "wrong", [{"beta": X[:1]}, {"activation": "gelu"}, {"negative_slope": "0"}, {"moments": X}]
)
def test_a_failed_call_does_not_change_running_statistics(wrong):
    running_mean, running_var = torch.zeros(4), torch.ones(4)
    with pytest.raises((TypeError, ValueError)):
        modulate(norm="batch", running_mean=running_mean, running_var=running_var, **wrong)
    assert not running_mean.any() and (running_var == 1).all()
    if "beta" not in wrong:
        layer = spade_fast.SPADE(4, 3, norm="batch", momentum=None)
        with pytest.raises((TypeError, ValueError)):
            layer(X, SEGMAP, **wrong)
        layer(X, SEGMAP)
        assert layer.param_free_norm.num_batches_tracked == 1
        assert_agree(layer.param_free_norm.running_mean, X.mean((0, 2, 3)))


SEGMAP = torch.randn(2, 3, 9, 9)


@pytest.mark.parametrize(
    "x,segmap,error,words",
    [
        (X, SEGMAP[:, :2], ValueError, ["segmap has shape [2, 2, 9, 9]", "[N, 3, H, W]"]),
        (X[:, :2], SEGMAP, ValueError, ["x has shape [2, 2, 5, 6]", "[N, 4, H, W]"]),
        (X, SEGMAP[0], ValueError, ["segmap has shape [3, 9, 9]"]),
        (X, SEGMAP[[0, 1, 0]], ValueError, ["segmap has a batch of 3", "2, or 1"]),
        (X, SEGMAP.long(), TypeError, ["segmap has dtype torch.int64"]),
        (X, SEGMAP.double(), TypeError, ["segmap has dtype torch.float64", "torch.float32"]),
        (X, SEGMAP.to("meta"), ValueError, ["segmap is on meta", "cpu"]),
        (X.to("meta"), SEGMAP, ValueError, ["is on cpu", "meta"]),
        (X, SEGMAP.numpy(), TypeError, ["segmap is a ndarray"]),
    ],
)
def test_layer_and_block(x, segmap, error, words):
    for module in (
        spade_fast.SPADE(4, 3, 8),
        spade_fast.SPADEResnetBlock(4, 6, "spadeinstance", 3, nhidden=8),
    ):
        with pytest.raises(error) as raised:
            module(x, segmap)
        assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"norm_nc": 0}, ["norm_nc is 0"]),
        ({"label_nc": 3.5}, ["label_nc is 3.5"]),
        ({"kernel_size": 4}, ["kernel_size is 4", "odd"]),
        ({"norm": "layer"}, ["norm is 'layer'", "nn.Module"]),
        ({"spatial_dims": 4}, ["spatial_dims is 4", "1, 2 or 3"]),
        *(
            ({"norm": "group", "num_groups": number}, [f"num_groups is {number}", "norm_nc, 4"])
            for number in (3, 0, 2.0)
        ),
    ],
)
def test_spade_constructor(arguments, words):
    with pytest.raises((ValueError, TypeError)) as raised:
        spade_fast.SPADE(**{"norm_nc": 4, "label_nc": 3} | arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spectral",
        "spadeinstance4x4",
        "spadeinstance3x5",
        "spadelayer3x3",
        "instance3x3",
        "spectralspadespectralspade",
        "Spade",
        "spade3",
        "spadeinstance3x3 ",
        None,
        3,
    ],
)
def test_norm_g_outside_the_grammar(text):
    with pytest.raises(
        ValueError, match=r"norm_G is .*\[spectral\]spade\[spectral\]\[instance\|batch"
    ):
        spade_fast.SPADEResnetBlock(4, 4, text, 3)
    with pytest.raises(ValueError, match="config_text is"):
        spade_fast.SPADE.from_config(text, 4, 3)


@pytest.mark.parametrize(
    "text,spectral,norm,kernel_size",
    [
        ("spade", False, nn.InstanceNorm2d, 3),
        ("spadespectralinstance", True, nn.InstanceNorm2d, 3),
        ("spectralspadesyncbatch3x3", True, nn.SyncBatchNorm, 3),
        ("spectralspadebatch5x5", True, nn.BatchNorm2d, 5),
        ("spadegroup1x1", False, nn.GroupNorm, 1),
        ("spade7x7", False, nn.InstanceNorm2d, 7),
        ("spectralspade", True, nn.InstanceNorm2d, 3),
    ],
)
def test_norm_g(text, spectral, norm, kernel_size):
    block = spade_fast.SPADEResnetBlock(32, 64, text, 3, nhidden=8)
    assert type(block.norm_s.param_free_norm) is norm
    assert block.norm_0.mlp_beta.kernel_size == (kernel_size, kernel_size)
    assert all(
        hasattr(conv, "weight_orig") == spectral
        for conv in (block.conv_0, block.conv_1, block.conv_s)
    )
    if not spectral:
        layer = spade_fast.SPADE.from_config(text, 32, 3)
        assert type(layer.param_free_norm) is norm and layer.mlp_shared[0].kernel_size == (
            kernel_size,
            kernel_size,
        )


def test_the_layer_has_no_spectral_norm_to_configure():
    with pytest.raises(ValueError, match="it should be without 'spectral', which is for"):
        spade_fast.SPADE.from_config("spectralspadeinstance3x3", 4, 3)
