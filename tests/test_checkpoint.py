"""Weights in files: the network they belong to is found, and they are written and read without
loss.
"""

import copy
import itertools
import os
import pickle
import stat
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
from agree import assert_agree

from spade_fast import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator, checkpoint, reference

SMALL = {"ngf": 2, "nhidden": 2}
TINY = {"ngf": 1, "nhidden": 2}
official = SPADEGenerator.official
MADE = {  # together they have every argument of every network; the names say what is special
    "64²": lambda: official(3, crop_size=64, **TINY),
    "128²": lambda: official(184, crop_size=128, **TINY),
    "512²": lambda: official(3, crop_size=512, **TINY),
    "coco": lambda: official("coco", **TINY),
    "ade20k, most": lambda: official(
        "ade20k", num_upsampling_layers="most", crop_size=128, **SMALL
    ),
    "cityscapes": lambda: official("cityscapes", crop_size=128, norm_G="spadebatch1x1", **TINY),
    "aspect 2": lambda: official(3, crop_size=64, aspect_ratio=2, **TINY),
    "more": lambda: official(3, crop_size=64, num_upsampling_layers="more", **TINY),
    "vae": lambda: official(3, use_vae=True, z_dim=5, crop_size=64, **TINY),
    "vae, aspect 1/2, more": lambda: official(
        3,
        use_vae=True,
        crop_size=64,
        aspect_ratio=0.5,
        num_upsampling_layers="more",
        norm_G="spadespectralinstance5x5",
        **TINY,
    ),
    "group": lambda: SPADEGenerator(
        3, 4, 2, stages=[("a", 16, 2)], norm_G="spectralspadegroup3x3", nhidden=2
    ),
    "batch": lambda: SPADEGenerator(3, 4, 1, start=1, norm_G="spadebatch3x3", nhidden=2),
    "start": lambda: SPADEGenerator(3, 4, 1, start=(1, 4), nhidden=2),
    "no noise": lambda: SPADEGenerator(3, None, 1, start=2, nhidden=2),
    "own stages": lambda: SPADEGenerator(
        3, 4, 2, stages=[("b", 4, 3), ("a", 0.5, 1)], last_scale=1, output_nc=5, nhidden=2
    ),
    "1-D": lambda: SPADEGenerator(3, 4, 1, start=3, nhidden=2, output_nc=1, spatial_dims=1),
    "3-D": lambda: SPADEGenerator(
        3, 4, 1, stages=[("head", 16, 1), ("up", 1, 2)], start=(1, 2, 3), nhidden=2, spatial_dims=3
    ),
    "NumPy": lambda: SPADEGenerator(
        np.int64(3), np.int32(4), np.uint8(1), start=np.array([1, 2]), nhidden=np.int16(2)
    ),
    "encoder": lambda: ConvEncoder(1, 2, input_nc=4),
    "discriminator": lambda: MultiscaleDiscriminator(9, 3, 2),
    "discriminator, deep": lambda: MultiscaleDiscriminator(3, 1, 3, n_layers=5),
    "discriminator, flat": lambda: MultiscaleDiscriminator(3, 2, 3, n_layers=1),
    "discriminator, wide": lambda: MultiscaleDiscriminator(3, 1, 300, n_layers=2, spatial_dims=1),
    "3-D discriminator": lambda: MultiscaleDiscriminator(4, 1, 2, n_layers=2, spatial_dims=3),
}


def bare(network):
    """The network's weights without its arguments, as in older files."""
    return dict(network.state_dict())


def assert_same_weights(module, other):
    ours, theirs = module.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@torch.no_grad()
def output(network):
    torch.manual_seed(1)
    network.eval()
    if isinstance(network, SPADEGenerator):
        dims = len(network.start)
        return [network(torch.randn(1, network.label_nc, *[4] * dims))]
    if isinstance(network, ConvEncoder):
        return list(network(torch.randn(1, network.arguments["input_nc"], 8, 8)))
    results = network(torch.randn(1, network.input_nc, *[16] * network.spatial_dims))
    return list(itertools.chain(*results))


