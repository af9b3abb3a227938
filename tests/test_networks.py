"""The networks against the reference: outputs, gradients and buffers, in train and in eval mode,
after steps of an optimizer.
"""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from agree import CANCELLED, NETWORK, assert_agree, assert_layers_agree
from conftest import use_threads
from label_maps import LABEL_NC, layout_of

import spade_fast
from spade_fast import (
    SPADE,
    ConvEncoder,
    MultiscaleDiscriminator,
    SemanticLayout,
    SPADEGenerator,
    reference,
)
from spade_fast.agreement import excess


def assert_parity(ours, eager, inputs_of_step, steps=3, our_inputs=lambda *inputs: inputs):
    """In float64, to 1e-10 of a module's largest number: outputs, gradients and buffers over some
    steps of SGD, then in eval mode.

    With SGD, not Adam: where only rounding keeps a gradient from zero, as for a bias before a norm,
    Adam turns the rounding into whole steps.
    """
    ours, eager = ours.double(), eager.double()
    ours.load_state_dict(eager.state_dict())
    optimizers = [torch.optim.SGD(network.parameters(), 1e-4) for network in (ours, eager)]
    for step in range(steps + 1):
        inputs = inputs_of_step(step)
        results = []
        for network, optimizer, arguments in zip(
            (ours, eager), optimizers, (our_inputs(*inputs), inputs)
        ):
            network.train(step < steps)
            optimizer.zero_grad()
            outputs = flat(network(*arguments))
            sum(
                (
                    output
                    * (
                        index
                        + torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(
                            output.shape
                        )
                    )
                ).sum()
                for index, output in enumerate(outputs)
            ).backward()
            found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
            found |= {
                f"{name} gradient": parameter.grad.clone()
                for name, parameter in network.named_parameters()
            }
            results.append(
                found | {name: buffer.clone() for name, buffer in network.named_buffers()}
            )
            optimizer.step()
        assert_layers_agree(*results, CANCELLED)


def flat(results):
    return (
        [tensor for result in results for tensor in flat(result)]
        if isinstance(results, (list, tuple))
        else [results]
    )


@pytest.mark.parametrize(
    "norm_G,settings,size",
    [
        ("spadeinstance3x3", {"crop_size": 64}, (64, 64)),
        (
            "spectralspadesyncbatch3x3",
            {"crop_size": 128, "num_upsampling_layers": "more", "aspect_ratio": 2.0},
            (32, 64),
        ),
        (
            "spectralspadebatch1x1",
            {"crop_size": 128, "num_upsampling_layers": "most", "use_vae": True},
            (128, 128),
        ),
    ],
    ids=["normal", "more", "most"],
)
@pytest.mark.parametrize("has_layout", [True, False], ids=["layout", "tensor"])
def test_official_generator(norm_G, settings, size, has_layout):
    ours = SPADEGenerator.official(LABEL_NC, ngf=2, norm_G=norm_G, **settings)
    eager = reference.SPADEGenerator(LABEL_NC, 2, norm_G=norm_G, **settings)

    def inputs(step):
        z = torch.randn(2, 256, dtype=torch.float64) if ours.z_dim else None
        return layout_of((2, *size), step).to_segmap(torch.float64), z

    def ours_of(segmap, z):
        return SemanticLayout.from_segmap(segmap) if has_layout else segmap, z

    assert_parity(ours, eager, inputs, 2, ours_of)


def test_generator_from_noise():
    def inputs(step):
        return layout_of((1, 64, 64), step).to_segmap(torch.float64), torch.randn(
            1, 16, dtype=torch.float64
        )

    assert_parity(
        SPADEGenerator(LABEL_NC, 16, 2),
        reference.SPADEGeneratorFromNoise(LABEL_NC, 16, 2),
        inputs,
        1,
    )


def test_encoder():
    assert_parity(
        ConvEncoder(4, 8),
        reference.ConvEncoder(4, 8),
        lambda step: (torch.randn(2, 3, 40 + step, 50, dtype=torch.float64),),
    )


