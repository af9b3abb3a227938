"""Tables are kept as long as the weights stay the same."""

import asyncio
import contextvars
import copy
import dataclasses
import functools
import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from agree import agrees, assert_agree
from label_maps import patches
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

import spade_fast
from spade_fast import SPADE, SemanticLayout, SPADEResnetBlock, kernels, reference
from spade_fast.kernels import torch_backend
from spade_fast.nn import tables as tables_of_windows


@pytest.fixture
def computed(monkeypatch):
    """A list that gets an entry for every table that is computed."""
    tables, compute = [], tables_of_windows.compute_table
    monkeypatch.setattr(
        tables_of_windows,
        "compute_table",
        lambda *arguments: tables.append(True) or compute(*arguments),
    )
    return tables


def layout_of(seed=0, size=32, classes=5):
    return SemanticLayout.from_labels(patches((1, size, size), classes, seed), classes)


def block():
    return SPADEResnetBlock(8, 4, "spadeinstance3x3", 5, nhidden=8).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tables_are_computed_once_for_each_layout(computed, mode):
    model, layouts, x = (
        block(),
        [layout_of(seed) for seed in range(2)],
        torch.randn(3, 1, 8, 32, 32),
    )
    with mode():
        with spade_fast.window_mode("always"):
            expected = [model(own, layout) for own in x for layout in layouts]
        computed.clear()
        with spade_fast.frozen(model) as tables:
            found = [model(own, layout) for own in x for layout in layouts]
            assert len(computed) == 2 * 3  # 2 layouts, 3 SPADEs in the block
            assert tables.bytes == sum(
                4 * layout.windows((32, 32), 3).count * 2 * (8 + 8 + 4) for layout in layouts
            )
        assert tables.bytes == 0
        with spade_fast.window_mode("always"):
            model(x[0], layouts[0])
    assert len(computed) == 3 * 3 and all(map(torch.equal, found, expected))


def test_a_dense_conditions_layout_is_found_first(computed):
    model, segmap = block(), layout_of().to_segmap()
    with torch.inference_mode(), spade_fast.frozen(model):
        for _ in range(3):
            model(torch.randn(1, 8, 32, 32), segmap.clone() if len(computed) == 0 else segmap)
    assert len(computed) == 2 * 3


def test_training_inside_keeps_no_tables(computed):
    model, layout, x = block(), layout_of(), torch.randn(1, 8, 32, 32)
    with spade_fast.frozen(model) as tables, spade_fast.window_mode("always"):
        for _ in range(2):
            model(x, layout).sum().backward()
        assert tables.bytes == 0
    assert len(computed) == 6 and model.norm_0.mlp_gamma.weight.grad is not None


def test_dtypes_and_sizes_have_separate_tables(computed):
    spade, layout = SPADE(8, 5, 8), layout_of()
    with torch.no_grad(), spade_fast.frozen(spade):
        for _ in range(2):
            first, small = (
                spade(torch.randn(1, 8, 32, 32), layout),
                spade(torch.randn(1, 8, 16, 16), layout),
            )
            with torch.autocast("cpu", torch.bfloat16):
                spade(torch.randn(1, 8, 32, 32), layout)
    assert len(computed) == 3 and first.shape[2:] == (32, 32) and small.shape[2:] == (16, 16)


