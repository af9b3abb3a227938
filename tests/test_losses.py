"""The losses against numbers worked out by hand, and VGG19 against its convolutions written out."""

import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from agree import assert_agree

from spade_fast import MultiscaleDiscriminator, losses, reference
from spade_fast.losses import perceptual


def scale(*rows):
    """A layer's result [N, 1, 1, W], with a row for each image."""
    return torch.tensor(rows, dtype=torch.float64)[:, None, None].requires_grad_()


# Two scales of unequal size. Only the last layer counts: no loss may use the layer before it.
FAKES = [[scale([9e9]), scale([2, -3, 0.5, -1])], [scale([9e9]), scale([4])]]
REALS = [[scale([9e9]), scale([3, 0, -2, 0.5])], [scale([9e9]), scale([-1])]]


def sp(x):
    return math.log(1 + math.exp(x))


# Each value is the mean of the two scales' means.
BY_HAND = {  # generator, fakes, reals
    "hinge": (
        # scale 0: −(2 − 3 + 0.5 − 1) / 4 = 0.375; scale 1: −4
        (0.375 - 4) / 2,
        # max(0, 1 + x): (3 + 0 + 1.5 + 0) / 4 = 1.125; 5
        (1.125 + 5) / 2,
        # max(0, 1 − x): (0 + 1 + 3 + 0.5) / 4 = 1.125; 2
        (1.125 + 2) / 2,
    ),
    "least_squares": (
        # (x − 1)²: (1 + 16 + 0.25 + 4) / 4 = 5.3125; 9
        (5.3125 + 9) / 2,
        # x²: (4 + 9 + 0.25 + 1) / 4 = 3.5625; 16
        (3.5625 + 16) / 2,
        # (x − 1)²: (4 + 1 + 9 + 0.25) / 4 = 3.5625; 4
        (3.5625 + 4) / 2,
    ),
    "non_saturating": (
        ((sp(-2) + sp(3) + sp(-0.5) + sp(1)) / 4 + sp(-4)) / 2,
        ((sp(2) + sp(-3) + sp(0.5) + sp(-1)) / 4 + sp(4)) / 2,
        ((sp(-3) + sp(0) + sp(2) + sp(-0.5)) / 4 + sp(1)) / 2,
    ),
    "wasserstein": (
        (0.375 - 4) / 2,
        # (2 − 3 + 0.5 − 1) / 4 = −0.375; 4
        (-0.375 + 4) / 2,
        # −(3 + 0 − 2 + 0.5) / 4 = −0.375; 1
        (-0.375 + 1) / 2,
    ),
}


def close(number):
    return pytest.approx(number, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", BY_HAND)
def test_adversarial_losses_worked_out_by_hand(kind):
    generator, fake, real = BY_HAND[kind]
    assert losses.for_generator(FAKES, kind).item() == close(generator)
    assert [loss.item() for loss in losses.for_discriminator(FAKES, REALS, kind)] == [
        close(fake),
        close(real),
    ]
    assert losses.for_generator(FAKES, kind).shape == ()
    assert losses.KINDS.keys() == BY_HAND.keys()


def test_the_hinge_is_the_default_and_the_published_names_are_known():
    assert losses.for_generator(FAKES) == losses.for_generator(FAKES, "hinge")
    assert losses.for_discriminator(FAKES, REALS) == losses.for_discriminator(FAKES, REALS, "hinge")
    names = {"ls": "least_squares", "original": "non_saturating", "w": "wasserstein"}
    assert {name: losses.check_kind(name) for name in names} == names
    for name, own in names.items():
        assert losses.for_generator(FAKES, name) == losses.for_generator(FAKES, own)


@pytest.mark.parametrize("kind", ["Hinge", "", None, ["hinge"]])
def test_unknown_kinds(kind):
    words = "it should be one of hinge, least_squares, non_saturating, wasserstein"
    for call in (
        lambda: losses.check_kind(kind),
        lambda: losses.for_generator(FAKES, kind),
        lambda: losses.for_discriminator(FAKES, REALS, kind),
    ):
        with pytest.raises(ValueError, match=f"kind is {re.escape(repr(kind))}; {words}"):
            call()


def test_gradients_of_the_hinge_worked_out_by_hand():
    """Each place of the large scale has the weight 1/2 · 1/4, that of the small scale 1/2."""
    of_scales = [FAKES[0][-1], FAKES[1][-1]]
    large, small = torch.autograd.grad(losses.for_generator(FAKES), of_scales)
    assert large.flatten().tolist() == [-0.125] * 4 and small.item() == -0.5
    fake, _ = losses.for_discriminator(FAKES, REALS)
    large, small = torch.autograd.grad(fake, of_scales)  # only where x > −1
    assert large.flatten().tolist() == [0.125, 0, 0.125, 0] and small.item() == 0.5


@pytest.mark.parametrize("kind", losses.KINDS)
def test_gradients_of_every_kind(kind):
    x = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.for_generator([[x]], kind), x)
    assert torch.autograd.gradcheck(lambda x: losses.for_discriminator([[x]], [[x]], kind), x)