@pytest.mark.parametrize("condition", ["none", "tensor", "layout"])
@pytest.mark.parametrize("size", [(64, 64), (33, 50)], ids=str)
def test_discriminator(condition, size):
    def inputs(step):
        segmap = layout_of((2, *size), step).to_segmap(torch.float64).repeat(2, 1, 1, 1)
        return (torch.cat([segmap, torch.randn(4, 3, *size, dtype=torch.float64)], dim=1),)

    def ours_of(x):
        if condition == "none":
            return (x,)
        segmap = x[:2, :LABEL_NC]  # of the fake and the real images
        return x[:, LABEL_NC:], SemanticLayout.from_segmap(
            segmap
        ) if condition == "layout" else segmap

    networks = (
        module.MultiscaleDiscriminator(LABEL_NC + 3, 2, 4) for module in (spade_fast, reference)
    )
    assert_parity(*networks, inputs, our_inputs=ours_of)


@pytest.mark.parametrize("ndf,n_layers", [(3, 1), (3, 3), (300, 2), (5, 6)])
def test_discriminators_of_other_depth_and_width(ndf, n_layers):
    """The reference, too, limits widths to 512 channels."""
    eager, ours = (
        module.MultiscaleDiscriminator(4, 1, ndf, n_layers=n_layers).double().eval()
        for module in (reference, spade_fast)
    )
    ours.load_state_dict(eager.state_dict())
    x = torch.randn(1, 4, 33, 18, dtype=torch.float64)
    assert_agree(ours(x), eager(x), NETWORK)


@pytest.mark.parametrize("spatial", [(40,), (20, 24, 12)], ids=str)
def test_discriminator_of_a_layout_in_one_and_three_dimensions(spatial):
    network = MultiscaleDiscriminator(LABEL_NC + 1, 2, 2, spatial_dims=len(spatial)).double()
    layout, image = layout_of((1, *spatial)), torch.randn(1, 1, *spatial, dtype=torch.float64)
    network.eval()
    with spade_fast.window_mode("never"):  # so that no layout is found for the tensor
        expected = network(image, layout.to_segmap(torch.float64))
    assert_agree(network(image, layout), expected)


@pytest.mark.parametrize(
    "dataset,arguments,keys,parameters,shape",
    [
        ("coco", {}, 234, 97.48, (256, 256)),
        ("ade20k", {}, 234, 96.49, (256, 256)),
        ("cityscapes", {}, 234, 93.05, (256, 512)),
        ("cityscapes", {"num_upsampling_layers": "most"}, 272, None, (256, 512)),
    ],
)
def test_sizes_are_the_published_ones(dataset, arguments, keys, parameters, shape):
    with torch.device("meta"):
        generator = SPADEGenerator.official(dataset, **arguments)
    assert len(generator.state_dict()) == keys and generator.sizes[-1] == shape
    if parameters:
        assert (
            round(sum(parameter.numel() for parameter in generator.parameters()) / 1e6, 2)
            == parameters
        )


def test_sizes_of_encoder_and_discriminator_are_the_published_ones():
    with torch.device("meta"):
        encoder, discriminator = ConvEncoder(), MultiscaleDiscriminator(187)
    assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6, 2) == 10.46
    assert len(discriminator.state_dict()) == 26


@pytest.mark.parametrize(
    "make_segmap",
    [
        lambda layout: layout,
        SemanticLayout.to_segmap,
        lambda layout: torch.randn(2, LABEL_NC, 9, 9),
    ],
    ids=["layout", "tensor", "dense"],
)
def test_several_images_of_each_layout(make_segmap):
    generator = SPADEGenerator(LABEL_NC, 8, 1, start=2).double().eval()
    segmap, z = make_segmap(layout_of((2, 48, 48))), torch.randn(6, 8, dtype=torch.float64)
    segmap = segmap.double() if isinstance(segmap, torch.Tensor) else segmap
    together = generator(segmap, z)
    apart = torch.cat([generator(segmap, part) for part in z.split(2)])
    assert_agree(together, apart)