def test_memory_is_bounded(computed):
    spade, layouts, x = (
        SPADE(8, 5, 8),
        [layout_of(seed) for seed in range(4)],
        torch.randn(1, 8, 32, 32),
    )
    sizes = [4 * layout.windows((32, 32), 3).count * 2 * 8 for layout in layouts]
    with torch.no_grad(), spade_fast.frozen(spade, max_bytes=sum(sizes) - 1) as tables:
        for layout in [
            *layouts,
            layouts[3],
            layouts[0],
        ]:  # the first is dropped for the last, and the second for the first
            spade(x, layout)
        assert len(computed) == 5 and tables.bytes == sum(sizes) - sizes[1]
    computed.clear()
    with torch.no_grad(), spade_fast.frozen(spade, max_bytes=sizes[0] - 1) as tables:
        for _ in range(2):
            spade(x, layouts[0])
        assert len(computed) == 2 and tables.bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda spade: spade.mlp_gamma.weight.add_(1),
        lambda spade: spade.mlp_gamma.weight.data.add_(1),
        lambda spade: spade.mlp_gamma.weight.detach().numpy().__imul__(2),
        lambda spade: spade.load_state_dict(SPADE(8, 5, 8).state_dict()),
        lambda spade: setattr(spade, "mlp_gamma", nn.Conv2d(8, 8, 3, padding=1)),
        lambda spade: spade.mlp_gamma.register_parameter("bias", None),
        lambda spade: spade.half(),
    ],
)
def test_a_change_of_weights_is_an_error(change):
    spade = SPADE(8, 5, 8)
    with (
        pytest.raises(RuntimeError, match="weights changed inside frozen.*mlp_gamma"),
        torch.no_grad(),
        spade_fast.frozen(spade),
    ):
        change(spade)


def write_and_restore(spade):
    spade.mlp_gamma.weight.mul_(2).div_(2)


@pytest.mark.parametrize(
    "change",
    [write_and_restore, lambda spade: setattr(spade, "mlp_gamma", copy.deepcopy(spade.mlp_gamma))],
)
def test_weights_that_are_equal_at_the_end_are_no_error(change, computed):
    spade, layout, x = SPADE(8, 5, 8), layout_of(), torch.randn(1, 8, 32, 32)
    with torch.no_grad(), spade_fast.frozen(spade):
        spade(x, layout)
        change(spade)
        spade(x, layout)
    assert len(computed) == 2


def sharded(rank, rendezvous):
    """FSDP replaces weights by equal ones, which it gathers before a call and frees after it."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layout, x = layout_of(), torch.randn(1, 8, 32, 32)
    own = block()
    first, second = (copy.deepcopy(own) for _ in range(2))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(first.norm_0, mesh=mesh), fully_shard(first, mesh=mesh)
    second = FullyShardedDataParallel(second, device_id=torch.device("cpu"))
    with torch.no_grad():
        for model in (first, second):
            with spade_fast.frozen(model):
                for _ in range(2):
                    assert_agree(model(x, layout), own(x, layout))
        with pytest.raises(RuntimeError, match="weights changed inside frozen.*norm_0.mlp_gamma"):
            with spade_fast.frozen(first):
                first.norm_0.mlp_gamma.bias.to_local().data.add_(1)
    dist.destroy_process_group()


def test_weights_that_are_sharded(tmp_path):
    mp.spawn(sharded, (tmp_path / "rendezvous",), nprocs=2)


def give(module, name, tensor):
    """Puts a tensor in a parameter's place, as a hypernetwork does."""
    owner, _, own = name.rpartition(".")
    owner = module.get_submodule(owner)
    owner._parameters.pop(own, None)
    setattr(owner, own, tensor)


def hypernetwork(name):
    """A SPADE, its plain twin and the tensor that both have in a parameter's place."""
    ours, theirs = (package.SPADE(8, 5, 8).double() for package in (spade_fast, reference))
    theirs.load_state_dict(ours.state_dict())
    tensor = ours.get_parameter(name).detach().clone()
    for module in (ours, theirs):
        give(module, name, tensor)
    return ours, theirs, tensor


@pytest.mark.parametrize("name", ["mlp_shared.0.weight", "mlp_gamma.weight", "mlp_beta.bias"])
def test_weights_that_are_no_parameters(name, computed):
    ours, theirs, tensor = hypernetwork(name)
    layout, x = layout_of(), torch.randn(1, 8, 32, 32, dtype=torch.float64)

    def assert_twins():
        assert_agree(ours(x, layout), theirs(x, layout.to_segmap(torch.float64)))

    with torch.no_grad(), spade_fast.frozen(ours):
        assert_twins(), assert_twins()
        assert len(computed) == 1
        for module in (ours, theirs):
            give(module, name, tensor * 2)
        assert_twins()
        for module in (ours, theirs):
            give(module, name, tensor)
        assert_twins()
    with pytest.raises(RuntimeError, match=f"weights changed inside frozen.*: {name};"):
        with torch.no_grad(), spade_fast.frozen(ours):
            assert_twins()
            tensor.mul_(2)
            assert_twins()
    with pytest.raises(RuntimeError, match=f"weights changed inside frozen.*: {name};"):
        with torch.no_grad(), spade_fast.frozen(ours):
            tensor.numpy(force=True)[:] *= 2


