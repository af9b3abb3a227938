"""Gradient checkpointing of the generator's blocks gives the same bits as the plain forward and
backward.
"""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from label_maps import LABEL_NC, layout_of

import spade_fast
from spade_fast import SPADEGenerator, checkpoint, use_backend, window_mode

NORMS = ["instance", "batch", "syncbatch", "group"]


def generators(norm="batch", spectral=True):
    """Two generators with the same weights. The second recomputes its blocks."""
    plain = SPADEGenerator(
        LABEL_NC,
        ngf=4,
        z_dim=5,
        stages=[("first", 16, 1), ("second", 8, 2)],
        norm_G=f"{'spectral' * spectral}spade{norm}3x3",
        nhidden=8,
    )
    other = copy.deepcopy(plain)
    other.recompute = True
    return plain, other


def condition(dense=False):
    layout = layout_of((2, 16, 16))
    return torch.rand(2, LABEL_NC, 16, 16) if dense else layout


def step(network, *inputs):
    network.zero_grad()
    image = network(*inputs)
    (image * torch.linspace(-1, 1, image.numel()).view(image.shape)).sum().backward()
    return image


def assert_same(first, second):
    """Asserts that parameters, gradients and buffers are the same, bit for bit."""
    for kind in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(second, kind)())
        for name, tensor in getattr(first, kind)():
            assert torch.equal(tensor, theirs[name]), name
            assert tensor.grad is theirs[name].grad is None or torch.equal(
                tensor.grad, theirs[name].grad
            ), name


