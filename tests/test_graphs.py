"""Once a layout's windows are numbered, nothing waits for the device any more, so steps can be
captured in CUDA graphs.
"""

import contextlib
import copy

import pytest
import torch
from agree import NETWORK, agrees, assert_agree, assert_agree_beside
from conftest import BACKENDS
from label_maps import patches
from numbered import NothingWaits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spade_fast
from spade_fast import SPADE, SemanticLayout, SPADEGenerator, SPADEResnetBlock, graphs, reference
from spade_fast.graphs import TablesAhead, with_room, write_over
from spade_fast.nn.tables import keep_in
from spade_fast.ops import arguments

MODULES = {
    "SPADE": lambda: SPADE(8, 6, 4),
    "batch": lambda: SPADE(8, 6, 4, norm="batch"),
    "block": lambda: SPADEResnetBlock(8, 4, "spectralspadeinstance3x3", 6, nhidden=4),
}


def step(module, device):
    """A function that runs a training step's forward and backward on its own tensors, and its x."""
    module = module().to(device)
    layout = (
        SemanticLayout.from_labels(patches((2, 6, 6), 5), 5, patches((2, 6, 6), 2, seed=1))
        .to(device)
        .prepare([(6, 6)], 3)
    )
    x = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)
    wanted = [x, *module.parameters()]

    def run():
        with spade_fast.window_mode("always"):
            y = module(x, layout)
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    return run, x


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cpu"])
def test_nothing_waits_for_the_device(name, module, monkeypatch):
    monkeypatch.setattr(
        arguments, "_check_index", lambda *given: None
    )  # reads the values, but only on a CPU
    with spade_fast.use_backend(name):
        run, _ = step(MODULES[module], BACKENDS[name])
        with NothingWaits():
            run()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if BACKENDS[name] == "cuda"])