def assert_same(found, network):
    assert type(found) is type(network) and not found.training
    assert found.arguments == network.arguments
    assert getattr(found, "sizes", None) == getattr(network, "sizes", None)
    assert [str(part) for part in found.modules()] == [str(part) for part in network.modules()]
    assert_same_weights(found, network)
    assert all(map(torch.equal, output(found), output(network)))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", MADE)
def test_a_written_network_is_read_back_the_same(name, suffix, tmp_path):
    network, path = MADE[name](), tmp_path / f"latest_net.{suffix}"
    checkpoint.write(network, path)
    assert_same(checkpoint.load(path), network)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", MADE)
def test_arguments_recreate_the_same_network(name):
    network = MADE[name]()
    for same in (
        type(network)(**network.arguments),
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
    ):
        assert same.arguments == network.arguments and same.arguments is not network.arguments
        assert checkpoint.load(same.state_dict()).arguments == network.arguments


def test_files_of_torch_save_have_the_arguments_too(tmp_path):
    network = official(7, crop_size=64, aspect_ratio=2, **TINY)
    for weights in (
        network.state_dict(),
        nn.DataParallel(network).state_dict(),
        torch.compile(network).state_dict(),
        torch.optim.swa_utils.AveragedModel(network).state_dict(),
        {"state_dict": network.state_dict(), "epoch": 3},
    ):
        torch.save(weights, tmp_path / "net.pth")
        assert checkpoint.load(tmp_path / "net.pth").arguments == network.arguments


def test_published_code_reads_written_files(tmp_path):
    import safetensors.torch

    network, eager = official(7, crop_size=64, **TINY), reference.SPADEGenerator(7, 1, crop_size=64)
    eager = official(7, crop_size=64, **TINY)
    checkpoint.write(network, tmp_path / "net.pth")
    weights = torch.load(tmp_path / "net.pth", weights_only=True)
    assert weights.keys() == network.state_dict().keys()
    eager.load_state_dict(weights)
    assert_same_weights(eager, network)
    checkpoint.write(network, tmp_path / "net.safetensors")
    assert (
        safetensors.torch.load_file(tmp_path / "net.safetensors").keys()
        == network.state_dict().keys()
    )
    checkpoint.write(bare(network), tmp_path / "net.safetensors")
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="num_upsampling_layers or crop_size or aspect_ratio"):
        checkpoint.load(tmp_path / "net.safetensors")


def test_given_arguments_override_written_ones():
    weights = official(7, crop_size=64, aspect_ratio=2, **TINY).state_dict()
    assert checkpoint.load(weights, crop_size=128).sizes[-1] == (64, 128)
    assert checkpoint.load(weights, start=3).sizes[-1] == (96, 96)
    assert checkpoint.load(weights, num_upsampling_layers="more", crop_size=128).start == (1, 2)
    with pytest.raises(ValueError, match=r"ngf=3.* do not fit: fc.weight \[16, 7, 3, 3\] for"):
        checkpoint.load(weights, ngf=3)
    with pytest.raises(ValueError, match="crop_size cannot be given: .* SPADEGenerator.label_nc=3"):
        checkpoint.load(MADE["own stages"]().state_dict(), crop_size=64)
    with pytest.raises(
        TypeError, match="crop_size is not an argument of ConvEncoder, whose arguments are ndf"
    ):
        checkpoint.load(ConvEncoder(1, 2).state_dict(), crop_size=64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: official("coco", **TINY),
        lambda: official("ade20k", norm_G="spadeinstance5x5", **TINY),
        lambda: official("cityscapes", use_vae=True, z_dim=5, **TINY),
        lambda: SPADEGenerator(7, 5, 1, nhidden=2),
        lambda: SPADEGenerator(
            7, 5, 1, start=6, output_nc=1, spatial_dims=1, norm_G="spectralspadeinstance3x3"
        ),
        *(MADE[name] for name in MADE if "coder" in name or "discriminator" in name),
    ],
)
def test_a_network_is_found_by_its_weights_alone(make):
    network = make()
    assert_same(checkpoint.load(bare(network)), network)


def test_published_keys_fit_the_published_wiring():
    eager = reference.SPADEGenerator(7, 1, crop_size=64)
    assert_same_weights(checkpoint.load(eager.state_dict(), crop_size=64), eager)
    eager = reference.MultiscaleDiscriminator(9, 2, 2)
    assert_same_weights(checkpoint.load(eager.state_dict()), eager)