def bytes_kept(run):
    """The bytes of the tensors that operations keep for backward, each counted once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # kept alive, so that its address is not used again
        kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("dense", [False, True])
def test_several_steps(norm, spectral, dense):
    networks, z, seen = generators(norm, spectral), torch.randn(2, 5), condition(dense)
    optimizers = [torch.optim.Adam(network.parameters(), 1e-2) for network in networks]
    for _ in range(3):
        plain, other = (step(network, seen, z) for network in networks)
        assert torch.equal(plain, other)
        assert_same(*networks)
        for optimizer in optimizers:
            optimizer.step()
    for network in networks:
        network.eval()
    plain, other = (step(network, seen, z) for network in networks)
    assert torch.equal(plain, other)
    assert_same(*networks)


@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("dense", [False, True])
def test_gradients_of_inputs(mode, dense):
    """Switches that hold in forward also hold in backward, even in another thread."""
    networks, seen = generators(), condition(dense)
    found = []
    for network in networks:
        z = torch.ones(2, 5, requires_grad=True)
        inputs = seen.clone().requires_grad_() if dense else seen
        with window_mode(mode), use_backend("torch"):
            image = network(inputs, z)
        loss = image.square().sum()
        thread = threading.Thread(target=loss.backward)  # as autograd has one for each GPU
        thread.start()
        thread.join()
        found.append([z.grad, inputs.grad if dense else z])
    for first, second in zip(*found):
        assert torch.equal(first, second)
    assert_same(*networks)


def test_only_the_blocks_inputs_are_kept():
    networks, z = generators(), torch.randn(2, 5)
    plain, other = (bytes_kept(lambda: network(condition(), z)) for network in networks)
    own = bytes_kept(lambda: networks[1].first(torch.rand(2, 64, 4, 4), condition()))
    assert other < plain - own
    for network in networks:
        network.eval()
    plain, other = (bytes_kept(lambda: network(condition(), z)) for network in networks)
    assert plain == other


def test_no_grad_and_eval_do_not_recompute(monkeypatch):
    """`recomputed` is not even called."""
    monkeypatch.setattr("spade_fast.nn.generator.recomputed", None)
    _, network = generators()
    with torch.no_grad():
        network(condition())
    network.eval()(condition())
    with pytest.raises(TypeError):
        network.train()(condition())


def test_a_captured_graph_is_not_recomputed(monkeypatch):
    networks, seen, z = generators(), condition(), torch.randn(2, 5)
    for name, own in {"checkpoint": None, "is_capturing": lambda tensor: True}.items():
        monkeypatch.setattr(f"spade_fast.nn.recompute.{name}", own)
    for network in networks:
        network(seen, z).square().sum().backward()
    assert_same(*networks)


def test_two_forwards_before_one_backward():
    """The network is in eval mode by then, and the first forward's vectors and running statistics
    have changed.
    """
    networks, seen = generators(), condition()
    first, second = torch.randn(2, 2, 5)
    for network in networks:
        images = network(seen, first), network(seen, second)
        network.eval()
        (images[0] * images[1].square()).sum().backward()
        network.train()
    assert_same(*networks)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_backward_twice(norm):
    networks, seen, z = generators(norm), condition(), torch.randn(2, 5)
    for network in networks:
        loss = network(seen, z).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same(*networks)


def test_second_derivatives():
    networks, seen, found = generators("instance"), condition(), []
    for network in networks:
        z = torch.ones(2, 5, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(seen, z).square().sum(), z, create_graph=True)
        network.zero_grad()
        gradient.square().sum().backward()
        found.append(gradient)
    assert torch.equal(*found)
    assert_same(*networks)


@pytest.mark.parametrize("norm", NORMS)
def test_autocast(norm):
    networks, seen, z = generators(norm), condition(), torch.randn(2, 5)
    for network in networks:
        with torch.autocast("cpu", torch.bfloat16):
            image = network(seen, z)
        image.float().square().sum().backward()
    assert_same(*networks)


def test_new_spectral_norm_and_hooks():
    """Modules inside a block may be replaced. A block with hooks keeps everything."""
    networks, seen, z, calls = generators(spectral=False), condition(), torch.randn(2, 5), []
    for network in networks:
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.spectral_norm(network.first.conv_0)
        network.first.norm_1.mlp_gamma.register_forward_hook(lambda *_: calls.append("inside"))
        network.second.register_forward_hook(lambda *_: calls.append("block"))
    for _ in range(2):
        assert torch.equal(*(step(network, seen, z) for network in networks))
        assert_same(*networks)
    assert calls == 2 * ["inside", "block", "inside", "block", "inside"]


def test_randomness_inside():
    networks, seen, z = generators("instance"), condition(), torch.randn(2, 5)
    for network in networks:
        network.first.se = torch.nn.Dropout(0.5)
        torch.manual_seed(1)
        step(network, seen, z)
    assert_same(*networks)


@pytest.mark.parametrize("is_given", [False, True], ids=["a parameter", "given"])
def test_weights_written_to_before_backward(is_given):
    _, network = generators()
    convolution = network.first.norm_0.mlp_gamma
    if is_given:  # by a hypernetwork
        weight = convolution.weight.detach().clone()
        del convolution.weight
        convolution.weight = weight
    loss = network(condition()).sum()
    with torch.no_grad():
        convolution.weight.mul_(2)
    with pytest.raises(RuntimeError, match="was written to between forward and backward"):
        loss.backward()


def test_condition_written_to_before_backward():
    _, network = generators()
    segmap = torch.rand(2, LABEL_NC, 8, 8)
    loss = network(segmap).sum()
    segmap.mul_(2)
    with pytest.raises(RuntimeError, match="was written to between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("part", ["codes", "palette"])
def test_layout_written_to_before_backward(part):
    _, network = generators()
    layout = condition()
    loss = network(layout).sum()
    getattr(layout, part).copy_(getattr(layout, part).flip(0))
    with pytest.raises(RuntimeError, match="was written to between forward and backward"):
        loss.backward()


def test_condition_of_inference_mode():
    networks, z = generators(), torch.randn(2, 5)
    with torch.inference_mode():
        segmap = condition(dense=True)
    for network in networks:
        step(network, segmap, z)
    assert_same(*networks)


def test_recompute_is_not_saved(tmp_path):
    plain, network = generators()
    assert not plain.recompute
    checkpoint.write(network, tmp_path / "generator.pt")
    loaded = checkpoint.load(tmp_path / "generator.pt")
    assert loaded.arguments == network.arguments and not loaded.recompute


def in_parallel(rank, processes, rendezvous, results):
    """DistributedDataParallel with instance norm, which it accepts on a CPU; otherwise the network
    alone.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    for norm in ("instance", "syncbatch"):
        networks, z = generators(norm), torch.randn(2, 5, generator=torch.manual_seed(rank))
        for network in networks:
            run = network
            if norm == "instance":
                run = torch.nn.parallel.DistributedDataParallel(network)
            for _ in range(2):
                step(run, spade_fast.SemanticLayout.from_labels(labels(rank), LABEL_NC), z)
        assert_same(*networks)
    (results / str(rank)).touch()
    dist.destroy_process_group()


def labels(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(LABEL_NC, (2, 4, 4), generator=generator).repeat_interleave(4, 1)


@pytest.mark.full
def test_processes(tmp_path):
    mp.spawn(in_parallel, (2, tmp_path / "rendezvous", tmp_path), nprocs=2)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
