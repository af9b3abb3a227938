"""SPADE over the distinct windows of a layout gives the same numbers as over its dense condition,
forward and backward.
"""

import contextlib
import threading
from dataclasses import replace

import pytest
import torch
from agree import NETWORK, assert_agree
from conftest import use_threads
from label_maps import patches
from modulations import channels_last, contiguous

import spade_fast
from benchmarks import layouts
from spade_fast import SPADE, SemanticLayout, SPADEResnetBlock, kernels, reference
from spade_fast.agreement import excess
from spade_fast.kernels import torch_backend
from spade_fast.nn import spade
from spade_fast.nn.choice import current_mode

pytestmark = pytest.mark.usefixtures("backend")


def assert_exact(spade, layout, x):
    """Asserts that y and every gradient in float64 are those of the reference with the dense
    condition.
    """
    spade, x = spade.double(), x.double()
    settings = dict(spatial_dims=spade.spatial_dims, kernel_size=spade.mlp_gamma.kernel_size[0])
    norm = "batch" if "running_mean" in dict(spade.param_free_norm.named_buffers()) else "instance"
    dense = reference.SPADE(
        spade.norm_nc, spade.label_nc, spade.mlp_gamma.in_channels, norm=norm, **settings
    ).double()
    dense.load_state_dict(spade.state_dict())
    found = []
    for module, condition in ((spade, layout), (dense, layout.to_segmap(torch.float64))):
        own_x = x.clone().requires_grad_()
        with spade_fast.window_mode("always"):
            y = module(own_x, condition)
        dy = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
        gradients = torch.autograd.grad(y, [own_x, *module.parameters()], dy)
        found.append([y.detach(), *gradients])
    assert_agree(*found, NETWORK)


@pytest.mark.float64
@pytest.mark.parametrize(
    "shape,size",
    [
        ((2, 17), (17,)),
        ((2, 16, 12), (16, 12)),
        ((2, 16, 12), (8, 6)),
        ((1, 9, 14), (13, 7)),
        ((3, 5, 5), (10, 10)),
        ((2, 6, 4, 5), (3, 4, 5)),
        ((1, 1, 1), (2, 3)),
    ],
)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("classes", [1, 4, 300])
def test_exact_in_float64(shape, size, kernel_size, norm, classes):
    torch.manual_seed(0)
    layout = SemanticLayout.from_labels(patches(shape, classes), classes, patches(shape, 2, seed=1))
    spade = SPADE(5, classes + 1, 6, kernel_size, norm, spatial_dims=len(size))
    assert_exact(spade, layout, torch.randn(shape[0], 5, *size))


@pytest.mark.float64
@pytest.mark.parametrize("channels,size", [(1024, 8), (1024, 32), (256, 64), (64, 128)])
def test_exact_at_the_published_sizes(channels, size):
    labels, instances = layouts.resized(*layouts.draw_scene(1), (256, 256))
    labels, instances = torch.tensor(labels[None]), torch.tensor(instances[None])
    layout = SemanticLayout.from_labels(labels, 182, instances, dont_care=255)
    assert_exact(SPADE(channels, 184), layout, torch.randn(1, channels, size, size))


@pytest.mark.float64
def test_exact_if_every_window_is_distinct():
    layout = SemanticLayout.from_labels(torch.randperm(400).view(1, 20, 20), 400)
    assert layout.windows((20, 20), 3).count == 400
    assert_exact(SPADE(8, 400, 16), layout, torch.randn(1, 8, 20, 20))


def test_an_empty_batch():
    spade, layout = (
        SPADE(4, 2),
        SemanticLayout.from_labels(torch.zeros(0, 8, 8, dtype=torch.long), 2),
    )
    with spade_fast.window_mode("always"):
        y = spade(torch.randn(0, 4, 8, 8), layout)
    y.sum().backward()
    assert y.shape == (0, 4, 8, 8) and all(
        parameter.grad.eq(0).all() for parameter in spade.parameters()
    )