@pytest.mark.parametrize("divided", [0.0, float("nan")])
@pytest.mark.parametrize("weight,u", [(0.0, 1.0), (1.0, 0.0)])
def test_the_right_vector_of_zeros_is_zero(weight, u, divided):
    """For a weight of zeros, whatever the divided weight is, and for a u of zeros."""
    parts = {"orig": torch.full((2, 3), weight), "u": torch.full((2,), u)}
    weights = {f"weight_{name}": tensor for name, tensor in parts.items()}
    found = checkpoint.named_as_here(weights | {"weight": torch.full((2, 3), divided)})
    assert torch.equal(found["weight_v"], torch.zeros(3))


def test_arguments_that_weights_do_not_determine_can_be_given():
    weights = bare(official(184, **SMALL))
    assert checkpoint.load(weights).sizes[-1] == (256, 256)
    assert checkpoint.load(
        weights, num_upsampling_layers="more", crop_size=512, aspect_ratio=2.0
    ).sizes[-1] == (256, 512)


VAE = {"use_vae": True, "z_dim": 5, "crop_size": 128, "aspect_ratio": 2.0}
OWN = {"stages": [["b", 16, 3], ["a", 8, 1]], "last_scale": 1}


@pytest.mark.parametrize(
    "make,decides,enough",
    [
        (
            lambda: official(7, crop_size=128, num_upsampling_layers="more", **TINY),
            "num_upsampling_layers or crop_size or aspect_ratio should be given",
            {"crop_size": 128, "num_upsampling_layers": "more"},
        ),
        (
            lambda: official("coco", num_upsampling_layers="most", **SMALL),
            r"=256, .*, \.\.\.|such as .*: crop_size or aspect_ratio should be given",
            {"crop_size": 256},
        ),
        (
            lambda: official(7, **VAE, **TINY),
            r"\(num_upsampling_layers='normal', crop_size=128, aspect_ratio=2.0, …\)",
            {"crop_size": 128, "aspect_ratio": 2},
        ),
        (
            lambda: official(7, num_upsampling_layers="more", **VAE, **TINY),
            r"\(num_upsampling_layers='more', crop_size=128, aspect_ratio=2.0, …\)",
            {"aspect_ratio": 2, "num_upsampling_layers": "more"},
        ),
        (
            lambda: official("coco", use_vae=True, z_dim=5, crop_size=64, **TINY),
            r"\(num_upsampling_layers='more', crop_size=128, aspect_ratio=1.0, …\)",
            {"crop_size": 64},
        ),
        (
            lambda: SPADEGenerator(7, 5, 1, start=(1, 4), nhidden=2),
            r"SPADEGenerator\(start=\[1, 4\], …\), .*: start should be given",
            {"start": (1, 4)},
        ),
        (
            lambda: SPADEGenerator(7, None, 1, start=2, nhidden=2),
            "start should be given",
            {"start": 2},
        ),
        (
            lambda: SPADEGenerator(7, 5, 2, start=(2, 8), nhidden=2, **OWN),
            r"stages should be given, a \(name, width, scale\) for each of a, b",
            OWN | {"start": (2, 8)},
        ),
        (
            lambda: SPADEGenerator(7, 5, 4, norm_G="spadegroup3x3", nhidden=2, **OWN),
            "stages should be given",
            OWN | {"norm_G": "spadegroup3x3"},
        ),
    ],
)
def test_undetermined_arguments_are_asked_for(make, decides, enough):
    network = make()
    with pytest.raises(ValueError, match=decides):
        checkpoint.load(bare(network))
    assert_same(checkpoint.load(bare(network), **enough), network)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"crop_size": 100}, "crop_size is 100, .* should be 96 or 128"),
        ({"aspect_ratio": 0}, "aspect_ratio is 0"),
        ({"crop_size": 1024}, r"do not fit: fc.weight \[128, 5\] for \[16384, 5\]"),
        ({"crop_size": 64, "use_vae": False}, r"do not fit: fc.weight \[128, 5\] for \[16, 7"),
        ({"crop_size": 128, "start": 3}, "start is not an argument of SPADEGenerator.official"),
    ],
)
def test_given_arguments_that_cannot_fit(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        checkpoint.load(bare(official(7, **VAE, **TINY)), **arguments)


@pytest.mark.parametrize("keeps_divided", [False, True], ids=["without weight", "with weight"])
def test_spectral_norm_without_its_right_vector(keeps_divided):
    """As before PyTorch 1.1: in eval mode the result is that of the divided weight, if the file has
    it.
    """
    network = SPADEGenerator.official(7, crop_size=64, **SMALL).double()
    segmap = torch.randn(1, 7, 64, 64, dtype=torch.float64)
    network(segmap)
    weights = network.eval().state_dict()
    expected = network(segmap)
    for name, module in network.named_modules():
        if hasattr(module, "weight_u"):
            del weights[f"{name}.weight_v"]
            if keeps_divided:
                sigma = torch.dot(
                    module.weight_u, module.weight_orig.detach().flatten(1) @ module.weight_v
                )
                weights[f"{name}.weight"] = module.weight_orig.detach() / sigma
            else:  # without it, u alone determines σ
                module.weight_v.copy_(
                    nn.functional.normalize(
                        module.weight_orig.detach().flatten(1).t() @ module.weight_u, dim=0
                    )
                )
    expected, before = expected if keeps_divided else network(segmap), expected
    assert keeps_divided or (expected - before).abs().max() > 1e-3 * before.abs().max()
    assert_agree(checkpoint.load(weights, crop_size=64).double()(segmap).float(), expected)


def test_spectral_norm_as_a_parametrization():
    encoder = ConvEncoder(2, 5)
    weights = {
        key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith("layer2")
    }
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3, bias=False))
    weights |= {f"layer2.0.{key}": tensor for key, tensor in layer.state_dict().items()}
    assert any("parametrizations" in key for key in weights)
    found = checkpoint.load(weights).layer2[0]
    assert torch.equal(found.weight_orig, layer.parametrizations.weight.original)
    found(torch.zeros(1, 2, 8, 8))
    assert_agree(found.weight, layer.eval().weight)
    other = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3, bias=False))
    assert_same_weights(checkpoint.load_into(other, found.state_dict()), layer)


