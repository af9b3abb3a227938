"""The published networks' properties are pinned, because the reference is the truth of every other
test.
"""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from spade_fast import reference


def test_the_formula_element_by_element():
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


class Numbers(nn.Module):
    """A network with a few numbers as parameters; `forward` computes its result from them."""

    def __init__(self, forward, **values):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))
        self.computes = forward

    def forward(self, *inputs):
        return self.computes(self, *inputs)


def judge():
    """One scale with the features a · image and the result b · a · image, and another scale without
    features, whose result is the condition.
    """
    return Numbers(
        lambda own, x: [[own.a * x[:, 1:], own.b * own.a * x[:, 1:]], [x[:, :1]]], a=2.0, b=0.5
    )


def adam(before, lr, gradient):
    """Adam's first step from here: its second moment is gradient²."""
    return pytest.approx(before - lr * gradient / (abs(gradient) + 1e-8), rel=1e-14)


CONDITION = torch.full((1, 1, 1, 1), 0.6, dtype=torch.float64)
REAL = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)


def test_a_published_step_worked_out_by_hand():
    """The generator's image is w · condition = 0.15, and the real image is 0.5."""
    generator = Numbers(lambda own, segmap: own.w * segmap, w=0.25)
    discriminator = judge()
    trainer = reference.PublishedTrainer(
        generator, discriminator, perceptual=lambda fake, real: 3 * (real - fake).sum()
    )
    losses = trainer.step(CONDITION, REAL)
    w = 0.25 + 1e-4  # of the next fake, after a step along the negative gradient
    expected = {
        "adversarial": (-0.15 - 0.6) / 2,
        "feature_matching": 2 * (0.5 - 0.15) / 2,
        "perceptual": 3 * (0.5 - 0.15),
        "fake": ((1 + 0.6 * w) + 1.6) / 2,
        "real": (0.5 + 0.4) / 2,
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        # w leaves out Adam's 1e-8
        assert losses[name].item() == pytest.approx(value, rel=1e-12), name
    # The first loss has −b·a/2, the second 10 · −a/2, the third 10 · −3, all times the condition.
    gradient = 0.6 * (-0.5 - 10 - 30)
    assert generator.w.grad.item() == pytest.approx(gradient, rel=1e-14)
    assert generator.w.item() == adam(0.25, 1e-4, gradient)
    # Only of the second step: ½ (b·a·fake − b·a·real).
    difference = 0.6 * generator.w.item() - 0.5
    for number, before, factor in ((discriminator.a, 2.0, 0.5), (discriminator.b, 0.5, 2.0)):
        assert number.grad.item() == pytest.approx(factor * difference / 2, rel=1e-12)
        assert number.item() == adam(before, 4e-4, factor * difference / 2)


def test_a_published_step_with_an_encoder_worked_out_by_hand():
    """The image is z itself: 0.3 + exp(0 / 2) · 0.4 = 0.7 at first, then another value with other
    noise.
    """
    generator = Numbers(lambda own, segmap, z: own.w * z[..., None, None], w=1.0)
    encoder = Numbers(
        lambda own, image: (own.mu + 0 * image[..., 0, 0], own.logvar + 0 * image[..., 0, 0]),
        mu=0.3,
        logvar=0.0,
    )
    trainer = reference.PublishedTrainer(
        generator,
        judge(),
        encoder,
        weights={
            "adversarial": 1,
            "feature_matching": 10,
            "kl": 0.05,
        },
    )
    noise = iter(torch.tensor([[[0.4]], [[-2.0]]], dtype=torch.float64))
    losses = trainer.step(CONDITION, REAL, noise)
    assert next(noise, None) is None
    assert losses["kl"].item() == pytest.approx(-0.5 * (1 + 0 - 0.09 - 1), rel=1e-12)
    assert losses["adversarial"].item() == pytest.approx((-0.7 - 0.6) / 2, rel=1e-12)
    of_fake = -0.5 + 10  # the fake is now larger than the real image
    gradients = {
        "mu": of_fake + 0.05 * 0.3,
        "logvar": of_fake * 0.5 * 0.4,  # KL has ½ (exp(0) − 1) = 0
    }
    for name, gradient in gradients.items():
        number = getattr(encoder, name)
        assert number.grad.item() == pytest.approx(gradient, rel=1e-12)
        assert number.item() == adam({"mu": 0.3, "logvar": 0.0}[name], 1e-4, gradient)
    mu, logvar, w = encoder.mu.item(), encoder.logvar.item(), generator.w.item()
    fake = w * (mu - 2 * math.exp(logvar / 2))  # −1.7: beyond the hinge
    assert fake < -1 and losses["fake"].item() == pytest.approx((0 + 1.6) / 2, rel=1e-12)


def test_a_published_step_of_the_published_networks():
    """All networks are in train mode and change. If noise is given, it determines the fakes."""
    torch.manual_seed(0)
    generator = reference.SPADEGenerator(3, 1, crop_size=64, use_vae=True, z_dim=2)
    networks = generator, reference.MultiscaleDiscriminator(6, 2, 1), reference.ConvEncoder(1, 2)
    trainers = [
        reference.PublishedTrainer(*(copy.deepcopy(network).eval() for network in networks))
        for _ in range(2)
    ]
    segmap, image = torch.randn(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    numbers = torch.randn(2, 1, 2)
    losses = [trainer.step(segmap, image, iter(numbers)) for trainer in trainers]
    assert losses[0] == losses[1] and losses[0].keys() == {
        *("adversarial", "feature_matching", "kl", "fake", "real")
    }
    assert not any(loss.requires_grad for loss in losses[0].values())
    trained = trainers[0]
    assert trained.generator.head_0.norm_0.param_free_norm.num_batches_tracked == 2
    for before, after in zip(networks, (trained.generator, trained.discriminator, trained.encoder)):
        for (name, one), other in zip(before.named_parameters(), after.parameters()):
            assert not torch.equal(one, other), name


def test_the_reference_imports_nothing_of_the_project():
    source = open(reference.__file__).read()
    assert "spade_fast" not in source and "from ." not in source