@pytest.mark.parametrize("layout_of_x", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_other_dtypes(dtype, layout_of_x):
    torch.manual_seed(0)
    layout = SemanticLayout.from_labels(patches((2, 12, 12), 5), 5)
    spade, eager = SPADE(24, 5, 16).to(dtype), reference.SPADE(24, 5, 16).to(dtype)
    eager.load_state_dict(spade.state_dict())
    truth = reference.SPADE(24, 5, 16).double()
    truth.load_state_dict(spade.state_dict())
    x, dy = layout_of_x(torch.randn(2, 24, 12, 12).to(dtype)), torch.randn(2, 24, 12, 12).to(dtype)
    found = []
    for module, condition in (
        (spade, layout),
        (eager, layout.to_segmap(dtype)),
        (truth, layout.to_segmap(torch.float64)),
    ):
        own_x = x.to(module.mlp_gamma.weight.dtype).requires_grad_()
        y = module(own_x, condition)
        assert y.dtype == own_x.dtype
        found.append(
            [y.detach(), *torch.autograd.grad(y, [own_x, *module.parameters()], dy.to(y.dtype))]
        )
    names = ["y", "x", *(name for name, _ in spade.named_parameters())]
    errors = {
        name: excess(ours, theirs, true, eps=torch.finfo(dtype).eps)
        for name, ours, theirs, true in zip(names, *found)
    }
    assert max(errors.values()) <= 1, errors


def test_a_discriminator_in_half_precision():
    """At its second scale, the condition's vectors are means in float64."""
    layout = SemanticLayout.from_labels(patches((2, 16, 16), 5), 5)
    ours, eager, truth = (
        module.MultiscaleDiscriminator(5 + 3, 2, 4).eval()
        for module in (spade_fast, reference, reference)
    )
    eager.load_state_dict(ours.state_dict()), truth.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 16, 16).bfloat16()
    found = ours.bfloat16()(image, layout)
    eagers, truths = (
        network.to(dtype)(torch.cat([layout.to_segmap(dtype), image.to(dtype)], dim=1))
        for network, dtype in ((eager, torch.bfloat16), (truth, torch.float64))
    )
    for results in zip(*(sum(scales, []) for scales in (found, eagers, truths))):
        assert results[0].dtype == torch.bfloat16 and excess(*results) <= 1


@pytest.mark.large
def test_every_run_gives_the_same_bits_on_any_number_of_threads(backend):
    layout = SemanticLayout.from_labels(patches((2, 40, 40), 9), 9)
    spade, x, found = SPADE(70, 9, 40), torch.randn(2, 70, 40, 40, requires_grad=True), []
    for threads in (1, 2, 2, 7) if backend != "torch" else (2, 2):
        with use_threads(threads):
            y = spade(x, layout)
            dy = torch.arange(y.numel()).view(y.shape).sin()
            found.append([y, *torch.autograd.grad(y, [x, *spade.parameters()], dy)])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other))


@pytest.mark.float64
def test_the_palettes_gradient():
    layout = SemanticLayout.from_labels(patches((2, 12, 12), 5), 5)
    palette = layout.palette.double().requires_grad_()
    spade, x = SPADE(4, 5, 8).double(), torch.randn(2, 4, 12, 12, dtype=torch.float64)
    (ours,) = torch.autograd.grad(
        spade(x, SemanticLayout(layout.codes, palette)).square().sum(), palette
    )
    dense = palette[layout.codes.long()].movedim(-1, 1)
    (theirs,) = torch.autograd.grad(spade(x, dense).square().sum(), palette)
    assert_agree(ours, theirs)


@pytest.mark.float64
def test_second_derivatives():
    layout = SemanticLayout.from_labels(patches((1, 6, 6), 3), 3)
    spade, x = (
        SPADE(3, 3, 4).double(),
        torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True),
    )

    def penalty(condition):
        (gradient,) = torch.autograd.grad(spade(x, condition).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *spade.parameters()])

    assert_agree(penalty(layout), penalty(layout.to_segmap(torch.float64)))


@pytest.mark.float64
@pytest.mark.parametrize(
    "norm_G", ["spectralspadesyncbatch3x3", "spadeinstance5x5", "spadegroup1x1"]
)
@pytest.mark.parametrize("fin,fout", [(32, 32), (64, 32)])
def test_a_block(norm_G, fin, fout):
    torch.manual_seed(0)
    layout = SemanticLayout.from_labels(patches((2, 16, 16), 5), 5, dont_care=255)
    block, x = (
        SPADEResnetBlock(fin, fout, norm_G, 6, nhidden=8).double().eval(),
        torch.randn(2, fin, 8, 8, dtype=torch.float64),
    )
    found = []
    for condition in (layout, layout.to_segmap(torch.float64)):
        y = block(x, condition)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
    assert_agree(*found)


def windows_used(monkeypatch):
    """A list that gets an entry for every table that a SPADE computes from now on."""
    used = []
    at_windows = spade.at_windows
    monkeypatch.setattr(
        spade, "at_windows", lambda *arguments: used.append(True) or at_windows(*arguments)
    )
    return used


def one_hot(shape=(1, 64, 64), classes=5):
    return SemanticLayout.from_labels(patches(shape, classes), classes).to_segmap()