def test_names_of_the_sketch_and_of_data_parallel():
    network = SPADEGenerator(7, 5, 1)
    weights = {
        f"module.{key}".replace("mlp_shared.0", "shared.0").replace("mlp_", "conv_"): tensor
        for key, tensor in network.state_dict().items()
    }
    assert (
        "module.head.norm_0.shared.0.weight" in weights
        and "module.head.norm_0.conv_gamma.bias" in weights
    )
    assert_same_weights(checkpoint.load({"state_dict": weights}), network)


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.module.", "netG.", "netG.module._orig_mod.", "anything.at.all."],
)
def test_prefixes(prefix):
    generator, discriminator = MADE["64²"](), MultiscaleDiscriminator(9, 1, 2)
    for network in (generator, discriminator):
        weights = {f"{prefix}{key}": tensor for key, tensor in network.state_dict().items()}
        assert_same_weights(checkpoint.load(weights, **network.arguments), network)
        assert_same_weights(checkpoint.load_into(copy.deepcopy(network), weights), network)


def test_modules_with_a_prefix_of_their_own():
    network = MultiscaleDiscriminator(9, 1, 2)
    for wrapped in (nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel):
        other = MultiscaleDiscriminator(9, 1, 2)
        module = checkpoint.load_into(wrapped(other), bare(network))
        assert_same_weights(getattr(module, "module", other), network)