def test_images_of_one_layout_share_its_tables():
    generator, layout = SPADEGenerator(LABEL_NC, 8, 1, start=2).eval(), layout_of((1, 64, 64))
    with torch.no_grad(), spade_fast.window_mode("always"), spade_fast.frozen(generator) as tables:
        generator(layout, torch.randn(2, 8))
        held = tables.bytes
        generator(layout, torch.randn(3, 8))
        assert tables.bytes == held > 0
        assert all(
            table.shape[0] == layout.windows(size, 3).count
            for (_, size, *_), kept in tables._layouts[id(layout)][1].items()
            for table in kept.tensors
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_generator_under_autocast_and_in_channels_last(dtype, layout):
    arguments = {"crop_size": 64, "norm_G": "spectralspadebatch3x3"}
    eager, ours = (
        reference.SPADEGenerator(LABEL_NC, 4, **arguments),
        SPADEGenerator.official(LABEL_NC, ngf=4, **arguments),
    )
    ours.load_state_dict(eager.state_dict())
    truth, segmap = copy.deepcopy(eager).double().eval(), layout_of((2, 64, 64)).to_segmap()
    ours, eager = (network.eval().to(memory_format=layout) for network in (ours, eager))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, yardstick = ours(SemanticLayout.from_segmap(segmap)), eager(segmap)
    assert excess(found.to(dtype), yardstick.to(dtype), truth(segmap.double()).detach()) <= 1


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("has_layout", [True, False], ids=["layout", "tensor"])
def test_a_quantized_generator(has_layout):
    """Its first layer has no parameters."""
    settings = {"norm_G": "spadeinstance3x3", "crop_size": 64, "use_vae": True}
    eager = reference.SPADEGenerator(LABEL_NC, 2, **settings).eval()
    ours = SPADEGenerator.official(LABEL_NC, ngf=2, **settings).eval()
    ours.load_state_dict(eager.state_dict())
    ours, eager = (
        torch.ao.quantization.quantize_dynamic(network, {nn.Linear}) for network in (ours, eager)
    )
    layout, z = layout_of((2, 64, 64)), torch.randn(2, 256)
    given = layout if has_layout else layout.to_segmap()
    assert_agree(ours(given, z), eager(layout.to_segmap(), z), NETWORK)
    torch.manual_seed(0)
    drawn = ours(given)
    torch.manual_seed(0)
    assert torch.equal(drawn, ours(given, torch.randn(2, 256)))
    with torch.no_grad(), spade_fast.frozen(ours):
        assert_agree(ours(given, z), eager(layout.to_segmap(), z), NETWORK)


def test_noise_is_drawn_if_none_is_given():
    generator = SPADEGenerator(LABEL_NC, 8, 1, start=2).eval()
    first, second = (generator(layout_of((2, 16, 16))) for _ in range(2))
    assert first.shape == (2, 3, 128, 128) and not torch.equal(first, second)


def test_spectral_norm_is_folded_and_unfolded():
    generator = SPADEGenerator.official(LABEL_NC, ngf=2, crop_size=64)
    segmap = layout_of((1, 64, 64)).to_segmap()
    generator(segmap)
    generator.eval()
    with torch.no_grad():
        before, keys = generator(segmap), list(generator.state_dict())
        folded = generator.fold_spectral_norm()
        assert folded is generator
        assert_agree(generator(segmap), before)
        assert list(generator.state_dict()) == keys
        weight = generator.up_0.conv_0.weight
        generator(segmap)
        assert generator.up_0.conv_0.weight is weight  # computed once for all calls
        copied = copy.deepcopy(generator)
        assert torch.equal(copied(segmap), generator(segmap))
        other = SPADEGenerator.official(LABEL_NC, ngf=2, crop_size=64).eval()
        generator.load_state_dict(other.state_dict())
        assert_agree(generator(segmap), other(segmap))
        generator.train().eval()
        assert_agree(generator(segmap), other(segmap))
    generator.train()(segmap).sum().backward()
    assert generator.up_0.conv_0.weight_orig.grad is not None
    with pytest.raises(RuntimeError, match="in train mode"):
        generator.fold_spectral_norm()


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (
            lambda layout: (torch.zeros(2, 5, 8, 8),),
            ValueError,
            r"segmap has shape \[2, 5, 8, 8\]; it should be \[N, 6, H, W\]",
        ),
        (
            lambda layout: (torch.zeros(2, 6, 8, 8).int(),),
            TypeError,
            "segmap has dtype torch.int32",
        ),
        (
            lambda layout: (SemanticLayout.from_labels(torch.zeros(1, 4, 4).long(), 3),),
            ValueError,
            "segmap has 3 channels",
        ),
        (
            lambda layout: (layout, torch.zeros(2, 7)),
            ValueError,
            r"z is \[2, 7\]; it should be a tensor \[M, 8\]",
        ),
        (
            lambda layout: (layout, torch.zeros(3, 8)),
            ValueError,
            "z has a batch of 3; it should be a multiple of segmap's, 2",
        ),
        (lambda layout: (layout, torch.zeros(0, 8)), ValueError, "z has a batch of 0"),
        (lambda layout: (layout, torch.zeros(2, 8).long()), TypeError, "z has dtype torch.int64"),
    ],
)
def test_bad_input_of_the_generator(arguments, error, message):
    with pytest.raises(error, match=message):
        SPADEGenerator(LABEL_NC, 8, 1, start=1)(*arguments(layout_of((2, 16, 16))))