class Scaled(nn.Module):
    """A parametrization with a tensor that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(())

    def forward(self, weight):
        return weight * self.scale


@pytest.mark.parametrize(
    "change",
    [lambda made: made.scale.mul_(2), lambda made: setattr(made, "scale", torch.tensor(2.0))],
)
def test_a_tensor_of_a_parametrization(change, computed):
    spade, layout, x = SPADE(8, 5, 8), layout_of(), torch.randn(1, 8, 32, 32)
    parametrize.register_parametrization(spade.mlp_gamma, "weight", Scaled())
    spade.eval()  # in train mode it might change the weight in each call
    with torch.no_grad(), spade_fast.frozen(spade):
        spade(x, layout), spade(x, layout)
        assert len(computed) == 1
        change(spade.mlp_gamma.parametrizations.weight[0])
        assert torch.equal(spade(x, layout), outside(spade, x, layout))


class Keeps(nn.Module):
    def forward(self, x):
        self.weight = x
        return x


def keep_result(spade):
    spade.mlp_gamma.register_forward_hook(lambda module, x, y: setattr(module, "weight_of_y", y))


def keep_inside(spade):
    spade.mlp_gamma = nn.Sequential(spade.mlp_gamma, Keeps())


def mask(spade):
    prune.l1_unstructured(spade.mlp_gamma, "weight", 0.5)
    with torch.no_grad():
        spade.mlp_gamma.weight_orig.add_(1)  # the hook computes the weight in the next call


def spectral(spade):
    nn.utils.spectral_norm(spade.mlp_gamma)


@pytest.mark.parametrize("keep", [keep_result, keep_inside, mask, spectral])
def test_tensors_that_a_call_replaces_are_not_weights(keep):
    spade, layout = SPADE(8, 5, 8), layout_of()
    keep(spade)
    with torch.no_grad(), spade_fast.frozen(spade):
        for _ in range(2):
            spade(torch.randn(1, 8, 32, 32), layout)


def test_an_error_inside_is_raised_unchanged():
    spade = SPADE(8, 5, 8)
    with pytest.raises(KeyError), torch.no_grad(), spade_fast.frozen(spade):
        spade.mlp_gamma.weight.add_(1)
        raise KeyError
    with torch.no_grad():
        assert spade(torch.randn(1, 8, 32, 32), layout_of()).shape == (1, 8, 32, 32)


def test_a_copy_made_inside_is_not_frozen(computed):
    spade, layout, x = SPADE(64, 5, 8), layout_of(), torch.randn(1, 64, 32, 32)
    with torch.no_grad(), spade_fast.frozen(spade):
        spade(x, layout)
        other = copy.deepcopy(spade)
        other.mlp_beta.bias.add_(1)
        assert_agree(other(x, layout), spade(x, layout) + 1)


def test_frozen_inside_frozen(computed):
    model, layout, x = block(), layout_of(), torch.randn(1, 8, 32, 32)
    with torch.no_grad(), spade_fast.frozen(model) as outer:
        model(x, layout)
        with spade_fast.frozen(model.norm_0) as inner:
            model(x, layout)
            assert inner.bytes > 0
        model(x, layout)
        assert outer.bytes > inner.bytes == 0
    assert len(computed) == 3 + 1


def test_threads_share_the_tables():
    spade, layouts, x = (
        SPADE(64, 5, 8),
        [layout_of(seed) for seed in range(4)],
        torch.randn(1, 64, 32, 32),
    )
    with torch.no_grad():
        expected = [spade(x, layout) for layout in layouts]
    wrong = []

    def sample():
        with torch.no_grad():
            for number in range(20):
                y = spade(x, layouts[number % 4])
                wrong.extend([number] * (not agrees(y, expected[number % 4])))

    with spade_fast.frozen(spade, max_bytes=100_000):
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(sample,))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_model_without_spades():
    with (
        pytest.raises(ValueError, match="model is a Linear without any SPADE"),
        spade_fast.frozen(torch.nn.Linear(2, 2)),
    ):
        pass


def test_wrong_activations_are_refused_with_kept_statistics():
    spade, layout, x = SPADE(8, 5, norm="batch").eval(), layout_of(), torch.randn(1, 8, 32, 32)
    with torch.no_grad(), spade_fast.frozen(spade), spade_fast.window_mode("always"):
        spade(x, layout)
        with pytest.raises(ValueError, match="activation is 'gelu'; it should be one of"):
            spade(x, layout, activation="gelu")
        with pytest.raises(TypeError, match="negative_slope is '0'; it should be a number"):
            spade(x, layout, activation="leaky_relu", negative_slope="0")


def test_a_model_that_is_no_module():
    with pytest.raises(TypeError, match="model is a str; it should be a torch.nn.Module"):
        with spade_fast.frozen("model"):
            pass


def test_memory_that_is_no_number_of_bytes():
    with (
        pytest.raises(TypeError, match="max_bytes is '1GB'; it should be a whole number"),
        spade_fast.frozen(SPADE(8, 5, 8), "1GB"),
    ):
        pass


def test_a_thread_without_the_context_is_not_frozen():
    spade, layout, x = SPADE(8, 5, 8), layout_of(), torch.randn(1, 8, 32, 32)

    def sample():
        with torch.no_grad(), spade_fast.window_mode("always"):
            spade(x, layout)

    with spade_fast.frozen(spade) as tables:
        thread = threading.Thread(target=sample)
        thread.start(), thread.join()
        assert tables.bytes == 0
        thread = threading.Thread(target=contextvars.copy_context().run, args=(sample,))
        thread.start(), thread.join()
        assert tables.bytes > 0


def pair():
    """A model, other weights for it, a function from weights to the truth, and inputs."""
    model = block().double()
    others = {name: 1 + one.detach().sin() for name, one in model.named_parameters()}
    layout, x = layout_of(), torch.randn(1, 8, 32, 32, dtype=torch.float64)
    plain = reference.SPADEResnetBlock(8, 4, "spadeinstance3x3", 5, nhidden=8).double()
    segmap = layout.to_segmap(torch.float64)

    def truth(weights):
        return functional_call(plain, {**plain.state_dict(), **weights}, (x, segmap))

    return model, others, truth, x, layout


def by_functional_call(model, others, forward):
    return functional_call(model, others, forward.args)


def by_data(model, others, forward):
    kept = {name: one.data for name, one in model.named_parameters()}
    for name, one in model.named_parameters():
        one.data = others[name]
    y = forward()
    for name, one in model.named_parameters():
        one.data = kept[name]
    return y


def by_parameters(model, others, forward):
    kept = dict(model.named_parameters())
    for given in ({name: nn.Parameter(one) for name, one in others.items()}, kept):
        for name, one in given.items():
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, one)
        if given is not kept:
            y = forward()
    return y


def by_modules(model, others, forward):
    kept = dict(model.named_children())
    other = copy.deepcopy(model)
    other.load_state_dict(others)
    for name, child in other.named_children():
        for part in dict(child.named_children()):
            kept[name, part] = getattr(kept[name], part)
            setattr(kept[name], part, getattr(child, part))
        if not dict(child.named_children()):
            setattr(model, name, child)
    y = forward()
    for name, child in kept.items():
        setattr(kept[name[0]], name[1], child) if isinstance(name, tuple) else setattr(
            model, name, child
        )
    return y


def by_copies_and_back(model, others, forward):
    """As with an EMA: the weights are overwritten, then restored to the last bit."""
    kept = {name: one.clone() for name, one in model.named_parameters()}
    for name, one in model.named_parameters():
        one.copy_(others[name])
    y = forward()
    for name, one in model.named_parameters():
        one.copy_(kept[name])
    return y


@pytest.mark.parametrize("first", ["own", "others"])
@pytest.mark.parametrize(
    "exchange", [by_functional_call, by_data, by_parameters, by_modules, by_copies_and_back]
)
def test_weights_that_are_exchanged_and_restored(exchange, first):
    model, others, truth, x, layout = pair()
    own = {name: one.detach().clone() for name, one in model.named_parameters()}
    forward = functools.partial(model, x, layout)
    try:
        with torch.no_grad(), spade_fast.frozen(model):
            for _ in range(2):
                if first == "own":
                    assert_agree(forward(), truth(own))
                first = "own"
                assert_agree(exchange(model, others, forward), truth(others))
                assert_agree(forward(), truth(own))
    except RuntimeError as error:
        # The weights were written to, so the end of frozen may report it.
        assert exchange in (by_copies_and_back, by_modules), error
        assert "weights changed inside frozen" in str(error)


def ends_out_of_order(model, layout, x):
    """Two threads hold the model frozen; the one that began first ends first. Returns the errors
    that they raised.
    """
    begun, ended, errors = [threading.Event() for _ in range(2)], threading.Event(), []

    def hold(number):
        try:
            with torch.no_grad(), spade_fast.frozen(model):
                model(x, layout)
                begun[number].set()
                (begun[1] if number == 0 else ended).wait(10)
                model(x, layout)
        except Exception as error:
            errors.append(error)
        if number == 0:
            ended.set()

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(2)]
    threads[0].start(), begun[0].wait(10), threads[1].start()
    for thread in threads:
        thread.join()
    return errors


def tasks_end_out_of_order(model, layout, x):
    errors = []

    async def hold(wait):
        try:
            with spade_fast.frozen(model):
                model(x, layout)
                await asyncio.sleep(wait)
                model(x, layout)
        except Exception as error:
            errors.append(error)

    async def both():
        first = asyncio.create_task(hold(0.02))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, hold(0.03))

    with torch.no_grad():  # around both tasks, because no_grad holds for a thread, not for a task
        asyncio.run(both())
    return errors


def scopes_end_out_of_order(model, layout, x):
    scopes = [spade_fast.frozen(model) for _ in range(2)]
    with torch.no_grad():
        for scope in scopes:
            scope.__enter__()
            model(x, layout)
        for scope in scopes:
            scope.__exit__(None, None, None)
    return []


@pytest.mark.parametrize(
    "hold", [ends_out_of_order, tasks_end_out_of_order, scopes_end_out_of_order]
)
def test_overlapping_scopes_end_completely(hold):
    model, others, truth, x, layout = pair()
    assert not hold(model, layout, x)
    with torch.no_grad():
        model(x, layout)
        model.load_state_dict(others)
        with spade_fast.window_mode("always"):
            assert_agree(model(x, layout), truth(others))
        assert_agree(model(x, layout), truth(others))
    with torch.no_grad(), spade_fast.frozen(model):
        assert_agree(model(x, layout), truth(others))


def test_a_scope_that_ends_while_another_thread_is_inside():
    model, _, truth, x, layout = pair()
    own = {name: one.detach().clone() for name, one in model.named_parameters()}
    inside, go_on, found = threading.Event(), threading.Event(), []

    def hold():
        with torch.no_grad(), spade_fast.frozen(model) as tables:
            model(x, layout)
            inside.set(), go_on.wait(10)
            found.append((model(x, layout), tables.bytes))

    thread = threading.Thread(target=hold)
    with torch.no_grad(), spade_fast.frozen(model):
        model(x, layout)
        thread.start(), inside.wait(10)
    go_on.set(), thread.join()
    (y, bytes), expected = found[0], truth(own)
    assert_agree(y, expected)
    assert bytes > 0


EDITS = {
    "the palette": lambda layout: layout.palette.mul_(2),
    "another palette": lambda layout: setattr(layout, "palette", layout.palette * 2),
    "the codes": lambda layout: layout.codes.copy_(layout.codes.flip(2)),
    "another codes": lambda layout: setattr(layout, "codes", layout.codes.flip(1)),
}


@pytest.mark.parametrize(
    "scope", [spade_fast.frozen, lambda model: spade_fast.window_mode("always")]
)
@pytest.mark.parametrize("edit", EDITS)
def test_a_layout_that_is_edited(edit, scope):
    """As in a painting program, when the user moves an edge."""
    model, _, _, x, layout = pair()
    plain = reference.SPADEResnetBlock(8, 4, "spadeinstance3x3", 5, nhidden=8).double()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad(), scope(model):
        for _ in range(2):
            assert_agree(model(x, layout), plain(x, layout.to_segmap(torch.float64)))
            EDITS[edit](layout)
        assert_agree(model(x, layout), plain(x, layout.to_segmap(torch.float64)))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_layout_pooled_repeated_and_resized(edit):
    layout = layout_of()

    def fresh():
        return SemanticLayout(layout.codes.clone(), layout.palette.clone())

    spade, x = SPADE(8, 5, 8).double(), torch.randn(2, 8, 32, 32, dtype=torch.float64)
    repeated = layout.repeat(2)
    with torch.no_grad(), spade_fast.window_mode("always"):
        for _ in range(2):
            assert torch.equal(
                layout.avg_pool(3, 2, 1).to_segmap(), fresh().avg_pool(3, 2, 1).to_segmap()
            )
            assert_agree(spade(x, layout.repeat(2)), spade(x, fresh().repeat(2)))
            assert_agree(
                spade(x, repeated),
                spade(x, SemanticLayout(repeated.codes.clone(), repeated.palette.clone())),
            )
            EDITS[edit](layout)


@pytest.mark.parametrize("condition", ["layout", "label map"])
def test_tables_are_freed_with_their_layout(condition):
    model, x, gone, held = block(), torch.randn(1, 8, 32, 32), [], []
    with torch.no_grad(), spade_fast.frozen(model) as tables:
        for seed in range(4):
            segmap = layout_of(seed) if condition == "layout" else layout_of(seed).to_segmap()
            model(x, segmap)
            gone.append(weakref.ref(segmap))
            del segmap
            gc.collect()
            held.append(tables.bytes)
        assert all(layout() is None for layout in gone)
        assert max(held) == 0 or tables.bytes < 2 * held[0]
        layout = layout_of(9)
        model(x, layout)
        assert tables.bytes > 0
        del layout
        gc.collect()
        assert condition != "layout" or tables.bytes == 0


def test_tables_are_freed_with_their_model():
    x, layout = torch.randn(1, 8, 32, 32), layout_of()
    model = block()
    gone = weakref.ref(model)
    with torch.no_grad(), spade_fast.frozen(model):
        model(x, layout)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda spade: spade.mlp_shared.__setitem__(1, nn.Tanh()),
        lambda spade: setattr(spade.mlp_shared[1], "negative_slope", 0.9),
        lambda spade: setattr(spade.mlp_gamma[1], "eps", 1.0),
    ],
)
def test_changes_of_anything_but_weights(change):
    spade, layout, x = SPADE(8, 5, 8).eval(), layout_of(), torch.randn(1, 8, 32, 32)
    spade.mlp_shared[1] = nn.LeakyReLU(0.2)
    spade.mlp_gamma = nn.Sequential(spade.mlp_gamma, nn.InstanceNorm2d(8))
    with torch.no_grad(), spade_fast.window_mode("always"):
        with spade_fast.frozen(spade):
            before = spade(x, layout)
            change(spade)
            found = spade(x, layout)
        assert torch.equal(found, spade(x, layout)) and not torch.equal(found, before)


def by_pytorchs_own_norm(model):
    """Which writes to running statistics without changing their versions."""
    model.norm_0.param_free_norm.train()(torch.randn(2, 8, 4, 4))
    model.norm_0.param_free_norm.eval()


def by_loading(model):
    state = {name: one + 1 for name, one in model.state_dict().items() if "mlp" not in name}
    model.load_state_dict(state, strict=False)


NORMS_AND_SIGMA = {
    "running statistics": lambda model: model.norm_0.param_free_norm.running_mean.add_(1),
    "PyTorch's own norm": by_pytorchs_own_norm,
    "other running statistics": lambda model: setattr(
        model.norm_1.param_free_norm, "running_var", torch.full((4,), 2.0)
    ),
    "their data": lambda model: setattr(
        model.norm_1.param_free_norm.running_var, "data", torch.full((4,), 2.0)
    ),
    "eps": lambda model: setattr(model.norm_1.param_free_norm, "eps", 0.5),
    "a weight where there was none": lambda model: setattr(
        model.norm_0.param_free_norm, "weight", nn.Parameter(torch.full((8,), 2.0))
    ),
    "a bias": lambda model: setattr(
        model.norm_0.param_free_norm, "bias", nn.Parameter(torch.full((8,), 2.0))
    ),
    "another norm": lambda model: setattr(
        model.norm_0, "param_free_norm", nn.BatchNorm2d(8, eps=1, affine=True).eval()
    ),
    "a norm that measures": lambda model: model.norm_0.param_free_norm.train(),
    "a convolution's weight": lambda model: model.conv_0.weight_orig.mul_(2).add_(1),
    "its data": lambda model: setattr(model.conv_1.weight_orig, "data", torch.randn(4, 4, 3, 3)),
    "another weight": lambda model: setattr(
        model.conv_0, "weight_orig", nn.Parameter(torch.randn(4, 8, 3, 3))
    ),
    "a singular vector": lambda model: model.conv_0.weight_u.add_(1),
    "a step of training": lambda model: (
        model.conv_0.train()(torch.randn(1, 8, 4, 4)) is model.conv_0.eval()
    ),
    "loaded": by_loading,
    "another dtype": lambda model: model.double(),
}


@pytest.mark.parametrize("change", NORMS_AND_SIGMA)
def test_norms_and_spectral_norm_that_change(change):
    model = SPADEResnetBlock(8, 4, "spectralspadebatch3x3", 5, nhidden=8).eval()
    layout, x = layout_of(), torch.randn(1, 8, 32, 32)
    with torch.no_grad():
        try:
            with spade_fast.frozen(model):
                for size in (32, 2):  # x is divided by σ where it is smaller than the weight
                    model(x[..., :size, :size], layout)
                NORMS_AND_SIGMA[change](model)
                dtype = model.conv_0.bias.dtype
                given, condition = (
                    x.to(dtype),
                    SemanticLayout(layout.codes, layout.palette.to(dtype)),
                )
                other = copy.deepcopy(model)
                for size in (32, 2):
                    part = given[..., :size, :size]
                    assert torch.equal(model(part, condition), outside(other, part, condition))
        except RuntimeError as error:
            assert change in ("another dtype", "their data", "its data"), error
            assert "weights changed inside frozen" in str(error)


def outside(model, x, layout):
    """The model's result without frozen: in a new thread, which has no scope."""
    found = []

    def run():
        with torch.no_grad(), spade_fast.window_mode("always"):
            found.append(model(x, layout))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_norms_and_sigma_are_computed_once(monkeypatch):
    model, x = (
        SPADEResnetBlock(8, 4, "spectralspadebatch3x3", 5, nhidden=8).eval(),
        torch.randn(2, 8, 2, 2),
    )
    calls, chosen = [], kernels.select(x)

    def count(function):
        return lambda *arguments: calls.append(function) or function(*arguments)

    monkeypatch.setattr(torch, "mv", count(torch.mv))
    counted = dataclasses.replace(chosen, running_planes=count(chosen.running_planes))
    monkeypatch.setattr(kernels, "BEST_FIRST", (counted,))
    with torch.no_grad(), spade_fast.frozen(model):
        found = [model(x, layout_of(seed)) for seed in (0, 1, 0)]
        assert len(calls) == 2 * 3  # σ of three convolutions, planes of three norms
        model(x[:1], layout_of(0))
        assert len(calls) == 3 * 3  # the planes of one image
    assert torch.equal(found[0], found[2])
    with torch.no_grad():
        model(x, layout_of(0))
    assert len(calls) == 5 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sigma_with_and_without_autocast(dtype):
    model = SPADEResnetBlock(8, 4, "spectralspadeinstance3x3", 5, nhidden=8).eval()
    layout, x = layout_of(), torch.randn(1, 8, 2, 2)
    with torch.no_grad(), spade_fast.frozen(model):
        for enabled in (False, True, False):
            with torch.autocast("cpu", dtype, enabled=enabled):
                found = model(x, layout)
            with torch.autocast("cpu", dtype, enabled=enabled):
                with spade_fast.window_mode("always"):
                    expected = copy.deepcopy(model)(x, layout)
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "tensor", ["norm_0.param_free_norm.running_mean", "conv_0.weight_orig", "conv_1.weight_u"]
)
def test_changes_of_norms_and_convolutions_that_versions_do_not_show(tensor):
    model = SPADEResnetBlock(8, 4, "spectralspadebatch3x3", 5, nhidden=8).eval()
    module, x = tensor.rpartition(".")[0], torch.randn(1, 8, 2, 2)
    with pytest.raises(RuntimeError, match=f"changed inside frozen.*: {module};"):
        with torch.no_grad(), spade_fast.frozen(model):
            model(x, layout_of())
            model.get_parameter(tensor).data.add_(1) if "orig" in tensor else model.get_buffer(
                tensor
            ).data.add_(1)


