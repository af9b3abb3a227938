"""torch.compile and torch.export."""

import copy

import pytest
import torch
import torch._dynamo.testing
from agree import assert_agree, assert_agree_beside
from conftest import BACKENDS
from label_maps import patches
from modulations import channels_last, contiguous, results, sample

import spade_fast
from spade_fast import SemanticLayout, reference

# A compilation takes seconds: the cases of other backends than the CPU's took 89 of the suite's
# 2,150 seconds.
pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.pairs
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(
    "norm,rows,activation,plus_one",
    [
        ("instance", None, "leaky_relu", True),
        ("batch", None, "silu", True),
        ("group", None, "leaky_relu", False),
        (None, None, "silu", True),
        ("instance", 7, "leaky_relu", True),
        ("instance", 7, "silu", False),
    ],
)
def test_forward_and_backward_with_changing_batch(norm, activation, layout, rows, plus_one):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spade_fast.spade_modulate, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        arguments, dy = sample(
            (batch, 4, 5, 6),
            norm,
            activation,
            layout=layout,
            affine=norm is not None,
            rows=rows,
            plus_one=plus_one,
        )
        found, expected = (
            results(modulate, arguments, dy) for modulate in (compiled, spade_fast.spade_modulate)
        )
        for name in expected:
            assert_agree(found[name], expected[name], name=f"{name} of {batch}")
    assert counter.frame_count <= 2  # once for the first batch size, once for all others


def test_a_slope_that_changes_compiles_again():
    """Even if two modulations in one graph use the slope."""
    x, gamma, beta = torch.randn(3, 2, 4, 5, 6).unbind(0)
    x.requires_grad_()

    def forward(slope):
        y = x
        for _ in range(2):
            y = spade_fast.spade_modulate(
                y, gamma, beta, activation="leaky_relu", negative_slope=slope
            )
        return y

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for slope in (0.2, 0.1):
        found = [
            (y, *torch.autograd.grad(y.square().sum(), x))
            for y in (compiled(slope), forward(slope))
        ]
        assert_agree(*found, name=f"slope {slope}: ")


@pytest.mark.parametrize(  # half a minute of g++ for each
    "backend",
    [pytest.param(name, marks=() if name == "cpu" else pytest.mark.full) for name in BACKENDS],
    indirect=True,
)
def test_a_block_through_the_default_compiler(backend):
    # Without spectral norm: Inductor computes a wrong gradient for its weights in train mode, in
    # the reference's block, too.
    block = spade_fast.SPADEResnetBlock(6, 4, "spadesyncbatch3x3", 3, nhidden=6)
    eager = reference.SPADEResnetBlock(6, 4, "spadesyncbatch3x3", 3, nhidden=6)
    eager.load_state_dict(block.state_dict())
    compiled = torch.compile(block, fullgraph=True)
    for batch in (2, 3):
        x, segmap = torch.randn(batch, 6, 8, 8), torch.randn(batch, 3, 8, 8)
        for given in (x, segmap):  # compiled once
            torch._dynamo.mark_dynamic(given, 0)
        found, expected = compiled(x, segmap), eager(x, segmap)
        assert_agree(found, expected)
        for module, y in ((block, found), (eager, expected)):
            module.zero_grad()
            y.square().sum().backward()
        assert_agree_beside(
            *([parameter.grad for parameter in one.parameters()] for one in (block, eager))
        )
    assert_agree(dict(block.named_buffers()), dict(eager.named_buffers()))


def test_without_gradients():
    block = spade_fast.SPADEResnetBlock(6, 4, "spadebatch3x3", 3, nhidden=6).eval()
    x, segmap = torch.randn(2, 6, 8, 8), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_agree(compiled(x, segmap), block(x, segmap))


def test_an_exported_graph_has_only_pytorch_operators():
    block = spade_fast.SPADEResnetBlock(6, 4, "spadebatch3x3", 3, nhidden=6).eval()
    x, segmap = torch.randn(2, 6, 8, 8), torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(block, (x, segmap), dynamic_shapes=({0: batch}, {0: batch}))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(
        target.startswith("aten.") or "getitem" in target or "sym" in target for target in targets
    ), targets
    x, segmap = torch.randn(5, 6, 8, 8), torch.randn(5, 3, 8, 8)
    assert_agree(program.module()(x, segmap), block(x, segmap))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_takes_any_sizes(strict):
    """Those of the example are equal."""
    layer, any_size = spade_fast.SPADE(4, 3, 4).eval(), torch.export.Dim.AUTO
    example, sizes = (torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)), {2: any_size, 3: any_size}
    program = torch.export.export(layer, example, dynamic_shapes=(sizes, sizes), strict=strict)
    for size, given in (((8, 8), (8, 8)), ((8, 6), (16, 5)), ((5, 9), (1, 1))):
        x, segmap = torch.randn(2, 4, *size), torch.randn(2, 3, *given)
        assert_agree(program.module()(x, segmap), layer(x, segmap))


def test_an_exported_encoder_takes_any_sizes():
    """Images of the size that it works at, too, which it does not resize."""
    encoder, any_size = spade_fast.ConvEncoder(1, 2).eval(), torch.export.Dim.AUTO
    sizes, example = ({2: any_size, 3: any_size},), (torch.randn(1, 3, 40, 30),)
    program = torch.export.export(encoder, example, dynamic_shapes=sizes)
    for size in ((256, 256), (20, 256)):
        image = torch.randn(1, 3, *size)
        assert_agree(program.module()(image), encoder(image))