def test_bad_arguments_of_the_constructors():
    with pytest.raises(ValueError, match="z should be None"):
        SPADEGenerator.official(LABEL_NC, ngf=1, crop_size=32)(
            layout_of((1, 32, 32)), torch.zeros(1, 256)
        )
    with pytest.raises(
        ValueError, match="dataset is 'voc'; it should be coco, ade20k, cityscapes, or a number"
    ):
        SPADEGenerator.official("voc")
    with pytest.raises(ValueError, match="num_upsampling_layers is 'few'"):
        SPADEGenerator.official("coco", num_upsampling_layers="few")
    with pytest.raises(
        ValueError, match="crop_size is 64, but with 7 doublings .* should be 128 or more"
    ):
        SPADEGenerator.official("coco", num_upsampling_layers="most", crop_size=64)
    with pytest.raises(
        ValueError,
        match=r"ngf is 1, the block up_4 of 0.5 · ngf channels should have a whole number",
    ):
        SPADEGenerator.official("coco", num_upsampling_layers="most", ngf=1)
    with pytest.raises(ValueError, match="ngf is 0"):
        SPADEGenerator(3, ngf=0)
    with pytest.raises(ValueError, match="spatial_dims is 4"):
        SPADEGenerator(3, spatial_dims=4)
    with pytest.raises(ValueError, match=r"start is \(4, 4\)"):
        SPADEGenerator(3, start=(4, 4), spatial_dims=1)
    with pytest.raises(ValueError, match="n_scales is 0"):
        MultiscaleDiscriminator(3, 0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((torch.zeros(1, 8, 32, 32),), r"x has 8 channels, there should be 9 in total"),
        (
            (torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, 32, 32)),
            "x has 3 channels and segmap 5, there should be 9 in total",
        ),
        (
            (torch.zeros(3, 3, 32, 32), torch.zeros(2, 6, 32, 32)),
            "x has a batch of 3; it should be a multiple of segmap's, 2",
        ),
        ((torch.zeros(1, 3, 32, 32), torch.zeros(1, 6, 16, 32)), r"segmap has the size \[16, 32\]"),
        ((torch.zeros(3, 32, 32),), r"x has shape \[3, 32, 32\]"),
    ],
)
def test_bad_input_of_the_discriminator(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiscaleDiscriminator(9, 2, 1)(*arguments)


def test_inputs_of_the_discriminator_of_other_types():
    discriminator, layout = MultiscaleDiscriminator(LABEL_NC + 3, 2, 1), layout_of((1, 32, 32))
    x, dense = torch.zeros(1, 3, 32, 32), torch.rand(1, LABEL_NC, 32, 32)
    for arguments, message in (
        ((layout, x), "x is SemanticLayout; it should be a floating-point tensor"),
        ((x.double(), layout), "x has dtype torch.float64; it should be the weights' dtype"),
        ((x, dense.double()), "segmap has dtype torch.float64; it should be the weights' dtype"),
    ):
        with pytest.raises(TypeError, match=message):
            discriminator(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        discriminator(x.bfloat16(), layout)


def test_bad_input_of_the_encoder():
    with pytest.raises(
        ValueError, match=r"image is \[1, 4, 8, 8\]; it should be a tensor \[N, 3, H, W\]"
    ):
        ConvEncoder(1)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(TypeError, match="image has dtype torch.uint8; it should be the weights'"):
        ConvEncoder(1)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_layout_of_one_class_is_conditional_batch_norm():
    """With a constant layout and 1×1 kernels, SPADE is a batch norm with an affine map for each
    class (Park et al. 2019, section 3.1).
    """
    spade = SPADE(4, 3, kernel_size=1, norm="batch").double()
    x, label = torch.randn(2, 4, 5, 5, dtype=torch.float64), 1
    segmap = F.one_hot(torch.full((2, 5, 5), label), 3).movedim(-1, 1).double()
    hidden = F.relu(spade.mlp_shared[0].weight[:, label, 0, 0] + spade.mlp_shared[0].bias)
    gamma, beta = (
        part.weight[:, :, 0, 0] @ hidden + part.bias for part in (spade.mlp_gamma, spade.mlp_beta)
    )
    expected = F.batch_norm(x, None, None, 1 + gamma, beta, training=True)
    assert_agree(spade(x, segmap), expected)


def test_a_style_that_is_constant_in_space_is_adaptive_instance_norm():
    """SPADE's condition is a style's features, the same at every pixel, but different for each
    image. 1×1 kernels do not reach a border.
    """
    spade = SPADE(4, 3, kernel_size=1).double()
    x, style = (
        torch.randn(2, 4, 5, 5, dtype=torch.float64),
        torch.randn(2, 3, 1, 1, dtype=torch.float64),
    )
    scale = 1 + spade.mlp_gamma(spade.mlp_shared(style))
    expected = F.instance_norm(x) * scale + spade.mlp_beta(spade.mlp_shared(style))
    assert_agree(spade(x, style.expand(2, 3, 5, 5)), expected)


def test_instance_norm_washes_away_a_uniform_layout_but_spade_does_not():
    """Park et al. 2019, section 3.1: convolution and instance norm of a layout with one label give
    zero, whatever the label.
    """
    convolution, spade = nn.Conv2d(3, 4, 1).double(), SPADE(4, 3, kernel_size=1).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    washed, modulated = [], []
    for label in (0, 1):
        segmap = F.one_hot(torch.full((1, 5, 5), label), 3).movedim(-1, 1).double()
        washed.append(F.instance_norm(convolution(segmap)))
        modulated.append(spade(x, segmap))
    assert all(result.abs().max() < 1e-10 for result in washed)
    assert (modulated[0] - modulated[1]).abs().max() > 1e-3


def test_a_series_of_regimes_has_the_wanted_volatility():
    """Returns over time, conditioned on calm, volatile and crisis regimes: each regime's standard
    deviation to a tenth, without drift.
    """
    wanted = torch.tensor([0.05, 0.15, 0.5])
    stages = [("head", 16, 1), ("up_1", 8, 2), ("up_2", 4, 2), ("up_3", 2, 2), ("up_4", 1, 2)]
    generator = SPADEGenerator(
        3, 32, 2, stages=stages, last_scale=1, start=8, nhidden=16, output_nc=1, spatial_dims=1
    )
    optimizer = torch.optim.Adam(generator.parameters(), 3e-3)

    def sample(count):
        """Each regime's deviation and mean in `count` series of 128 steps."""
        regimes = torch.randint(3, (count, 8)).repeat_interleave(16, dim=1)
        returns = generator(SemanticLayout.from_labels(regimes, 3)).squeeze(1)
        parts = [returns[regimes == regime] for regime in range(3)]
        return torch.stack([part.std() for part in parts]), torch.stack(
            [part.mean() for part in parts]
        )

    with use_threads(1):  # the work is too little for several threads
        for _ in range(100):
            deviation, mean = sample(32)
            optimizer.zero_grad()
            ((deviation / wanted).log().square().sum() + (mean / wanted).square().sum()).backward()
            optimizer.step()
        with torch.no_grad():
            deviation, mean = sample(256)
    assert ((deviation / wanted - 1).abs() < 0.1).all() and ((mean / wanted).abs() < 0.1).all()


def test_a_volume():
    layout = layout_of((1, 32, 16, 48))
    stages = [("head", 16, 1), ("up_1", 8, 2), ("up_2", 4, 2)]
    generator = SPADEGenerator(
        LABEL_NC, 8, 1, stages=stages, start=(4, 2, 6), output_nc=1, nhidden=8, spatial_dims=3
    ).double()
    z = torch.randn(1, 8, dtype=torch.float64)
    with spade_fast.window_mode("always"):
        volume = generator(layout, z)
    with spade_fast.window_mode("never"):
        expected = generator(layout.to_segmap(torch.float64), z)
    assert volume.shape == (1, 1, 32, 16, 48)
    assert_agree(volume, expected)


def test_writing_to_a_folded_weight_changes_nothing():
    plain = nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)).eval()
    folded, x = spade_fast.fold_spectral_norm(copy.deepcopy(plain)), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = plain(x)
        folded(x)
        nn.init.constant_(folded.weight, 9.0)
        assert torch.equal(folded(x), expected)


def test_a_weight_folded_in_inference_mode_works_with_gradients():
    folded = spade_fast.fold_spectral_norm(
        nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)).eval().requires_grad_(False)
    )
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    with torch.inference_mode():
        folded(x)
    assert torch.autograd.grad(folded(x).sum(), x)[0].abs().sum() > 0
