"""`convert` replaces layers of every family in place, with the same values; look-alikes stay as
they are.
"""

import argparse
import copy
import gc
import io
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
from agree import NETWORK, assert_agree, assert_agree_beside
from families import (
    CHANNELS,
    LABELS,
    LOOKALIKES,
    SPADES,
    Bilinear,
    Block,
    ClassAdaptive,
    ClassAdaptiveWithEdges,
    ImaginaireNorm,
    InstanceAdaptive,
    JointSlices,
    Layer,
    NoResize,
    OtherBlock,
    OwnRowsByLabel,
    Subtracts,
    ZeroSFT,
)
from label_maps import patches

import spade_fast
from spade_fast import SPADE, SemanticLayout, reference
from spade_fast.convert import Fast, FastSPADE
from spade_fast.nn import spade


class Network(nn.Module):
    """Two layers and a block, of any class."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.block, self.last = layer(), Block(layer, fout=4), nn.Conv2d(4, 3, 1)

    def forward(self, x, segmap):
        return self.last(self.block(torch.relu(self.first(x, segmap)), segmap))


def inputs(labels=True, batch=2, size=(10, 9)):
    x = torch.randn(batch, CHANNELS, *size, dtype=torch.float64)
    layout = SemanticLayout.from_labels(patches((batch, 20, 18), LABELS), LABELS)
    return x, layout.to_segmap(torch.float64) if labels else torch.randn(
        batch, LABELS, 20, 18, dtype=torch.float64
    )


def outcome(model, x, segmap):
    """y, every gradient and every buffer, by name."""
    x = x.clone().requires_grad_()
    y = model(x, segmap)
    wanted = {"x": x, **dict(model.named_parameters())}
    gradients = torch.autograd.grad(
        y, list(wanted.values()), torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    )
    return {
        "y": y.detach(),
        **dict(zip(wanted, gradients)),
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
    }


@pytest.mark.parametrize("family", SPADES)
@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("labels", [False, True])
def test_the_same_numbers_in_train_and_eval_and_after_steps(family, mode, labels):
    torch.manual_seed(0)
    model = Network(SPADES[family]).double()
    own = copy.deepcopy(model)
    report = spade_fast.convert(model)
    assert report.converted == len(report) == 5, report
    steps = [torch.optim.Adam(one.parameters(), 0.01, eps=1e-3) for one in (model, own)]
    x, segmap = inputs(labels)
    with spade_fast.window_mode(mode):
        for train in (False, True):
            for network in (model, own):
                network.train(train)
            assert_agree_beside(outcome(model, x, segmap), outcome(own, x, segmap))
        for _ in range(3):
            for network, step in zip((model, own), steps):
                step.zero_grad()
                network(x, segmap).square().mean().backward()
                step.step()
        assert_agree_beside(outcome(model, x, segmap), outcome(own, x, segmap), NETWORK)


@pytest.mark.parametrize("family", LOOKALIKES)
def test_lookalikes_are_left_as_they_were(family):
    layer, reason = LOOKALIKES[family]
    model = nn.Sequential(layer())
    report = spade_fast.convert(model)
    assert len(report) == 1 and not report.converted and reason in report[0].reason, report
    assert type(model[0]) is layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["official, batch", "SDM", "leaky hidden"])
def test_models_in_other_dtypes_are_probed_too(family, dtype):
    assert spade_fast.convert(Network(SPADES[family]).to(dtype)).converted == 5
    assert not spade_fast.convert(LOOKALIKES["subtracts"][0]().to(dtype)).converted
    assert (
        "with its modulation as one operation" in spade_fast.convert(Bilinear().to(dtype))[0].reason
    )


def test_a_layer_is_trusted_without_a_probe():
    assert "windows" in spade_fast.convert(Bilinear(), probe=False)[0].reason


@pytest.mark.parametrize("train", [False, True])
def test_only_the_class_changes(train):
    torch.manual_seed(0)
    model = Network(SPADES["official, batch"]).train(train)
    model.first.mlp_gamma.weight = model.block.norm_0.mlp_gamma.weight  # tied
    calls = []
    model.first.register_forward_hook(lambda module, arguments, y: calls.append(module))
    before = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    values, state, random = (
        {name: tensor.clone() for name, tensor in before.items()},
        model.state_dict(),
        torch.get_rng_state(),
    )
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert spade_fast.convert(model).converted == 5
    after = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert all(torch.equal(values[name], after[name]) for name in values) and all(
        tensor.grad is None for tensor in model.parameters()
    )
    assert (
        list(model.state_dict()) == list(state)
        and torch.equal(random, torch.get_rng_state())
        and not calls
    )
    for name, module in model.named_modules():
        own = {key: value for key, value in module.__dict__.items() if key != "spade_form"}
        assert own.keys() == attributes[name].keys() and all(
            own[key] is attributes[name][key] for key in own
        ), name
    assert isinstance(model.first, Layer) and isinstance(model.block, Block)
    x, segmap = inputs()
    model(x.float(), segmap.float())
    assert calls == [model.first]
    assert "FastLayer" in repr(model)


def test_a_layer_that_does_not_resize_its_condition():
    layer, x, segmap = NoResize().double(), *inputs()
    expected = layer(x, segmap[:, :, ::2, ::2])
    assert spade_fast.convert(layer).converted == 1
    assert_agree(layer(x, segmap[:, :, ::2, ::2]), expected)


def test_a_layer_with_its_condition_first(monkeypatch):
    torch.manual_seed(0)
    own = ZeroSFT().double()
    layer, fast, compute = copy.deepcopy(own), [], FastSPADE._fast
    report = spade_fast.convert(layer)
    assert report.converted == 1 and report[0].recognised_as == "SPADE(8, 5, 6), GroupNorm"
    monkeypatch.setattr(FastSPADE, "_fast", lambda *given: fast.append(1) or compute(*given))
    h, segmap = inputs(labels=False)
    c = segmap[:, :, :10, :9].contiguous()
    c.requires_grad_()
    found = []
    for module in (layer, own):
        wanted = [c, h.requires_grad_(), *module.parameters()]
        y = module(c, h)
        found.append((y, torch.autograd.grad(y.square().sum(), wanted)))
    assert_agree_beside(*found)
    assert_agree(layer(h=h, c=c), own(h=h, c=c))
    assert len(fast) == 2
    for named in ({"h_ori": h}, {"control_scale": 0.5}):
        assert_agree(layer(c, h, **named), own(c, h, **named))
    assert len(fast) == 2


@pytest.mark.parametrize(
    "layer,recognised_as",
    [
        (OwnRowsByLabel, "class-adaptive norm(8, 5), GroupNorm"),
        (
            ClassAdaptiveWithEdges,
            "class-adaptive norm(8, 5), InstanceNorm2d, γ without 1 +, inst_conv after y",
        ),
    ],
)
@pytest.mark.parametrize("labels", [False, True])
def test_rows_of_labels(layer, recognised_as, labels, monkeypatch):
    torch.manual_seed(0)
    own = layer().double()
    for parameter in own.parameters():
        nn.init.normal_(parameter)
    layer, fast, compute = copy.deepcopy(own), [], FastSPADE._fast
    report = spade_fast.convert(layer)
    assert report.converted == 1 and report[0].recognised_as == recognised_as
    monkeypatch.setattr(FastSPADE, "_fast", lambda *given: fast.append(1) or compute(*given))
    x, segmap = inputs(labels)
    found = []
    for module in (layer, own):
        wanted = [tensor.requires_grad_(not labels) for tensor in (x, segmap)]
        wanted = [tensor for tensor in wanted if tensor.requires_grad] + list(module.parameters())
        y = module(x=x, segmap=segmap)
        gradients = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
        found.append((y, gradients))
    assert_agree_beside(*found)
    assert len(fast) == 1


def test_rows_of_labels_and_instances_are_left_alone():
    layer, (x, segmap) = InstanceAdaptive().double(), inputs()
    instances, noise = segmap[:, 1:], torch.randn(2, 4, 2, 3, dtype=torch.float64)
    expected = layer(x, segmap, instances, noise)
    assert not spade_fast.convert(layer).converted and type(layer) is InstanceAdaptive
    assert torch.equal(layer(x, segmap, instances, noise), expected)


def test_rows_of_labels_of_a_layout():
    torch.manual_seed(0)
    model = Network(ClassAdaptive).double().eval()
    layout = SemanticLayout.from_labels(patches((2, 20, 18), LABELS), LABELS)
    x, segmap = inputs()
    expected = model(x, segmap)
    spade_fast.convert(model)
    rows = model.first.class_specified_affine
    for mode in ("auto", "never"):
        with spade_fast.window_mode(mode):
            assert_agree(model(x, layout), expected)
    with torch.no_grad(), pytest.raises(RuntimeError, match="first.class_specified_affine.weight"):
        with spade_fast.frozen(model):
            assert_agree(model(x, layout), expected)
            rows.weight.mul_(2)
    seen = []
    rows.weight.data /= 2
    rows.register_forward_hook(lambda *call: seen.append(call[-1]))
    assert_agree(model(x, segmap), expected)
    assert len(seen) == 1


def test_reverting():
    model = Network(Layer)
    spade_fast.convert(model)
    assert spade_fast.revert(model) == 5
    assert (
        type(model.first) is Layer
        and type(model.block) is Block
        and "spade_form" not in model.first.__dict__
    )
    assert spade_fast.revert(model) == 0 and spade_fast.convert(model).converted == 5


def test_what_is_no_module():
    for function in (spade_fast.convert, spade_fast.revert, spade_fast.fold_spectral_norm):
        with pytest.raises(TypeError, match="model is a str; it should be a torch.nn.Module"):
            function("model")


def test_converting_twice():
    model = Network(Layer)
    spade_fast.convert(model)
    kinds = [type(module) for module in model.modules()]
    report = spade_fast.convert(model)
    assert [type(module) for module in model.modules()] == kinds and all(
        "fast already" in entry.reason for entry in report
    )


def test_our_own_layers_are_not_converted():
    report = spade_fast.convert(
        nn.Sequential(SPADE(4, 3), spade_fast.SPADEResnetBlock(4, 4, "spadebatch3x3", 3))
    )
    assert len(report) == 4 and not report.converted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: saved_and_loaded(model)])
def test_copies(copied):
    model = Network(SPADES["official, batch"]).double()
    spade_fast.convert(model)
    x, segmap = inputs()
    with (
        torch.no_grad()
    ):  # spectral norm stores a computed weight, which PyTorch cannot copy if it has a gradient
        model(x, segmap)
    model.eval().requires_grad_(False)
    twin = copied(model)
    assert (
        isinstance(twin.first, Fast)
        and isinstance(twin.block, Fast)
        and type(twin.first) is type(model.first)
    )
    assert torch.equal(twin(x, segmap), model(x, segmap))
    assert spade_fast.revert(twin) == 5 and isinstance(model.first, Fast)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_condition_passed_by_its_original_name():
    block = Block(Layer)
    x, segmap = (tensor.float() for tensor in inputs())
    expected = block.eval()(x=x, seg=segmap)
    assert spade_fast.convert(block).converted == 3
    assert_agree(block(x, seg=segmap), expected)
    assert_agree(block(x=x, seg=segmap), expected)
    assert block.norm_0(x, segmap=segmap).shape == x.shape


def test_a_layout_can_replace_the_condition():
    model = Network(Layer).double().eval()
    layout = SemanticLayout.from_labels(patches((2, 20, 18), LABELS), LABELS)
    x, segmap = inputs()
    expected = model(x, segmap)
    spade_fast.convert(model)
    with spade_fast.window_mode("always"):
        assert_agree(model(x, layout), expected)
    with torch.no_grad(), spade_fast.frozen(model) as tables:
        assert_agree(model(x, layout), expected)
        assert tables.bytes > 0


@pytest.mark.parametrize("blocks,expected", [(True, 3), (False, 2)])
def test_blocks_are_optional(blocks, expected):
    assert spade_fast.convert(Block(Layer), blocks=blocks).converted == expected


def test_a_block_that_computes_something_else():
    block = OtherBlock(Layer)
    report = spade_fast.convert(block)
    assert (
        report.converted == 2
        and report[0].recognised_as
        == "residual block 8 → 8, leaky ReLU of slope 0.2 (no activation module)"
        and "y is" in report[0].reason
    )
    assert type(block) is OtherBlock


def test_no_spade_at_all():
    report = spade_fast.convert(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    assert not report and "No SPADE was found" in str(report)


def test_the_report_as_a_table():
    text = str(spade_fast.convert(nn.ModuleDict({"good": Layer(), "bad": Subtracts()})))
    for part in (
        "good",
        "bad",
        "Subtracts",
        "SPADE(8, 5, 6), InstanceNorm2d",
        "yes",
        "no",
        "windows of labels, else pixels",
    ):
        assert part in text


def test_models_that_cannot_be_converted():
    scripted = torch.jit.trace(nn.Conv2d(1, 1, 1), torch.randn(1, 1, 2, 2))
    for model, message in (
        (scripted, "model is scripted or traced.* torch.jit.script does not"),
        (torch.compile(Layer()), "model is compiled"),
        (Layer, "model is a type"),
    ):
        with pytest.raises(TypeError, match=message):
            spade_fast.convert(model)


@pytest.mark.parametrize("labels", [False, True])
def test_compiled_without_graph_breaks(labels):
    torch._dynamo.reset()
    model, tensors = Network(Layer).double().eval(), inputs(labels)
    expected = model(*tensors)
    spade_fast.convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_agree(compiled(*tensors), expected)


def test_threads_call_one_model_at_once():
    model = Network(Layer).double().eval()
    spade_fast.convert(model)
    x, segmap = inputs()
    expected, found = model(x, segmap), []
    threads = [
        threading.Thread(target=lambda: found.append(model(x, segmap.clone()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_agree(found, [expected] * 4)


def test_the_published_generator():
    torch.manual_seed(0)
    generator = reference.SPADEGenerator(
        LABELS, 4, crop_size=64, norm_G="spectralspadebatch3x3"
    ).double()
    own = copy.deepcopy(generator)
    report = spade_fast.convert(generator)
    assert report.converted == len(report) == 25
    segmap = SemanticLayout.from_labels(patches((2, 64, 64), LABELS), LABELS).to_segmap(
        torch.float64
    )
    found = []
    for network in (generator, own):
        y = network(segmap)
        gradients = torch.autograd.grad(y.square().sum(), list(network.parameters()))
        names = [name for name, _ in network.named_parameters()]
        found.append(
            {"y": y.detach(), **dict(zip(names, gradients)), **dict(network.named_buffers())}
        )
    assert_agree_beside(*found, NETWORK)


def test_a_forward_that_was_replaced_and_parameters_without_values():
    model = nn.ModuleDict({"replaced": Layer(), "meta": Layer().to("meta")})
    model["replaced"].forward = lambda x, segmap: x
    assert [entry.reason for entry in spade_fast.convert(model)] == [
        "its forward was replaced on this instance",
        "its parameters are on the meta device, so they have no values",
    ]


def test_parameters_from_inference_mode():
    with torch.inference_mode():
        model = Network(Layer)
        assert spade_fast.convert(model).converted == 5


def test_in_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        compare_in_distributed_data_parallel()
        # Collected before the process group is destroyed. If the reducer held the last reference to
        # the group, destroying it would wait for a thread that waits for the interpreter (torch
        # 2.13, sporadically).
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


def compare_in_distributed_data_parallel():
    model = Network(SPADES["official, batch"]).double()
    own = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    assert spade_fast.convert(parallel).converted == 5
    x, segmap = inputs()
    for network in (parallel, own):
        network(x, segmap).square().sum().backward()
    gradients = (
        {name: parameter.grad for name, parameter in network.named_parameters()}
        for network in (model, own)
    )
    assert_agree_beside(*gradients)


def under(norm):
    """A function that builds a layer whose convolutions compute their weights in each call."""

    def layer():
        layer = Layer()
        layer.mlp_shared[0] = norm(layer.mlp_shared[0])
        layer.mlp_gamma, layer.mlp_beta = norm(layer.mlp_gamma), norm(layer.mlp_beta)
        return layer

    return layer


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize(
    "layer",
    [
        under(nn.utils.spectral_norm),
        under(nn.utils.weight_norm),
        under(nn.utils.parametrizations.spectral_norm),
        under(nn.utils.parametrizations.weight_norm),
        lambda: ImaginaireNorm(1, separate_projection=True),
        lambda: ImaginaireNorm(1, separate_projection=True, spectral=False),
        lambda: ImaginaireNorm(1),
        JointSlices,
    ],
    ids=[
        "spectral",
        "weight",
        "parametrized spectral",
        "parametrized weight",
        "own",
        "own, plain",
        "own, one convolution",
        "slices of one convolution",
    ],
)
def test_convolutions_that_compute_their_weights_use_windows(layer, monkeypatch):
    torch.manual_seed(0)
    model, own = layer().double(), layer().double()
    own.load_state_dict(model.state_dict())
    assert "windows" in spade_fast.convert(model)[0].reason
    given, used, at_windows = inputs(), [], spade.at_windows
    monkeypatch.setattr(
        spade, "at_windows", lambda *arguments: used.append(True) or at_windows(*arguments)
    )
    with spade_fast.window_mode("always"):
        for train in (True, False, True):
            for network in (model, own):
                network.train(train)
            assert_agree_beside(outcome(model, *given), outcome(own, *given))
    assert len(used) == 3
    with torch.no_grad(), spade_fast.frozen(model), spade_fast.window_mode("always"):
        for train in (True, False, False):
            for network in (model, own):
                network.train(train)
            assert_agree(model(*given), own(*given))


@pytest.mark.parametrize(
    "arguments", [("spadebatch3x3", 8, 5), ("spadebatch3x3", 8, 5, 6), (8, 5, 6, 3, "batch")]
)
def test_the_published_signature_of_the_layer(arguments):
    layer = SPADE(*arguments)
    assert type(layer.param_free_norm) is nn.BatchNorm2d and layer.mlp_gamma.out_channels == 8
    assert layer.mlp_shared[0].out_channels == (128 if len(arguments) == 3 else 6)


def test_the_published_signature_of_the_block():
    options = argparse.Namespace(norm_G="spectralspadesyncbatch3x3", semantic_nc=5)
    block = spade_fast.SPADEResnetBlock(8, np.int64(4), options)
    assert block.conv_s.weight_orig.shape == (4, 8, 1, 1) and block.norm_0.label_nc == 5
    with pytest.raises(TypeError, match="label_nc is None"):
        spade_fast.SPADEResnetBlock(8, 4, "spadeinstance3x3")


def test_in_a_context_of_another_device():
    model, own = Network(Layer), Network(Layer)
    own.load_state_dict(model.state_dict())
    with torch.device("meta"):
        assert spade_fast.convert(model).converted == 5
    x, segmap = (tensor.float() for tensor in inputs())
    assert_agree(model.eval()(x, segmap), own.eval()(x, segmap))


def test_lazy_convolutions_are_left_alone():
    layer = Layer()
    layer.mlp_gamma = nn.LazyConv2d(CHANNELS, 3, padding=1)
    report = spade_fast.convert(layer)
    assert not report.converted and "call it once, then convert" in report[0].reason


class WithProperty(Layer):
    """A class attribute that is not a method cannot be pickled, and need not be."""

    names = ("param_free_norm", "mlp_shared", "mlp_gamma", "mlp_beta")
    scaled = property(lambda self: 1.0)
    twice = staticmethod(lambda x: 2 * x)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies_of_a_class_with_a_property(copied):
    layer = WithProperty().double()
    assert spade_fast.convert(layer).converted == 1
    twin, given = copied(layer), inputs()
    assert isinstance(twin, Fast) and torch.equal(twin(*given), layer(*given))
    assert all(one._is_proved(*given) for one in (layer, twin))