def test_dictionaries_of_several_networks(tmp_path):
    """`key` chooses one of them. An optimizer's moments are not a network's weights."""
    generator, averaged = MADE["64²"](), MADE["64²"]()
    discriminator = MultiscaleDiscriminator(9, 1, 2)
    optimizer = torch.optim.Adam(discriminator.parameters())
    discriminator(torch.randn(1, 9, 32, 32))[0][-1].sum().backward()
    optimizer.step()
    path = tmp_path / "all.pth"
    torch.save(
        {
            "epoch": 3,
            "best": torch.zeros(()),
            "optimizer": optimizer.state_dict(),
            "nets": {
                "model": nn.DataParallel(generator).state_dict(),
                "params_ema": averaged.state_dict(),
                "netD": discriminator.state_dict(),
            },
        },
        path,
    )
    several = "there are several networks; key should name one of them: 'nets.model.module', "
    for call in (checkpoint.load, lambda path: checkpoint.load_into(MADE["64²"](), path)):
        with pytest.raises(ValueError, match=several):
            call(path)
    for key, network in {
        "model": generator,
        "nets.params_ema": averaged,
        "netD": discriminator,
    }.items():
        assert_same(checkpoint.load(path, key=key), network)
        assert_same_weights(checkpoint.load_into(copy.deepcopy(network), path, key=key), network)
    assert checkpoint.read(path, key="netD").keys() == discriminator.state_dict().keys()
    assert_same_weights(
        checkpoint.load_into(MultiscaleDiscriminator(9, 1, 2), path), discriminator
    )  # no other network fits
    with pytest.raises(ValueError, match="key is 'netE'; it should be one of 'nets.model.module'"):
        checkpoint.load(path, key="netE")


def test_several_networks_in_one_state_dict():
    networks = nn.ModuleDict({"netG": MADE["64²"](), "netD": MultiscaleDiscriminator(9, 1, 2)})
    weights = networks.state_dict()
    with pytest.raises(ValueError, match="key should name one of them: 'netD', 'netG'"):
        checkpoint.load(weights)
    assert_same(checkpoint.load(weights, key="netG"), networks["netG"])
    with pytest.raises(ValueError, match="there are other weights beside these; key='netG'"):
        checkpoint.load_into(MADE["64²"](), weights)
    first = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3)).state_dict()
    with pytest.raises(ValueError, match="there are other weights beside these; key='0'"):
        checkpoint.load_into(nn.Linear(2, 2), first)


def test_old_files_without_counters():
    network = official("coco", **TINY)
    network.head_0.norm_0.param_free_norm.num_batches_tracked.fill_(7)
    weights = {
        key: tensor for key, tensor in bare(network).items() if "num_batches_tracked" not in key
    }
    assert len(weights) < len(network.state_dict())
    expected = copy.deepcopy(network)
    assert_same_weights(checkpoint.load_into(network, weights), expected)
    assert torch.equal(checkpoint.load(weights).fc.weight, network.fc.weight)
    norm = checkpoint.load_into(
        nn.BatchNorm2d(2),
        {
            "weight": torch.ones(2),
            "bias": torch.ones(2),
            "running_mean": torch.ones(2),
            "running_var": torch.ones(2),
        },
    )
    assert torch.equal(norm.running_mean, torch.ones(2))


def test_weights_that_do_not_fit_are_named_and_not_loaded():
    network, before = SPADEGenerator.official(7, **SMALL), None
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError) as error:
        checkpoint.load_into(
            network,
            SPADEGenerator.official("coco", num_upsampling_layers="most", **SMALL).state_dict(),
        )
    message = str(error.value)
    assert "these weights do not fit this SPADEGenerator" in message
    assert (
        "fc.weight [32, 184, 3, 3] for [32, 7, 3, 3]" in message
        and "and " in message
        and "more differs in shape" in message
    )
    assert "up_4.conv_0.bias" in message and "is not known" in message
    assert "SPADEGenerator.official(dataset='coco', num_upsampling_layers='most'" in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="the weights fit no known network: 0.weight"):
        checkpoint.load_into(network, nn.Sequential(nn.Linear(1, 1)).state_dict())
    weights = bare(network)
    with pytest.raises(
        ValueError, match="official.dataset=7, .* or of another network with the same names"
    ):
        checkpoint.load_into(official(8, **SMALL), weights)
    del weights["up_0.conv_s.weight_orig"]
    with pytest.raises(ValueError, match="but do not fit: up_0.conv_s.weight_orig is missing"):
        checkpoint.load_into(network, weights)