def test_bad_input_raises_the_same_error_when_compiled():
    compiled = torch.compile(spade_fast.spade_modulate, backend="eager")
    x = torch.randn(2, 4, 5, 6)
    with pytest.raises(ValueError, match="gamma has shape"):
        compiled(x, x[:, :3], x)


class SmallGenerator(torch.nn.Module):
    """Blocks at three sizes, one of them with 1×1 convolutions: for a layout of one class, that
    block has a single window.
    """

    def __init__(self, classes):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            spade_fast.SPADEResnetBlock(4, 4, norm_G, classes, nhidden=6)
            for norm_G in ("spadeinstance3x3", "spadebatch1x1", "spadeinstance3x3")
        )

    def forward(self, z, condition):
        for block in self.blocks:
            z = torch.nn.functional.interpolate(block(z, condition), scale_factor=2)
        return z


@pytest.mark.full
@pytest.mark.float64
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_generator_over_many_layouts_is_compiled_once(compiler, backend):
    if (compiler, backend) == ("aot_eager", "torch"):
        pytest.skip("takes half a minute, and shows no more than the other three")
    model = SmallGenerator(6).double()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed, classes in enumerate((6, 6, 1, 2, 3)):
        layout = SemanticLayout.from_labels(patches((2, 32, 32), classes, seed), 6)
        layout.prepare([(4, 4), (16, 16)], 3).prepare([(8, 8)], 1)
        z, found = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True), []
        for network in (compiled, model):
            with spade_fast.window_mode("always"):
                y = network(z, layout)
            found.append([y, *torch.autograd.grad(y.square().sum(), [z, *model.parameters()])])
        assert_agree_beside(*found)
    assert layout.windows((8, 8), 1).count == 3 and counter.frame_count == 1


def test_a_layout_whose_windows_do_not_determine_gamma():
    spade, layout = (
        spade_fast.SPADE(4, 3, 4),
        SemanticLayout.from_labels(patches((1, 16, 16), 3), 3),
    )
    # γ no longer depends on the window alone, so it is computed at pixels.
    spade.mlp_gamma.register_forward_hook(lambda module, arguments, y: 2 * y)
    x = torch.randn(1, 4, 8, 8)
    compiled = torch.compile(spade, fullgraph=True, backend="aot_eager")
    assert_agree(compiled(x, layout), spade(x, layout))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("factor", [2, 3, 47])
def test_a_condition_that_is_enlarged(factor, dynamic):
    """47 is no exact repetition: F.interpolate multiplies by a rounded quotient."""
    layer = spade_fast.SPADE(2, 3, nhidden=4, spatial_dims=1)
    x, segmap = torch.randn(1, 2, 8 * factor), torch.randn(1, 3, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        assert_agree(compiled(x, segmap), layer(x, segmap))


def test_a_layout_that_is_not_prepared():
    layout = SemanticLayout.from_labels(patches((1, 16, 16), 3), 3)
    compiled = torch.compile(spade_fast.SPADE(4, 3, 4), fullgraph=True, backend="eager")
    with pytest.raises(
        Exception,
        match=r"no windows of size \(8, 8\) yet: prepare\(\[\(8, 8\)\], 3\) before the"
        " compiled call",
    ):
        compiled(torch.randn(1, 4, 8, 8), layout)


def test_one_prepared_layout_for_several_images():
    layout = SemanticLayout.from_labels(patches((1, 4, 4), 2), 2).prepare([(4, 4)], 3)
    spade = spade_fast.SPADE(2, 2, 2)
    compiled = torch.compile(spade, fullgraph=True, backend="eager")
    for images in (2, 3):
        x = torch.randn(images, 2, 4, 4)
        with torch.no_grad():
            assert_agree(compiled(x, layout), spade(x, layout))


def small_generator():
    return spade_fast.SPADEGenerator.official(
        6, ngf=2, nhidden=4, crop_size=64, norm_G="spectralspadebatch3x3"
    ).eval()


@pytest.mark.full
@pytest.mark.large
def test_the_official_generator_is_compiled_once():
    generator = small_generator().double().train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(copy.deepcopy(generator), fullgraph=True, backend=counter)
    for seed in range(3):
        layout = SemanticLayout.from_labels(patches((2, 64, 64), 6, seed), 6).prepare(
            generator.sizes, 3
        )
        with spade_fast.window_mode("always"):
            ours, expected = (network(layout) for network in (compiled, generator))
        assert_agree(ours, expected)
    ours.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.large
def test_the_discriminator_of_a_layout_is_compiled():
    discriminator = spade_fast.MultiscaleDiscriminator(9, 2, 2).double().eval()
    layout, images = (
        SemanticLayout.from_labels(patches((1, 32, 32), 6), 6),
        torch.randn(2, 3, 32, 32, dtype=torch.float64),
    )
    expected = discriminator(images, layout)
    compiled = torch.compile(discriminator, backend="aot_eager")
    for ours, theirs in zip(compiled(images, layout), expected):
        assert_agree(ours, theirs)


@pytest.mark.slow
@pytest.mark.large
def test_an_exported_generator_takes_any_batch():
    generator, segmap = small_generator(), torch.randn(2, 6, 64, 64)
    with torch.no_grad():
        program = torch.export.export(
            generator, (segmap,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
        )
        segmap = torch.randn(3, 6, 64, 64)
        assert_agree(program.module()(segmap), generator(segmap))


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_an_onnx_generator_computes_the_same(tmp_path):
    import onnxruntime as runtime

    generator, segmap = small_generator().fold_spectral_norm(), torch.randn(1, 6, 64, 64)
    torch.onnx.export(generator, (segmap,), tmp_path / "generator.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "generator.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: segmap.numpy()})
    assert_agree(torch.from_numpy(found), generator(segmap))