def test_logits_whose_exp_overflows():
    x = torch.tensor([[[[-1e4]]]])
    assert losses.for_generator([[x]], "non_saturating").item() == 1e4
    assert losses.for_discriminator([[x]], [[-x]], "non_saturating") == (0, 0)


def test_images_have_equal_weights():
    """A batch is the mean of its images."""
    two = [[scale([1, 2], [3, 6])]]
    assert losses.for_generator(two, "w").item() == -3


def test_feature_matching_worked_out_by_hand():
    fakes = [[scale([1, 2]), scale([5, 5, 5, 1]), scale([7])], [scale([3]), scale([8])]]
    reals = [[scale([2, 4]), scale([5, 1, 5, 5]), scale([9])], [scale([-1]), scale([0])]]
    # scale 0: (1 + 2) / 2 + (0 + 4 + 0 + 4) / 4 = 3.5; scale 1: 4; by 2 scales
    loss = losses.feature_matching(fakes, reals)
    assert loss.item() == close((3.5 + 4) / 2) and loss.shape == ()
    loss.backward()
    assert fakes[0][0].grad.flatten().tolist() == [-0.25, -0.25]  # sign / (2 places · 2 scales)
    assert fakes[0][1].grad.flatten().tolist() == [0, 0.125, 0, -0.125]
    assert fakes[1][0].grad.item() == 0.5
    assert all(x.grad is None for x in (fakes[0][2], fakes[1][1], *reals[0], *reals[1]))


def test_kl_divergence_worked_out_by_hand():
    mu = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    logvar = torch.tensor([[0.0, math.log(4)], [0.0, -1.0]], dtype=torch.float64)
    logvar.requires_grad_()
    # 1 + 0 − 1 − 1 = −1; 1 + log 4 − 4 − 4 = log 4 − 7; 0; 1 − 1 − 0 − 1/e = −1/e
    loss = losses.kl_divergence(mu, logvar)
    assert loss.item() == close(-0.5 * (-1 + math.log(4) - 7 - 1 / math.e)) and loss.shape == ()
    loss.backward()
    assert torch.equal(mu.grad, mu.detach())
    assert_agree(logvar.grad, 0.5 * (logvar.detach().exp() - 1))
    assert losses.kl_divergence(torch.zeros(3, 2), torch.zeros(3, 2)) == 0


def test_a_batch_of_fakes_and_reals_is_split():
    discriminator = MultiscaleDiscriminator(5, 2, 2, n_layers=2).double().eval()
    fakes, reals = torch.randn(2, 2, 3, 16, 16).double()
    segmap = torch.randn(2, 2, 16, 16).double()
    halves = losses.halves(discriminator(torch.cat([fakes, reals]), segmap))
    for half, images in zip(halves, (fakes, reals)):
        alone = discriminator(images, segmap)
        assert [len(scale) for scale in half] == [len(scale) for scale in alone] == [3, 3]
        for scale, other in zip(half, alone):
            assert_agree(scale, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x = torch.full((2, 1, 4, 1), 300.0, dtype=dtype)  # x² overflows in float16
    kept = x.double().flatten()[0].item()
    assert losses.for_generator([[x]], "ls").item() == (kept - 1) ** 2
    assert losses.feature_matching([[x, x]], [[-x, x]]).item() == 2 * kept
    mu = x[:, 0, :, 0]
    assert losses.kl_divergence(mu, torch.zeros_like(mu)).item() == 4 * kept**2
    assert losses.for_generator([[x]]).dtype == torch.float32


RESULTS = [[torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 1, 1)]]