@pytest.mark.parametrize(
    "weight,message",
    [
        (torch.zeros(2, 2, dtype=torch.int8), "weight torch.int8 is not floating-point"),
        (torch.zeros(2, 2, dtype=torch.complex64), "torch.complex64 is not floating-point"),
        (torch.zeros(2, 2, device="meta"), "weight has no values"),
    ],
)
def test_weights_that_are_not_floating_point_numbers(weight, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.load_into(nn.Linear(2, 2), {"weight": weight, "bias": torch.zeros(2)})


def test_a_module_without_memory_is_not_loaded():
    with pytest.raises(ValueError, match="this Linear is on the meta device"):
        checkpoint.load_into(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2).state_dict())


def test_what_is_no_module():
    with pytest.raises(TypeError, match="module is a str; it should be a torch.nn.Module"):
        checkpoint.load_into("module", nn.Linear(2, 2).state_dict())


def test_a_module_is_never_half_loaded():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = nn.Parameter(torch.zeros(2, 1).expand(2, 2))  # cannot be copied into
    before = copy.deepcopy(module[0])
    with pytest.raises(RuntimeError):
        checkpoint.load_into(module, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict())
    assert_same_weights(module[0], before)


@pytest.mark.parametrize(
    "source,message",
    [
        ({}, "fit no known network: there are none"),
        ({"epoch": 3, "best": None}, "source is a dictionary of epoch, best"),
        (3, "source is a int; it should be"),
        (nn.Linear(2, 2).state_dict(), "no known network: weight, bias"),
    ],
)
def test_sources_that_are_not_state_dicts(source, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.load(source)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_arguments_that_were_changed_later_are_written(suffix, tmp_path):
    """Arguments of the constructor that are attributes."""
    network, path = SPADEGenerator(3, 4, 1, nhidden=2).eval(), tmp_path / f"net.{suffix}"
    network.last_scale, network.start = 3, (2, 8)
    checkpoint.write(network, path)
    found = checkpoint.load(path)
    assert (found.last_scale, found.start) == (3, (2, 8))
    segmap, z = torch.randn(1, 3, 8, 8), torch.randn(1, 4)
    assert torch.equal(found(segmap, z), network(segmap, z))


def change_kind(network):
    network.up_1.norm_0.param_free_norm = nn.GroupNorm(1, 16, affine=False)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda network: setattr(network.up_1.norm_0.param_free_norm, "eps", 0.1), "eps is 0.1, "),
        (
            change_kind,
            "up_1.norm_0.param_free_norm is a GroupNorm, it was built as a InstanceNorm2d",
        ),
        (lambda network: network.up_1.add_module("act", nn.ReLU()), "up_1.act was added"),
        (lambda network: delattr(network, "up_5"), "up_5 was removed"),
        (
            lambda network: nn.utils.spectral_norm(network.up_1.conv_0),
            "conv_0.tensors is .*weight_u",
        ),
    ],
)
def test_a_changed_network_is_not_written_as_the_original(change, words, tmp_path):
    network, path = SPADEGenerator(3, 4, 1, nhidden=2), tmp_path / "net.pth"
    change(network)
    for source in (network, network.state_dict(), nn.ModuleDict({"ema": network})):
        with pytest.raises(ValueError, match=words):
            checkpoint.write(source, path)
    assert not path.exists()
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match=f"SPADEGenerator that was changed after .*{words}"):
        checkpoint.load(path)
    checkpoint.write(dict(network.state_dict()), path)
    assert_same_weights(checkpoint.load_into(copy.deepcopy(network), path), network)


