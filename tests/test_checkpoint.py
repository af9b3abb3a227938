"""Weights in files: the network that they are of is found, and they get in and out without loss."""

import pickle

import pytest
import torch
import torch.nn as nn

from spade_fast import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator, checkpoint, reference

SMALL = {"ngf": 2, "nhidden": 2}


def assert_same_weights(module, other):
    ours, theirs = module.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SPADEGenerator.official("coco", **SMALL),
        lambda: SPADEGenerator.official("ade20k", num_upsampling_layers="most", **SMALL),
        lambda: SPADEGenerator.official("cityscapes", use_vae=True, z_dim=5, **SMALL),
        lambda: SPADEGenerator.official(7, norm_G="spadeinstance5x5", **SMALL),
        lambda: SPADEGenerator.official(
            "coco", use_vae=True, crop_size=512, norm_G="spadesyncbatch1x1", **SMALL
        ),
        lambda: SPADEGenerator(7, 5, 1),
        lambda: SPADEGenerator(
            7, 5, 1, start=2, output_nc=1, spatial_dims=1, norm_G="spectralspadeinstance3x3"
        ),
        lambda: ConvEncoder(2, 5),
        lambda: MultiscaleDiscriminator(9, 3, 2),
        lambda: MultiscaleDiscriminator(4, 1, 2, spatial_dims=3),
    ],
    ids=[
        "coco",
        "most",
        "vae",
        "instance 5×5",
        "vae 512",
        "from noise",
        "1-D",
        "encoder",
        "discriminator",
        "3-D discriminator",
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_network_is_found_by_its_weights_alone(make, suffix, tmp_path):
    network, path = make(), tmp_path / f"latest_net.{suffix}"
    checkpoint.write(network, path)
    found = checkpoint.load(path)
    assert not found.training and getattr(found, "sizes", None) == getattr(network, "sizes", None)
    assert_same_weights(found, network)
    assert [str(module) for module in found.modules()] == [
        str(module) for module in network.modules()
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_published_keys_fit_the_published_wiring():
    eager = reference.SPADEGenerator(7, 1, crop_size=64)
    assert_same_weights(checkpoint.load(eager.state_dict(), crop_size=64), eager)


def test_what_weights_do_not_say_may_be_said():
    weights = SPADEGenerator.official(184, **SMALL).state_dict()
    assert checkpoint.load(weights).sizes[-1] == (256, 256)
    assert checkpoint.load(
        weights, num_upsampling_layers="more", crop_size=512, aspect_ratio=2.0
    ).sizes[-1] == (256, 512)


@pytest.mark.parametrize("keeps_divided", [False, True], ids=["without weight", "with weight"])
def test_spectral_norm_without_its_right_vector(keeps_divided):
    """As before PyTorch 1.1: in eval mode the result is the divided weight's, which was kept
    beside.
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
            else:  # σ is then what u alone says
                module.weight_v.copy_(
                    nn.functional.normalize(
                        module.weight_orig.detach().flatten(1).t() @ module.weight_u, dim=0
                    )
                )
    expected, before = expected if keeps_divided else network(segmap), expected
    assert keeps_divided or not torch.allclose(expected, before, rtol=1e-3)
    assert torch.allclose(
        checkpoint.load(weights, crop_size=64).double()(segmap), expected, atol=1e-5
    )


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
    assert torch.allclose(found.weight, layer.eval().weight, atol=1e-6)


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


def test_weights_that_do_not_fit_are_named_and_nothing_is_lost():
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
        and "more has another shape" in message
    )
    assert "up_4.conv_0.bias" in message and "is not known" in message
    assert "SPADEGenerator.official(dataset='coco', num_upsampling_layers='most'" in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="they are of no network that is known here: 0.weight"):
        checkpoint.load_into(network, nn.Sequential(nn.Linear(1, 1)).state_dict())


@pytest.mark.parametrize(
    "source,message",
    [
        ({}, "of no network that is known here: there are none"),
        ({"epoch": 3, "best": None}, "source is a dictionary of epoch, best"),
        (3, "source is int"),
        (nn.Linear(2, 2).state_dict(), "known here: weight, bias"),
    ],
)
def test_what_is_no_state_dict(source, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.load(source)


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"weight": Code()}, tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.read(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pth")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "net.pth"
    checkpoint.write({"weight": torch.ones(1)}, path)
    with pytest.raises(Exception):
        checkpoint.write({"weight": lambda: None}, path)
    assert torch.equal(checkpoint.read(path)["weight"], torch.ones(1)) and list(
        tmp_path.iterdir()
    ) == [path]