@pytest.mark.parametrize(
    "results,words",
    [
        (torch.zeros(2, 1), "is torch.float32; it should be a list for each scale"),
        (RESULTS[0], "is a list of torch.float32; it should be a list for each scale"),
        ([[]], "is a list of a list of nothing; it should be"),
        ([[torch.zeros(2, dtype=torch.int64)]], "is a list of a list of torch.int64; it should be"),
        ([[None]], "is a list of a list of NoneType; it should be"),
        ([], "has no elements; it should have at least a scale and an image"),
        ([[torch.zeros(0, 1, 2, 2)]], "has no elements"),
    ],
)
def test_invalid_results(results, words):
    for name, call in [
        ("results", lambda: losses.for_generator(results)),
        ("results", lambda: losses.halves(results)),
        ("fakes", lambda: losses.for_discriminator(results, RESULTS)),
        ("reals", lambda: losses.for_discriminator(RESULTS, results)),
        ("fakes", lambda: losses.feature_matching(results, RESULTS)),
        ("reals", lambda: losses.feature_matching(RESULTS, results)),
    ]:
        with pytest.raises((TypeError, ValueError), match=f"^{name} {words}"):
            call()


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"results has a tensor \[3, 1\]; it should be \[2N, …\]"):
        losses.halves([[torch.zeros(3, 1)]])
    with pytest.raises(ValueError, match=r"fakes has shapes .*; it should have those of reals"):
        losses.feature_matching(RESULTS, [[x[:1] for x in RESULTS[0]]])  # they would broadcast
    with pytest.raises(ValueError, match="fakes has shapes"):
        losses.feature_matching(RESULTS, [*RESULTS, *RESULTS])
    with pytest.raises(ValueError, match="fakes has one layer in each scale"):
        losses.feature_matching([RESULTS[0][-1:]], [RESULTS[0][-1:]])
    with pytest.raises(
        ValueError, match=r"logvar has shape \[1, 2\]; it should be that of mu, \[3"
    ):
        losses.kl_divergence(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="logvar is torch.int64; it should be"):
        losses.kl_divergence(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="mu is float; it should be"):
        losses.kl_divergence(0.5, torch.zeros(3))


# VGG19's convolutions by torchvision's indices: input and output channels.
CONVOLUTIONS = {
    **{0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256)},
    **{12: (256, 256), 14: (256, 256), 16: (256, 256), 19: (256, 512), 21: (512, 512)},
    **{23: (512, 512), 25: (512, 512), 28: (512, 512), 30: (512, 512), 32: (512, 512)},
    34: (512, 512),
}


