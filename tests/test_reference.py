"""The published networks' facts, pinned: the reference is the truth of every other test."""

import pytest
import torch
import torch.nn.functional as F

from spade_fast import reference


def test_the_formula_written_out():
    """Equation 1 of the paper, element by element, in Python floats."""
    layer = reference.SPADE(2, 3, 4).double()
    x, segmap = torch.randn(1, 2, 3, 3).double(), torch.randn(1, 3, 6, 6).double()
    hidden = F.relu(
        F.conv2d(
            segmap[:, :, ::2, ::2], layer.mlp_shared[0].weight, layer.mlp_shared[0].bias, padding=1
        )
    )
    gamma = F.conv2d(hidden, layer.mlp_gamma.weight, layer.mlp_gamma.bias, padding=1)
    beta = F.conv2d(hidden, layer.mlp_beta.weight, layer.mlp_beta.bias, padding=1)
    y = layer(x, segmap)
    for c in range(2):
        plane = x[0, c].flatten().tolist()
        mean = sum(plane) / 9
        deviation = (sum((value - mean) ** 2 for value in plane) / 9 + 1e-5) ** 0.5
        for i in range(9):
            expected = (plane[i] - mean) / deviation * (1 + gamma[0, c].flatten()[i].item()) + beta[
                0, c
            ].flatten()[i].item()
            assert y[0, c].flatten()[i].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "norm,running",
    [("instance", []), ("batch", ["running_mean", "running_var", "num_batches_tracked"])],
)
def test_keys_of_the_layer(norm, running):
    convolutions = [
        f"{name}.{part}"
        for name in ("mlp_shared.0", "mlp_gamma", "mlp_beta")
        for part in ("weight", "bias")
    ]
    assert (
        list(reference.SPADE(4, 3, norm=norm).state_dict())
        == [f"param_free_norm.{name}" for name in running] + convolutions
    )


def test_keys_of_the_spectral_block():
    keys = list(reference.SPADEResnetBlock(4, 8, "spectralspadeinstance3x3", 3).state_dict())
    assert keys[:11] == [
        "conv_0.bias",
        "conv_0.weight_orig",
        "conv_0.weight_u",
        "conv_0.weight_v",
        "conv_1.bias",
        "conv_1.weight_orig",
        "conv_1.weight_u",
        "conv_1.weight_v",
        "conv_s.weight_orig",
        "conv_s.weight_u",
        "conv_s.weight_v",
    ]


@pytest.mark.parametrize(
    "label_nc,settings,keys,millions",
    [
        (184, {}, 234, 97.48),
        (151, {}, 234, 96.49),
        (36, {"crop_size": 512, "aspect_ratio": 2.0, "num_upsampling_layers": "more"}, 234, 93.05),
        (184, {"num_upsampling_layers": "most", "crop_size": 512}, 272, None),
    ],
)
def test_published_generators(label_nc, settings, keys, millions):
    with torch.device("meta"):
        generator = reference.SPADEGenerator(label_nc, **settings)
    assert len(generator.state_dict()) == keys
    if millions:
        assert sum(
            parameter.numel() for parameter in generator.parameters()
        ) / 1e6 == pytest.approx(millions, abs=0.005)


def test_spade_shapes_of_the_coco_generator():
    shapes = []
    with torch.device("meta"):
        generator = reference.SPADEGenerator(184, norm_G="spectralspadeinstance3x3")
        for module in generator.modules():
            if isinstance(module, reference.SPADE):
                module.register_forward_pre_hook(
                    lambda module, inputs: shapes.append(inputs[0].shape[1:3])
                )
        image = generator(torch.randn(1, 184, 256, 256))
    assert image.shape == (1, 3, 256, 256)
    expected = {
        (1024, 8): 2,
        (1024, 16): 4,
        (1024, 32): 2,
        (512, 32): 1,
        (512, 64): 2,
        (256, 64): 1,
        (256, 128): 2,
        (128, 128): 1,
        (128, 256): 2,
        (64, 256): 1,
    }
    assert {shape: shapes.count(torch.Size(shape)) for shape in expected} == expected and len(
        shapes
    ) == 18


@pytest.mark.parametrize(
    "settings,shape",
    [
        ({"crop_size": 64, "use_vae": True}, (64, 64)),
        ({"crop_size": 128, "aspect_ratio": 2.0, "num_upsampling_layers": "more"}, (64, 128)),
        ({"crop_size": 256, "num_upsampling_layers": "most"}, (256, 256)),
    ],
)
def test_wirings(settings, shape):
    generator = reference.SPADEGenerator(3, 2, norm_G="spadeinstance3x3", **settings).eval()
    image = generator(torch.randn(2, 3, *shape), torch.randn(2, 256))
    assert image.shape == (2, 3, *shape) and image.abs().max() <= 1


def test_the_reference_imports_nothing_of_the_project():
    source = open(reference.__file__).read()
    assert "spade_fast" not in source and "from ." not in source