def test_changes_that_keep_the_network_the_same_are_allowed(tmp_path):
    network = SPADEGenerator.official(3, crop_size=64, ngf=2, nhidden=2, norm_G="spadebatch3x3")
    network.note, network.up_0 = "mine", torch.compile(network.up_0)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.up_1.conv_0.register_forward_hook(lambda *_: None)
    for source in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network.up_2))):
        checkpoint.write(source, tmp_path / "net.pth")
    checkpoint.write(network, tmp_path / "net.pth")
    found, weights = checkpoint.load(tmp_path / "net.pth").state_dict(), network.state_dict()
    weights = checkpoint.named_as_here(weights)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_networks_of_unknown_classes_are_not_taken_for_known_ones():
    class Own(SPADEGenerator):
        def forward(self, segmap, z=None):
            return -super().forward(segmap, z)

    with pytest.raises(
        ValueError, match="of .*Own, which is not a known network: use load_into with a"
    ):
        checkpoint.load(Own(3, 4, 1).state_dict())


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"weight": Code()}, tmp_path / "bad.pth")
    with pytest.raises(checkpoint.UnreadableFile, match="bad.pth .* it contains getattr, which"):
        checkpoint.read(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pth")


@pytest.mark.parametrize("zipped", [False, True])
def test_truncated_files(zipped, tmp_path):
    """Including files in torch.save's old format."""
    path = tmp_path / "net.pth"
    weights = {"weight": torch.ones(2)}
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for end in range(0, len(whole), 5):
        path.write_bytes(whole[:end])
        with pytest.raises(checkpoint.UnreadableFile, match="net.pth is not a file of weights, or"):
            checkpoint.load(path)
    for content in (3, [torch.ones(2)], {"epoch": 3}):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(checkpoint.UnreadableFile, match="net.pth .* it contains "):
            checkpoint.read(path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_without_weights(suffix, tmp_path):
    path = tmp_path / f"net.{suffix}"
    checkpoint.write(ConvEncoder(1, 2), path)
    whole = path.read_bytes()
    page = b"<html><head><title>404 Not Found</title></head></html>"
    for content in (b"", whole[:7], whole[:100], whole[: len(whole) // 2], whole[:-1], page):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"net.{suffix} is not a file of weights, or is incomplete"
        ):
            checkpoint.load(path)
    path.unlink()
    for call in (lambda: checkpoint.load(path), lambda: checkpoint.read(path)):
        with pytest.raises(FileNotFoundError, match=f"net.{suffix} does not exist"):
            call()
    path.mkdir()
    for call in (lambda: checkpoint.load(path), lambda: checkpoint.write({}, path)):
        with pytest.raises(IsADirectoryError, match=f"net.{suffix} is a directory. it should be"):
            call()
    with pytest.raises(FileNotFoundError, match="none should be a folder"):
        checkpoint.write({}, tmp_path / "none" / path.name)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "net.pth"
    checkpoint.write({"weight": torch.ones(1)}, path)
    with pytest.raises(Exception):
        checkpoint.write({"weight": lambda: None}, path)
    with pytest.raises(TypeError, match="source is a int; it should be a module or its state_dict"):
        checkpoint.write(5, path)
    assert torch.equal(checkpoint.read(path)["weight"], torch.ones(1)) and list(
        tmp_path.iterdir()
    ) == [path]
    with pytest.raises(TypeError, match="'weight' is a function; .safetensors should have"):
        checkpoint.write({"weight": lambda: None}, tmp_path / "net.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="pipe is a device or the like; it should be a file"):
            checkpoint.write({}, tmp_path / "pipe")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_full_disk_keeps_the_old_file(suffix, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    path = tmp_path / f"net.{suffix}"
    checkpoint.write({"weight": torch.ones(1)}, path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.write({"weight": torch.ones(2**16)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(checkpoint.read(path)["weight"], torch.ones(1))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_permissions_and_links_are_kept(suffix, tmp_path):
    path, plain = tmp_path / f"net.{suffix}", tmp_path / "plain"
    plain.touch()
    checkpoint.write({"weight": torch.ones(1)}, path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o640)
    link = tmp_path / f"latest.{suffix}"
    link.symlink_to(path.name)
    checkpoint.write({"weight": torch.zeros(1)}, link)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert torch.equal(checkpoint.read(path)["weight"], torch.zeros(1))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_two_concurrent_writers(suffix, tmp_path):
    """The file is always one of the two, and complete."""
    path = tmp_path / f"net.{suffix}"
    checkpoint.write({"weight": torch.zeros(999)}, path)

    def write(value):
        for _ in range(20):
            checkpoint.write({"weight": torch.full((999,), value)}, path)

    threads = [threading.Thread(target=write, args=(float(value),)) for value in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(checkpoint.read(path)["weight"].unique()) == 1
    for thread in threads:
        thread.join()
    assert list(tmp_path.iterdir()) == [path]