def test_a_captured_step_computes_the_same_bits(name, module):
    with spade_fast.use_backend(name):
        run, x = step(lambda: MODULES[module]().eval(), "cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, run()))


def small_generator():
    return SPADEGenerator(
        7, 5, 1, stages=[("head", 8, 1), ("up", 4, 2)], last_scale=1, start=16, nhidden=4
    )


@pytest.mark.slow
@pytest.mark.parametrize("network", [lambda: SPADE(6, 7, 4), small_generator])
@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_layout_overwritten_with_another(backend, network, mode):
    network, layouts = network().eval(), [drawn_layout(patch) for patch in (8, 16, 1)]
    inputs = [torch.randn(2, 5)] if isinstance(network, SPADEGenerator) else []
    call = (
        (lambda layout: network(layout, *inputs))
        if inputs
        else (lambda layout, x=torch.randn(2, 6, 32, 32): network(x, layout))
    )

    def with_gradients(layout):
        y = call(layout)
        return [y, *torch.autograd.grad(y.square().sum(), network.parameters())]

    with spade_fast.window_mode(mode):
        call(layouts[0])
        room = with_room(layouts[0], 2.0, backward=True)
        places = [tensor.data_ptr() for tensor in tensors_of(room)]
        for layout, fits in zip(layouts, (True, True, False)):
            assert write_over(room, layout) == fits
            if fits:
                assert_agree_beside(with_gradients(room), with_gradients(layout), NETWORK)
            with torch.no_grad():
                assert_agree(call(room), call(layout if fits else layouts[1]))
        assert [tensor.data_ptr() for tensor in tensors_of(room)] == places
    with pytest.raises(ValueError, match="layout has size.*it should have"):
        write_over(room, drawn_layout(8, size=16))


def drawn_layout(patch, size=32):
    """Two layouts of random patches. Smaller patches give more windows."""
    labels = (
        torch.randint(7, (2, 1, size // patch, size // patch))
        .repeat_interleave(patch, 2)
        .repeat_interleave(patch, 3)
    )
    return SemanticLayout.from_labels(labels[:, 0], 7)


def tensors_of(layout):
    parts = [part for windows in layout._windows.values() for part in (*windows[:2], windows[2:])]
    return [
        layout.codes,
        layout.palette,
        *(tensor for part in parts for tensor in part if tensor is not None),
    ]


class ByFeatures(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, features, x):
        assert not torch.is_autocast_cache_enabled()  # the cache's weights would be freed
        return self.block(x, features)


class Streams:
    """Stands in for a GPU's streams, and logs what each is given, in order."""

    def __init__(self, log, name="here"):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def record_event(self):
        done = sum(entry[:2] == (self.name, "has made") for entry in self.log)
        self.log.append((self.name, "has made", done))
        return type(
            "Event", (), {"wait": lambda event: self.log.append(("here", "waits for", done))}
        )()


@pytest.mark.parametrize("times", [1, 2])
def test_tables_are_computed_on_a_second_stream(times, monkeypatch):
    generator, log = small_generator().eval(), []
    layout, z = SemanticLayout.stack([drawn_layout(8)]), torch.randn(2 * times, 5)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Streams(log, "beside"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Streams(log))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    spades = [module for module in generator.modules() if isinstance(module, SPADE)]
    ahead = TablesAhead()
    with torch.no_grad(), keep_in(ahead, spades):
        plain = (
            generator(drawn_layout(16), z),
            generator(layout, z),
        )  # another layout is not affected
        generator.conv_img.register_forward_pre_hook(lambda *given: log.append("last convolution"))
        with ahead.made(layout):
            assert torch.equal(generator(layout, z), plain[1])
    tables = range(len(spades))
    assert log == [
        ("beside", "waits for", "here"),
        *(("beside", "has made", number) for number in tables),
        *(("here", "waits for", number) for number in tables),
        "last convolution",
        ("here", "waits for", "beside"),
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
def test_a_generator_in_one_graph():
    generator = small_generator().cuda().eval()
    layouts = [drawn_layout(patch).to("cuda") for patch in (8, 16, 1, 4)]
    graphed = spade_fast.Graphed(generator, layouts[0], torch.randn(2, 5).cuda())

    def is_right(layout):
        z = torch.randn(2, 5).cuda()
        with torch.no_grad():
            return agrees(graphed(layout, z), generator(layout, z), NETWORK)

    for layout in layouts:
        assert is_right(layout) and is_right(layout)
    layout.codes.copy_(layouts[0].codes)
    assert is_right(layout) and is_right(layouts[1])


class Recorded(TorchDispatchMode):
    """Stands in for a CUDA graph: keeps the operators that run while it is captured, and replays
    them on the same memory.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def pool(self):
        return None

    def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
        result = operator(*arguments, **settings or {})
        self.calls.append((operator, arguments, settings or {}, result))
        return result

    def replay(self):
        for operator, given, settings, result in self.calls:
            again = tree_leaves(operator(*given, **settings))
            for own, new in zip(tree_leaves(result), again):
                if isinstance(own, torch.Tensor) and own.data_ptr() != new.data_ptr():
                    own.copy_(new)


@pytest.fixture
def without_gpu(monkeypatch):
    """`Graphed` on a CPU, with stand-ins for a GPU's streams and graphs."""
    log = []
    monkeypatch.setattr(graphs, "check_device", lambda condition: None)
    for name, own in {
        "Stream": lambda: Streams(log, "beside"),
        "current_stream": lambda: Streams(log),
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "CUDAGraph": Recorded,
        "graph": lambda graph, **settings: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, own)


def test_features_in_one_graph(without_gpu):
    """A converted network gets new features, and new weights in place."""
    block = reference.SPADEResnetBlock(6, 4, "spectralspadeinstance3x3", 5, nhidden=4).eval()
    network = ByFeatures(block).eval()
    spade_fast.convert(network)
    graphed = spade_fast.Graphed(network, torch.randn(2, 5, 8, 8), torch.randn(2, 6, 16, 16))
    for _ in range(2):
        features, x = torch.randn(2, 5, 8, 8), torch.randn(2, 6, 16, 16)
        with torch.no_grad():
            assert_agree(graphed(features, x), block(x, features), 16)
            block.conv_0.weight_orig.mul_(2), block.norm_0.mlp_gamma.weight.neg_()
    with pytest.raises(TypeError, match="condition is a SemanticLayout; it should be a Tensor"):
        graphed(drawn_layout(8), x)
    with pytest.raises(ValueError, match=r"inputs are .*\[2, 5, 4, 4\].*they should have"):
        graphed(torch.randn(2, 5, 4, 4), x)


def test_layouts_in_one_graph(without_gpu):
    generator, z = small_generator().eval(), torch.randn(2, 5)
    graphed = spade_fast.Graphed(generator, drawn_layout(8), z)
    for patch in (16, 1, 8):
        layout, z = drawn_layout(patch), torch.randn(2, 5)
        with torch.no_grad():
            assert_agree(graphed(layout, z), generator(layout, z), NETWORK)


def trained_generator():
    """A generator with all that a training forward changes, and its twin."""
    generator = SPADEGenerator(
        7,
        5,
        1,
        stages=[("head", 8, 1), ("up", 4, 2)],
        last_scale=1,
        start=16,
        nhidden=4,
        norm_G="spectralspadesyncbatch3x3",
    )
    return generator.train(), copy.deepcopy(generator).train()


def step_through(call, network, layout, z, of_y):
    """y, and the gradients of z and of the network's parameters, which accumulate."""
    z = z.clone().requires_grad_()
    y = call(layout, z)
    y.backward(of_y)
    return [y.detach(), z.grad, *(parameter.grad for parameter in network.parameters())]


def train_alike(mode, device):
    """Outputs, gradients and buffers are the plain network's in each step, while an optimizer
    changes the weights, for layouts that fit into the memory and one that does not.
    """
    generator, plain = (each.to(device) for each in trained_generator())
    with spade_fast.window_mode(mode):
        z = torch.randn(2, 5, device=device, requires_grad=True)
        graphed = spade_fast.Graphed(generator, drawn_layout(8).to(device), z)
        assert_agree(dict(generator.named_buffers()), dict(plain.named_buffers()), 0)
        optimizers = [torch.optim.SGD(each.parameters(), 1e-3) for each in (generator, plain)]
        captured = graphed._captured
        for patch, is_larger in ((8, False), (16, False), (2, True), (4, False), (4, False)):
            layout, z = drawn_layout(patch).to(device), torch.randn(2, 5, device=device)
            of_y = torch.randn(2, 3, 32, 32, device=device)
            found = step_through(graphed, generator, layout, z, of_y)
            assert_agree_beside(found, step_through(plain, plain, layout, z, of_y), NETWORK)
            buffers = [dict(each.named_buffers()) for each in (generator, plain)]
            assert_agree_beside(*buffers, NETWORK)
            for optimizer in optimizers:
                optimizer.step()
            assert (graphed._captured is captured) == (not is_larger or mode == "never")
            captured = graphed._captured


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_training_steps_in_two_graphs(mode, without_gpu):
    train_alike(mode, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_training_steps_in_two_graphs_on_a_gpu(mode):
    train_alike(mode, "cuda")


def test_a_backward_that_comes_too_late(without_gpu):
    generator, _ = trained_generator()
    layouts, z = [drawn_layout(patch) for patch in (8, 16)], torch.randn(2, 5)
    graphed = spade_fast.Graphed(generator, layouts[0], z)
    first = graphed(layouts[0], z)
    with torch.no_grad():
        graphed(layouts[1], z)
    with pytest.raises(RuntimeError, match="after another call of it.*it should come once"):
        first.sum().backward()
    second = graphed(layouts[1], z)
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for the second time.*it should come once"):
        second.sum().backward()
    third = graphed(layouts[1], z)
    with torch.no_grad():
        generator.conv_img.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        third.sum().backward()
    squares, bias = graphed(layouts[1], z).square().sum(), generator.conv_img.bias
    (of_bias,) = torch.autograd.grad(squares, bias, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_bias.sum().backward()


def test_what_has_changed_is_captured_again(without_gpu):
    """Modes, what requires gradients, and parameters that others have replaced."""
    generator, plain = trained_generator()
    layout, z, of_y = drawn_layout(8), torch.randn(2, 5), torch.randn(2, 3, 32, 32)
    graphed = spade_fast.Graphed(generator, layout, z)

    def are_alike(again=True):
        captured = graphed._captured
        found = step_through(graphed, generator, layout, z, of_y)
        wanted = step_through(plain, plain, layout, z, of_y)
        for each in (generator, plain):
            each.zero_grad()
        assert [tensor is None for tensor in found] == [tensor is None for tensor in wanted]
        kept = [[tensor for tensor in all if tensor is not None] for all in (found, wanted)]
        assert_agree_beside(*kept, NETWORK)
        assert (graphed._captured is not captured) == again

    are_alike()  # z requires gradients from here on
    are_alike(again=False)
    for each in (generator, plain):
        each.fc.requires_grad_(False)
    are_alike()
    for each in (generator, plain):
        each.up.conv_0.bias = torch.nn.Parameter(torch.ones(4))
    are_alike()
    for each in (generator, plain):
        each.up.conv_1.bias = torch.nn.Parameter(each.up.conv_1.bias.data)
    are_alike()
    for each in (generator, plain):
        each.up.norm_0.eval()
    are_alike()
    for each in (generator, plain):
        each.requires_grad_(False)
    are_alike()
    generator.eval(), plain.eval()
    found = graphed(layout, z.requires_grad_())
    assert not found.requires_grad
    assert_agree(found, plain(layout, z).detach(), NETWORK)


@pytest.mark.parametrize("name", ["up.norm_0.mlp_gamma.weight", "up.conv_0.bias", "fc.weight"])
def test_weights_that_are_no_parameters_are_captured_again(name, without_gpu):
    """As a hypernetwork gives them, which has gradients of its own."""
    generator, plain = trained_generator()
    layout, z, scale = drawn_layout(8), torch.randn(2, 5), torch.ones((), requires_grad=True)
    graphed, like = spade_fast.Graphed(generator, layout, z), plain.get_parameter(name)
    owner, _, own = name.rpartition(".")

    def images():
        weight, made = torch.randn_like(like) * scale, []
        for each, call in ((generator, graphed), (plain, plain)):
            module = each.get_submodule(owner)
            module._parameters.pop(own, None)
            setattr(module, own, weight)
            made.append(call(layout, z))
        return made

    for _ in range(2):
        found = [
            [image, *torch.autograd.grad(image.square().sum(), scale, retain_graph=True)]
            for image in images()
        ]
        assert_agree_beside(*found, NETWORK)
    generator.eval(), plain.eval()
    for _ in range(2):
        assert_agree(*images(), NETWORK)


def test_a_capture_that_fails_is_tried_again(without_gpu, monkeypatch):
    generator, plain = trained_generator()
    layouts, z = [drawn_layout(patch) for patch in (16, 2)], torch.randn(2, 5)
    graphed = spade_fast.Graphed(generator, layouts[0], z)

    def fails(*given, **named):
        raise torch.OutOfMemoryError

    for layout in layouts:
        for each in (generator, plain):
            each.requires_grad_(layout is layouts[1])
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(graphs, "with_room", fails)
            graphed(layout, z)
        z = torch.randn(2, 5)
        assert_agree(graphed(layout, z).detach(), plain(layout, z).detach(), NETWORK)
    assert_agree_beside(dict(generator.named_buffers()), dict(plain.named_buffers()), NETWORK)


def test_a_cumulative_average_cannot_be_captured(without_gpu):
    generator, _ = trained_generator()
    generator.up.norm_0.param_free_norm.momentum = None
    with pytest.raises(ValueError, match="SyncBatchNorm in train mode with momentum=None"):
        spade_fast.Graphed(generator, drawn_layout(8), torch.randn(2, 5))
    spade_fast.Graphed(generator.eval(), drawn_layout(8), torch.randn(2, 5))


def test_models_that_cannot_be_graphed():
    generator = small_generator().eval()
    with pytest.raises(TypeError, match="condition is a list; it should be a Tensor"):
        spade_fast.Graphed(generator, [])
    for condition in (drawn_layout(8), drawn_layout(8).to_segmap()):
        with pytest.raises(ValueError, match="condition is on cpu; it should be on a CUDA GPU"):
            spade_fast.Graphed(generator, condition)