@pytest.mark.large
def test_a_dense_condition_is_searched_again_only_after_a_change(monkeypatch):
    used, looked = windows_used(monkeypatch), []
    from_segmap = SemanticLayout.from_segmap
    monkeypatch.setattr(
        SemanticLayout, "from_segmap", lambda segmap: looked.append(True) or from_segmap(segmap)
    )
    spade, x, segmap = SPADE(32, 5), torch.randn(1, 32, 64, 64), one_hot()
    with torch.no_grad():
        for _ in range(3):
            spade(x, segmap)
        assert (len(used), len(looked)) == (3, 1)
        segmap[:, :, :32] = segmap[:, :, 32:].flip(1)
        changed = spade(x, segmap)
        assert (len(used), len(looked)) == (4, 2)
        with spade_fast.window_mode("never"):
            assert_agree(spade(x, segmap), changed)
        assert (len(used), len(looked)) == (4, 2)
        segmap.normal_()
        spade(x, segmap)
        spade(x, segmap)
    assert (len(used), len(looked)) == (4, 3)


def test_a_change_that_pytorch_does_not_count_can_be_counted():
    spade, x, segmap = SPADE(8, 5, 6), torch.randn(1, 8, 16, 16), one_hot((1, 16, 16))
    with spade_fast.window_mode("always"), torch.no_grad():
        spade(x, segmap)
        segmap.data.neg_()
        torch.autograd.graph.increment_version(segmap)
        assert_agree(spade(x, segmap), spade(x, segmap.clone()))


@pytest.mark.large
def test_changes_of_inference_tensors_are_noticed_without_versions(monkeypatch):
    used = windows_used(monkeypatch)
    spade, x = SPADE(32, 5), torch.randn(1, 32, 64, 64)
    with torch.inference_mode():
        segmap = one_hot().clone()
        first, again = spade(x, segmap), spade(x, segmap)
        segmap[:, :, :32] = segmap[:, :, 32:].flip(1)
        changed = spade(x, segmap)
        with spade_fast.window_mode("never"):
            assert_agree(spade(x, segmap), changed)
    assert torch.equal(first, again) and (first - changed).abs().max() > 1e-2 and len(used) == 3


@pytest.mark.large
@pytest.mark.parametrize("as_layout", [False, True])
def test_a_layout_found_in_inference_is_used_in_training(monkeypatch, as_layout):
    used = windows_used(monkeypatch)
    spade, x, condition = SPADE(32, 5), torch.randn(1, 32, 64, 64), one_hot()
    condition = SemanticLayout.from_segmap(condition) if as_layout else condition
    with torch.inference_mode():
        spade(x, condition)
    spade(x, condition).sum().backward()
    assert len(used) == 2 and spade.mlp_shared[0].weight.grad is not None


@pytest.mark.large
def test_a_condition_that_needs_a_gradient_gets_it(monkeypatch):
    used = windows_used(monkeypatch)
    segmap = one_hot().requires_grad_()
    SPADE(32, 5)(torch.randn(1, 32, 64, 64), segmap).sum().backward()
    assert segmap.grad is not None and not used


@pytest.mark.large
@pytest.mark.parametrize(
    "change",
    [
        lambda spade: spade.mlp_beta.register_forward_hook(lambda module, inputs, y: 2 * y),
        lambda spade: (
            setattr(spade.mlp_gamma, "padding_mode", "circular"),
            setattr(spade.mlp_gamma, "_reversed_padding_repeated_twice", [1] * 4),
        ),
        lambda spade: (
            setattr(spade.mlp_shared[0], "dilation", (2, 2))
            or setattr(spade.mlp_shared[0], "padding", (2, 2))
        ),
        lambda spade: spade.mlp_shared.append(torch.nn.Softmax2d()),
    ],
)
def test_convolutions_that_were_changed(monkeypatch, change):
    used = windows_used(monkeypatch)
    spade, x, segmap = SPADE(32, 5).eval(), torch.randn(1, 32, 64, 64), one_hot()
    change(spade)
    with torch.no_grad(), spade_fast.window_mode("always"):
        changed = spade(x, segmap)
    hidden = spade.mlp_shared(segmap)
    expected = reference.spade_modulate(x, spade.mlp_gamma(hidden), spade.mlp_beta(hidden))
    assert not used
    assert_agree(changed, expected)


def test_window_mode(monkeypatch):
    used = windows_used(monkeypatch)
    spade, x, layout = (
        SPADE(64, 3, nhidden=4),
        torch.randn(1, 64, 20, 20),
        SemanticLayout.from_labels(torch.randint(3, (1, 20, 20)), 3),
    )
    results = []
    # With few hidden channels, windows of noise do not pay.
    for mode, expected in (("auto", 0), ("always", 1), ("never", 1)):
        with spade_fast.window_mode(mode):
            results.append(spade(x, layout))
        assert len(used) == expected
    assert_agree(results[1:], results[:1] * 2)
    with pytest.raises(
        ValueError, match="mode is 'sometimes'; it should be one of auto, always, never"
    ):
        spade_fast.window_mode("sometimes")