@pytest.fixture(scope="module")
def weights():
    """The contents of a made-up file, with torchvision's names and shapes except for a small
    classifier.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for place, (before, width) in CONVOLUTIONS.items():
        deviation = (2 / (9 * before)) ** 0.5
        drawn = torch.randn(width, before, 3, 3, generator=generator)
        found[f"features.{place}.weight"] = drawn * deviation
        found[f"features.{place}.bias"] = torch.randn(width, generator=generator) / 10
    for place in (0, 3, 6):
        found[f"classifier.{place}.weight"] = torch.zeros(2, 2)
        found[f"classifier.{place}.bias"] = torch.zeros(2)
    return found


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / perceptual.FILE
    torch.save(weights, path)
    return path


def plain_features(weights, image):
    """The five features, with everything written out."""
    x, found = image, []
    for place in CONVOLUTIONS:
        if place > 28:
            break
        if place in (5, 10, 19, 28):
            x = F.max_pool2d(x, 2, 2)
        x = F.conv2d(
            x,
            weights[f"features.{place}.weight"].double(),
            weights[f"features.{place}.bias"].double(),
            padding=1,
        ).clamp(min=0)
        if place in (0, 5, 10, 19, 28):
            found.append(x)
    return found


def test_vgg19_is_its_convolutions_written_out(weights, file):
    network = losses.Perceptual(file).double()
    fake, real = torch.rand(2, 1, 3, 32, 35).double() * 2 - 1
    fake.requires_grad_()
    real.requires_grad_()
    ours, truth = network.vgg(fake), plain_features(weights, fake)
    assert [list(x.shape[1:]) for x in ours] == [
        [64, 32, 35],
        [128, 16, 17],
        [256, 8, 8],
        [512, 4, 4],
        [512, 2, 2],
    ]
    assert_agree(ours, truth)
    assert all(one.abs().max() > 0.1 for one in truth)
    wanted = plain_features(weights, real.detach())
    expected = sum(
        weight * (one - other).abs().mean()
        for weight, one, other in zip([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1], truth, wanted)
    )
    loss = network(fake, real)
    assert loss.shape == () and loss.item() == close(expected.item())
    written_out = reference.Perceptual()
    written_out.load_state_dict(network.vgg.state_dict())
    assert written_out.double()(fake, real).item() == close(expected.item())
    (ours,), (truth,) = torch.autograd.grad(loss, fake), torch.autograd.grad(expected, fake)
    assert_agree(ours, truth)
    assert truth.abs().max() > 0
    network(fake, real).backward()
    assert real.grad is None and fake.grad is not None
    assert all(parameter.grad is None for parameter in network.parameters())


def test_vgg19_has_torchvisions_names(weights):
    network = losses.VGG19(weights)
    assert isinstance(network.features, nn.Sequential)
    assert list(network.state_dict()) == list(weights)[:26]
    assert all(torch.equal(network.state_dict()[key], weights[key]) for key in list(weights)[:26])
    assert not any(parameter.requires_grad for parameter in network.parameters())
    first = "features.0.weight"
    assert network.state_dict()[first].data_ptr() != weights[first].data_ptr()


def test_perceptual_stays_in_eval_mode_and_draws_no_random_numbers(weights):
    state = torch.get_rng_state()
    network = losses.Perceptual(weights)
    assert torch.equal(torch.get_rng_state(), state)
    for module in network.train().modules():
        assert not module.training
    nn.ModuleList([network]).train()
    assert not network.training and not network.vgg.training


def test_weights_in_safetensors(weights, tmp_path):
    import safetensors.torch

    safetensors.torch.save_file(weights, tmp_path / "vgg.safetensors")
    network = losses.VGG19(tmp_path / "vgg.safetensors")
    assert torch.equal(network.features[28].weight, weights["features.28.weight"])


def test_weights_in_the_cache_of_torch_hub(file, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    for words in (perceptual.FILE, str(folder), "--vgg-weights FILE", "--no-perceptual"):
        with pytest.raises(FileNotFoundError, match=re.escape(words)):
            losses.Perceptual()
    folder.mkdir(parents=True)
    (folder / "vgg19_bn-c79401a0.pth").symlink_to(file)  # another network's
    with pytest.raises(FileNotFoundError):
        losses.Perceptual()
    (folder / perceptual.FILE).symlink_to(file)
    assert isinstance(losses.Perceptual(), nn.Module)
    (folder / "vgg19-12345678.pth").symlink_to(file)
    with pytest.raises(ValueError, match="vgg19-12345678.pth, vgg19-dcbb9e9d.pth: --vgg-weights"):
        losses.Perceptual()


@pytest.mark.parametrize(
    "change,words",
    [
        ({"features.5.bias": None}, "features.5.bias is missing"),
        (
            {"features.2.weight": torch.zeros(64, 3, 3, 3)},
            r"features.2.weight \[64, 3, 3, 3\] for \[64, 64, 3, 3\] differs in shape",
        ),
        ({"features.36.weight": torch.zeros(1)}, "features.36.weight is not known"),
        ({"classifier.6.other": torch.zeros(1)}, "classifier.6.other is not known"),
        (
            {"features.0.bias": torch.zeros(64, dtype=torch.int64)},
            "features.0.bias torch.int64 is not floating-point",
        ),
        (
            {"features.1.running_mean": torch.zeros(64)},
            "They have batch norms, like those of vgg19_bn",
        ),
    ],
)
def test_weights_of_something_else(weights, change, words):
    changed = {key: tensor for key, tensor in (weights | change).items() if tensor is not None}
    begin = "weights are not torchvision's of VGG19 .vgg19-dcbb9e9d.pth.: "
    with pytest.raises(ValueError, match=f"^{begin}.*{words}"):
        losses.Perceptual(changed)


def test_ruined_files(file, tmp_path):
    for name, content in {"empty.pth": b"", "text.pth": b"weights", "cut.pth": None}.items():
        path = tmp_path / name
        path.write_bytes(file.read_bytes()[:100_000] if content is None else content)
        with pytest.raises(ValueError, match=f"{name} is not a file of weights"):
            losses.Perceptual(path)
    with pytest.raises(FileNotFoundError, match="none.pth does not exist"):
        losses.Perceptual(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(
        ValueError, match="list.pth is not a file of weights, .* it contains a list"
    ):
        losses.Perceptual(tmp_path / "list.pth")


def test_images_that_do_not_fit(weights):
    network, image = losses.Perceptual(weights), torch.zeros(1, 3, 16, 16)
    assert network(image, image) == 0
    for fake, real, error, words in [
        (image[:, :, :15], image, ValueError, r"fake has shape \[1, 3, 15, 16\]; it should be \[N"),
        (image, image[:, :2], ValueError, r"real has shape \[1, 2, 16, 16\]"),
        (image[0], image, ValueError, r"fake has shape \[3, 16, 16\]"),
        (image[:0], image[:0], ValueError, r"fake has shape \[0, 3, 16, 16\]"),
        (
            image,
            image.repeat(2, 1, 1, 1),
            ValueError,
            "fake has shape .* it should be that of real",
        ),
        (image.byte(), image, TypeError, "fake is torch.uint8; it should be"),
        (image, None, TypeError, "real is NoneType; it should be"),
    ]:
        with pytest.raises(error, match=words):
            network(fake, real)