@pytest.fixture
def gathering(monkeypatch):
    """Kernels that gather rows in half precision, as on a GPU, and record the addresses of packed
    weights in a list.
    """
    given = []

    def convolve(rows, weights, *others):
        # Parameters are weights that are not packed.
        if rows.element_size() == 2 and not isinstance(weights[0], nn.Parameter):
            (weight,) = weights
            assert rows.shape[1] == weight.shape[1] and rows.shape[1] % 16 == 0
            assert weight.flatten(2).transpose(1, 2).is_contiguous()
            given.append(weight.data_ptr())
        return torch_backend.convolve_windows(rows, weights, *others)

    backend = dataclasses.replace(
        torch_backend.BACKEND,
        dtype_at_windows=lambda dtype: dtype,
        gathers_half=True,
        convolve_windows=convolve,
    )
    monkeypatch.setattr(kernels, "BEST_FIRST", (backend,))
    return given


PACKED = {
    "nothing": lambda spade: None,
    "in place": lambda spade: spade.mlp_beta.weight.mul_(2),
    "the first": lambda spade: spade.mlp_shared[0].weight.mul_(2),
    "a bias": lambda spade: spade.mlp_gamma.bias.add_(1),
    "no bias": lambda spade: setattr(spade.mlp_beta, "bias", None),
    "another weight": lambda spade: setattr(
        spade.mlp_gamma, "weight", nn.Parameter(torch.randn_like(spade.mlp_gamma.weight))
    ),
    "data": lambda spade: setattr(
        spade.mlp_gamma.weight, "data", torch.randn_like(spade.mlp_gamma.weight)
    ),
    "a dtype": lambda spade: spade.half(),
}


