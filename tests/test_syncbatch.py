"""Over two processes: syncbatch equals batch norm over the whole batch in one process, and a
generator in DistributedDataParallel equals itself.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from agree import CANCELLED, NETWORK, assert_agree, assert_layers_agree

import spade_fast
from spade_fast import reference

BATCHES = {"equal": (2, 2), "unequal": (1, 3), "one empty": (4, 0), "one value": (1, 1)}


def data(total):
    generator = torch.Generator().manual_seed(1)
    size = (total, 4, 1, 1) if total == 2 else (total, 4, 5, 6)
    x, dy = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    segmap = torch.randn(total, 3, *size[2:], generator=generator, dtype=torch.float64)
    return x + 100, segmap, dy


def layer(module):
    torch.manual_seed(0)
    return module.SPADE(4, 3, 6, norm="syncbatch", affine=True).double()


def numbers(layer, x, segmap, dy):
    x.requires_grad_()
    y = layer(x, segmap)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    running = [layer.param_free_norm.running_mean, layer.param_free_norm.running_var]
    return {
        "by sample": [y.detach(), gradients[0]],
        "by process": list(gradients[1:]),
        "running": running,
    }


def process(rank, batches, rendezvous, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(batches)
    )
    mine = slice(sum(batches[:rank]), sum(batches[: rank + 1]))
    found = numbers(layer(spade_fast), *(tensor[mine].clone() for tensor in data(sum(batches))))
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_two_processes_equal_one(batches, tmp_path):
    mp.spawn(process, (batches, tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = numbers(layer(reference), *data(sum(batches)))
    joint = {
        "by sample": map(torch.cat, zip(first["by sample"], second["by sample"])),
        "by process": map(torch.add, first["by process"], second["by process"]),
        "running": first["running"],
    }
    assert_agree({name: list(tensors) for name, tensors in joint.items()}, whole, CANCELLED)
    assert all(map(torch.equal, first["running"], second["running"]))


def second_derivative(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    x, segmap, _ = (tensor[:2] for tensor in data(4))
    y = layer(spade_fast)(x.requires_grad_(), segmap)
    with pytest.raises(
        RuntimeError, match="second derivatives of norm='syncbatch' over several processes"
    ):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    dist.destroy_process_group()


def test_second_derivatives_over_two_processes_are_an_error(tmp_path):
    mp.spawn(second_derivative, (tmp_path / "rendezvous",), nprocs=2)


def generator_and_condition():
    torch.manual_seed(0)
    # With instance norm: on a CPU, DistributedDataParallel refuses SyncBatchNorm.
    generator = spade_fast.SPADEGenerator.official(
        3, ngf=2, nhidden=4, crop_size=64, norm_G="spectralspadeinstance3x3"
    ).double()
    labels = torch.randint(3, (4, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return generator, labels


def gradients_of(network, labels):
    network(spade_fast.SemanticLayout.from_labels(labels, 3)).square().sum().backward()
    return {
        name.removeprefix("module."): parameter.grad
        for name, parameter in network.named_parameters()
    }


def train_in_parallel(rank, rendezvous, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    generator, labels = generator_and_condition()
    found = gradients_of(
        torch.nn.parallel.DistributedDataParallel(generator), labels[2 * rank : 2 * rank + 2]
    )
    torch.save((found, dict(generator.named_buffers())), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_a_generator_in_distributed_data_parallel(tmp_path):
    mp.spawn(train_in_parallel, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    generator, labels = generator_and_condition()
    expected, buffers = gradients_of(generator, labels), dict(generator.named_buffers())
    for rank in range(2):
        found, found_buffers = torch.load(tmp_path / f"{rank}.pt")
        # Gradients are averaged over the processes.
        assert_layers_agree({name: 2 * one for name, one in found.items()}, expected, NETWORK)
        assert_agree(found_buffers, buffers, NETWORK)


ONE_VALUE = [(1, 4, 1, 1), (1, 4, 1), (1, 4, 1, 1, 1)]


@pytest.mark.parametrize("norm", ["batch", "syncbatch"])
@pytest.mark.parametrize("shape", ONE_VALUE)
def test_one_value_per_channel_without_processes(norm, shape):
    """A single value has no variance: eager PyTorch raises, and keeps its running statistics."""
    settings = {"norm": norm, "spatial_dims": len(shape) - 2}
    ours, theirs = (
        package.SPADE(4, 3, 6, **settings).double() for package in (spade_fast, reference)
    )
    x, segmap = torch.randn(shape).double(), torch.randn(1, 3, *shape[2:]).double()
    for layer in (ours, theirs):
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(x, segmap)
        with pytest.raises(ValueError, match="more than 1 value per channel"), torch.no_grad():
            layer(x, segmap)
        for name, buffer in layer.named_buffers():
            if "num_batches" not in name:
                assert torch.equal(buffer, before[name])
    theirs.load_state_dict(ours.state_dict())
    assert_agree(ours.eval()(x, segmap), theirs.eval()(x, segmap))


@pytest.mark.parametrize("norm", ["batch", "syncbatch", "instance"])
def test_one_value_per_channel_in_the_operation(norm):
    x = torch.randn(1, 4, 1, 1).double()
    running = {}
    if norm != "instance":
        running = {"running_mean": torch.zeros(4).double(), "running_var": torch.ones(4).double()}
    with pytest.raises(ValueError, match="more than 1"):
        reference.spade_modulate(x, x, x, norm=norm, **running)
    with pytest.raises(ValueError, match="more than 1"):
        spade_fast.spade_modulate(x, x, x, norm=norm, **running)
    if running:
        assert running["running_mean"].eq(0).all() and running["running_var"].eq(1).all()
    block, twin = (
        package.SPADEResnetBlock(4, 3, f"spade{norm}3x3", 3).double()
        for package in (spade_fast, reference)
    )
    for module in (block, twin):
        with pytest.raises(ValueError, match="more than 1"):
            module(x, torch.randn(1, 3, 1, 1).double())
        assert not any(
            buffer.isnan().any() for buffer in module.buffers() if buffer.is_floating_point()
        )