def test_window_mode_as_a_setting_of_the_thread():
    modes = [current_mode()]
    with spade_fast.window_mode("always"):
        spade_fast.window_mode("never")
        modes.append(current_mode())
        thread = threading.Thread(target=lambda: modes.append(current_mode()))
        thread.start()
        thread.join()
    assert [*modes, current_mode()] == ["auto", "never", "auto", "auto"]


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda layout: layout.repeat(2),
            "segmap has a batch of 4; it should be x's batch, 2, or 1",
        ),
        (
            lambda layout: SemanticLayout(layout.codes, layout.palette[:, :4]),
            "segmap has 4 channels; it should have 5",
        ),
        (
            lambda layout: SemanticLayout(layout.codes[:, 0], layout.palette),
            "segmap has 1 spatial dimension; it should have 2",
        ),
    ],
)
def test_layouts_that_do_not_match_the_layer(change, message):
    layout = SemanticLayout.from_labels(patches((2, 8, 8), 5), 5)
    with pytest.raises(ValueError, match=message):
        SPADE(3, 5)(torch.randn(2, 3, 8, 8), change(layout))


@pytest.mark.float64
@pytest.mark.parametrize("mode", ["always", "never"])
def test_pixels_of_a_condition_in_float64(mode):
    """Resized at 82/64, they are not those of float32."""
    ours, theirs = SPADE(2, 3, 4).double(), reference.SPADE(2, 3, 4).double()
    theirs.load_state_dict(ours.state_dict())
    labels = torch.nn.functional.one_hot(torch.randint(3, (1, 64, 64)), 3)
    x, segmap = torch.randn(1, 2, 82, 82).double(), labels.movedim(-1, 1).double()
    with spade_fast.window_mode(mode):
        assert_agree(ours(x, segmap), theirs(x, segmap))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_image_with_an_infinite_condition_does_not_change_the_others(value):
    """Including γ that is normalised over each image."""
    spade = SPADE(2, 3, 4)
    spade.mlp_gamma = torch.nn.Sequential(spade.mlp_gamma, torch.nn.InstanceNorm2d(2))
    segmap = one_hot((2, 16, 16), 3)
    segmap[0, :, :4, :4] = value
    x, found = torch.randn(2, 2, 16, 16), []
    for mode in ("always", "never"):
        with spade_fast.window_mode(mode):
            found.append(spade(x, SemanticLayout.from_segmap(segmap)))
    assert_agree(*found)
    assert found[0][0].isnan().any() and not found[0][1].isnan().any()


@pytest.mark.parametrize("activation", [torch.nn.LeakyReLU, torch.nn.SiLU])
def test_an_activation_in_place_between_the_convolutions(activation, backend):
    x, layout = torch.randn(1, 4, 4, 4), SemanticLayout.from_labels(patches((1, 4, 4), 3), 3)
    spade, found = SPADE(4, 3, 8), []
    for inplace in (False, True):
        spade.mlp_shared[1] = activation(inplace=inplace)
        with spade_fast.window_mode("always"):
            y = spade(x, layout)
        found.append((y, *torch.autograd.grad(y.square().sum(), [*spade.parameters()])))
    assert_agree(*found)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_of_gathered_rows(dtype, kept, monkeypatch):
    """As on GPUs in half precision without gradients."""
    calls, convolve = [], torch_backend.convolve_windows
    backend = replace(
        torch_backend.BACKEND,
        dtype_at_windows=lambda dtype: dtype,
        gathers_half=True,
        convolve_windows=lambda *given: calls.append(len(given[1])) or convolve(*given),
    )
    monkeypatch.setattr(kernels, "BEST_FIRST", (backend,))
    layout = SemanticLayout.from_labels(patches((2, 12, 12), 5), 5)
    spade, eager = SPADE(24, 5, 17).to(dtype), reference.SPADE(24, 5, 17).to(dtype)
    eager.load_state_dict(spade.state_dict())
    truth = reference.SPADE(24, 5, 17).double()
    truth.load_state_dict(spade.state_dict())
    x = torch.randn(2, 24, 12, 12).to(dtype)
    with spade_fast.use_backend(None), spade_fast.window_mode("always"), torch.no_grad():
        with spade_fast.frozen(spade) if kept else contextlib.nullcontext():
            found = spade(x, layout)
        theirs = eager(x, layout.to_segmap(dtype))
        true = truth(x.double(), layout.to_segmap(torch.float64))
    assert excess(found, theirs, true, eps=torch.finfo(dtype).eps) <= 1
    # Kept weights are one already.
    assert calls == ([1, 1] if kept else [1, 2])