@pytest.mark.parametrize("change", PACKED)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_weights_packed_for_the_kernels(gathering, change, kernel_size):
    spade = SPADE(8, 5, 8, kernel_size=kernel_size).eval().bfloat16()
    x = torch.randn(1, 8, 32, 32)
    try:
        with torch.no_grad(), spade_fast.frozen(spade):
            spade(x.bfloat16(), layout_of(0))
            before = [*gathering]
            PACKED[change](spade)
            dtype = spade.mlp_gamma.weight.dtype
            found = spade(x.to(dtype), layout_of(1))
            assert (gathering[2:] == before) == (change == "nothing")
            again = outside(spade, x.to(dtype), layout_of(1))
            assert torch.equal(found, again)
            exact = outside(
                copy.deepcopy(spade).double(), x.double(), layout_of(1).to_segmap().double()
            )
            assert (found.double() - exact).abs().max() < 0.1 * exact.abs().max()
    except RuntimeError as error:
        assert change != "nothing" and "weights changed inside frozen" in str(error)


def test_an_edited_palette_is_read_again(gathering):
    spade, x, layout = SPADE(8, 5, 8).eval().bfloat16(), torch.randn(1, 8, 32, 32), layout_of()
    with torch.no_grad(), spade_fast.window_mode("always"):
        spade(x.bfloat16(), layout)
        layout.palette.mul_(2)
        found = spade(x.bfloat16(), layout)
        fresh = SemanticLayout(layout.codes.clone(), layout.palette.clone())
        assert torch.equal(found, spade(x.bfloat16(), fresh))
