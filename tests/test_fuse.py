"""What `convert` does where a module's own forward has to run: the modulation in it becomes one
operation, and nothing else changes.
"""

import copy
import gc
import io
import weakref

import families
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from agree import assert_agree, assert_agree_beside
from families import CHANNELS, FUSED, LABELS, Layer
from torch.utils.checkpoint import checkpoint
from twins import assert_same_calls

import spade_fast
from spade_fast.convert import fuse

FAMILIES = {
    **FUSED,
    "VITON-HD": families.VITONHD,
    "SEAN's ACE": families.ACE,
    "imaginaire, two conditions": lambda: families.ImaginaireNorm(2),
    "NowcastNet": families.NowcastNet,
    "ZeroSFT": lambda: families.ZeroSFT(concatenated=4),
    "StableSR": families.StableSR,
}
CALLS = {
    "imaginaire, two conditions": lambda module, x, segmap: module(x, segmap, -segmap),
    "ZeroSFT": lambda module, x, segmap: module(segmap, x, x[:, :4] + 1, control_scale=0.7),
    "StableSR": lambda module, x, segmap: module({"5": x}, {"5": segmap[:1]}, 5),
}


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch):
    monkeypatch.setattr(fuse, "pays", lambda elements, is_slow: True)


@pytest.fixture
def fused(monkeypatch):
    """The calls of `spade_modulate` from other people's forwards."""
    found, modulate = [], fuse.spade_modulate
    monkeypatch.setattr(
        fuse, "spade_modulate", lambda *given, **named: found.append(1) or modulate(*given, **named)
    )
    return found


def pictures(dtype=torch.float64):
    torch.manual_seed(2)
    return torch.randn(2, CHANNELS, 6, 5, dtype=dtype), torch.randn(2, LABELS, 6, 5, dtype=dtype)


def outcome(model, x, segmap, call):
    """The result, the gradients and the buffers."""
    torch.manual_seed(3)
    x, segmap = (tensor.clone().requires_grad_() for tensor in (x, segmap))
    y = call(model, x, segmap)
    wanted = {"x": x, "segmap": segmap, **dict(model.named_parameters())}
    found = torch.autograd.grad(y.square().sum(), list(wanted.values()), allow_unused=True)
    gradients = {name: own for name, own in zip(wanted, found) if own is not None}
    return {"y": y.detach(), **gradients, **dict(model.named_buffers())}


def own_and_converted(make):
    torch.manual_seed(0)
    own = make().double()
    ours = copy.deepcopy(own)
    (entry, *_) = spade_fast.convert(ours)
    assert entry.converted and "with its modulation as one operation" in entry.reason, entry
    return own, ours


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_after_steps_and_after_reverting(family, fused):
    own, ours = own_and_converted(FAMILIES[family])
    call = CALLS.get(family, lambda module, x, segmap: module(x, segmap))
    given = pictures()
    for train in (True, False, True):
        fused.clear()
        for model in (ours.train(train), own.train(train)):
            torch.manual_seed(4)
            step = torch.optim.SGD(model.parameters(), 0.01)
            call(model, *given).square().mean().backward()
            step.step()
            step.zero_grad()
        found = outcome(ours, *given, call)
        assert len(fused) == 2
        assert_agree_beside(found, outcome(own, *given, call))
        with torch.no_grad():
            results = [torch.manual_seed(5) and call(model, *given) for model in (ours, own)]
        assert_agree(*results)
    theirs, single = copy.deepcopy(own).float(), copy.deepcopy(ours).float()
    given = pictures(torch.float32)
    assert_agree_beside(outcome(single, *given, call), outcome(theirs, *given, call), 2**12)
    fused.clear()
    assert spade_fast.revert(ours) == 1 and type(ours) is type(own)
    own.load_state_dict(ours.state_dict())
    assert_agree_beside(outcome(ours, *pictures(), call), outcome(own, *pictures(), call))
    assert not fused


def written_after(layer, x, gamma, beta):
    x = x * 2
    n = layer.param_free_norm(x)
    x[:, 0] = 1
    return n * (1 + gamma) + beta + x


def a_view_written_after(layer, x, gamma, beta):
    x = x * 2
    n = layer.param_free_norm(x)
    x.view(-1).add_(1)
    return n * (1 + gamma) + beta


def gamma_written_after(layer, x, gamma, beta):
    gamma = gamma * 2
    factor = 1 + gamma
    F.relu(gamma, inplace=True)
    return layer.param_free_norm(x) * factor + beta + gamma


def product_written(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    scaled = n * gamma
    n.mul_(2)
    return scaled + beta + n


def in_place(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    n *= 1 + gamma
    n += beta
    return n


def used_twice(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    return (n * (1 + gamma) + beta) * (beta + gamma * n) + n


def product_read(layer, x, gamma, beta):
    scaled = layer.param_free_norm(x) * (gamma + 1)
    return scaled + beta + scaled.mean()


def no_sum(layer, x, gamma, beta):
    return layer.param_free_norm(x) * (1 + gamma)


def no_product(layer, x, gamma, beta):
    return torch.cat([layer.param_free_norm(x), 1 + gamma])


def without_gradients(layer, x, gamma, beta):
    with torch.no_grad():
        n = layer.param_free_norm(x)
    return n * (1 + gamma) + beta


def product_without_gradients(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    with torch.no_grad():
        scaled = n * (1 + gamma)
    return scaled + beta


def another_shape(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    return n * (1 + gamma[:, :1]) + beta.mean((2, 3), keepdim=True) * n.shape[0]


def another_dtype(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    return n.to(x.dtype) * (1 + gamma) + n.float() * gamma.float()


def normalised_twice(layer, x, gamma, beta):
    first, second = layer.param_free_norm(x), layer.param_free_norm(x * 3 + 1)
    return (second * gamma + beta) * (first * (1 + gamma) + beta)


def never_used(layer, x, gamma, beta):
    layer.param_free_norm(x)
    return gamma + beta


def statistics_read(layer, x, gamma, beta):
    n, mean = layer.param_free_norm(x), getattr(layer.param_free_norm, "running_mean", None)
    return n * (1 + gamma) + beta + (0 if mean is None else mean.view(1, -1, 1, 1))


def pieces(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    return n[:, 1:] * gamma[:, 1:] + beta[:, 1:]


@torch.no_grad()
def a_view_of_the_result_written(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    scaled, view = n * (1 + gamma), n.view(-1)
    view.add_(1)
    return scaled + beta


def memory_written(layer, x, gamma, beta):
    x = x * 2
    before, after = x.detach().numpy(), layer.param_free_norm(x)
    before[:] = 1
    n = layer.param_free_norm(x)
    x.detach().numpy()[:] = 2
    return n * (1 + gamma) + after * gamma + beta


def statistics_in_a_list(layer, x, gamma, beta):
    layer.param_free_norm(x)
    own = [one for one in layer.param_free_norm.buffers() if one.dim()]
    return torch.stack([*own, beta[0, :, 0, 0]]).sum(0)


def a_view_of_statistics(layer, x, gamma, beta):
    mean = getattr(layer.param_free_norm, "running_mean", beta[0, :, 0, 0]).view(-1)
    return layer.param_free_norm(x) * (1 + gamma) + beta + mean.view(1, -1, 1, 1)


def read_in_inference_mode(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    with torch.inference_mode():
        n.mean()
    return n * (1 + gamma) + beta


def read_under_saved_tensors_hooks(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: one * 0, lambda one: one):
        total = n + 1
    return total * (1 + gamma) + beta


def checkpointed(layer, x, gamma, beta):
    def modulated(x, gamma, beta):
        return layer.param_free_norm(x) * (1 + gamma) + beta

    return checkpoint(modulated, x, gamma, beta, use_reentrant=False)


def checkpointed_after_the_norm(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    return checkpoint(lambda n: n.sin() * (1 + gamma) + beta, n, use_reentrant=False)


def transformed(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    factor = torch.func.vmap(lambda one: 1 + one)(gamma)
    gradient = torch.func.grad(lambda x: (x * n).square().sum())(x)
    return n * factor + beta + gradient


class Does(Layer):
    """Computes the formula if it is called with x and a condition, and something else if asked."""

    def forward(self, x, segmap, something=None):
        hidden = self.mlp_shared(segmap)
        gamma, beta = self.mlp_gamma(hidden), self.mlp_beta(hidden)
        if something is None:
            return self.param_free_norm(x.sin()) * (1 + gamma) + beta
        return something(self, x, gamma, beta)


NORMS = {"batch": nn.BatchNorm2d(CHANNELS), "group": nn.GroupNorm(2, CHANNELS)}


@pytest.fixture(scope="module", params=NORMS)
def both(request):
    return own_and_converted(lambda: Does(NORMS[request.param]))


@pytest.fixture
def does(both):
    """A layer, and its converted copy."""
    return [copy.deepcopy(model) for model in both]


@pytest.mark.parametrize(
    "something",
    [
        written_after,
        a_view_written_after,
        gamma_written_after,
        product_written,
        in_place,
        used_twice,
        product_read,
        no_sum,
        no_product,
        without_gradients,
        product_without_gradients,
        another_shape,
        another_dtype,
        normalised_twice,
        never_used,
        statistics_read,
        pieces,
        a_view_of_the_result_written,
        memory_written,
        statistics_in_a_list,
        a_view_of_statistics,
        read_in_inference_mode,
        read_under_saved_tensors_hooks,
        checkpointed,
        checkpointed_after_the_norm,
        transformed,
    ],
)
def test_whatever_else_reads_or_writes(does, something):
    for train in (True, False):
        own, ours = (copy.deepcopy(model).train(train) for model in does)

        def call(module, x, segmap):
            return module(x, segmap, something)

        x, segmap = pictures()
        assert_same_calls(call, ours, own, x.clone().requires_grad_(), segmap)
        with torch.no_grad():
            assert_agree(call(ours, x, segmap), call(own, x, segmap))
            assert_agree_beside(dict(ours.named_buffers()), dict(own.named_buffers()))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def through_a_function(layer, x, gamma, beta):
    return Doubled.apply(layer.param_free_norm(x))


@torch.jit.script
def doubled(x):
    return 2 * x


def through_a_scripted_function(layer, x, gamma, beta):
    return doubled(layer.param_free_norm(x))


def written_unseen(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    with torch._C.DisableTorchFunction():
        x.add_(1)
    return n * (1 + gamma) + beta


def test_what_cannot_be_seen_is_an_error(does):
    own, ours = does
    x, segmap = pictures()
    with torch.no_grad():
        assert_agree(ours(x, segmap, through_a_function), own(x, segmap, through_a_function))
        with pytest.raises(RuntimeError, match="was changed in place, unseen"):
            ours(x.clone(), segmap, written_unseen)
    x.requires_grad_()
    for unseen in (through_a_function, through_a_scripted_function):
        # The sum has another path to x.
        total = (ours(x, segmap, unseen) + x).sum()
        with pytest.raises(RuntimeError, match="was given a step of a modulation"):
            torch.autograd.grad(total, x)


def hooked(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    y = n * (1 + gamma) + beta
    n.register_hook(lambda dy: 3 * dy)
    return y


def differentiated(layer, x, gamma, beta):
    n = layer.param_free_norm(x)
    y = n * (1 + gamma) + beta
    return torch.autograd.grad(y.sum(), n, allow_unused=True)


def test_gradients_of_steps_are_refused(does):
    _, ours = does
    x, segmap = pictures()
    x.requires_grad_()
    for asks in (hooked, differentiated):
        with pytest.raises(RuntimeError, match="the gradient of a step of a modulation"):
            ours(x, segmap, asks)

    def returned(layer, x, gamma, beta):
        n = layer.param_free_norm(x)
        return n * (1 + gamma) + beta, n

    _, n = ours(x, segmap, returned)
    with pytest.raises(RuntimeError, match="the gradient of a step of a modulation"):
        n.retain_grad()


def test_after_an_error_statistics_are_updated(does):
    def fails(layer, x, gamma, beta):
        layer.param_free_norm(x)
        raise KeyError("x")

    for model in does:
        with pytest.raises(KeyError):
            model(*pictures(), fails)
    assert_agree_beside(*(dict(model.named_buffers()) for model in does[::-1]))
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_layer_under_checkpointing(does):
    def call(module, x, segmap):
        return checkpoint(module, x, segmap, use_reentrant=False)

    x, segmap = pictures()
    own, ours = does
    assert_same_calls(call, ours, own, x.requires_grad_(), segmap)


def test_a_result_is_the_very_object(does):
    kept = {}

    def keeps(layer, x, gamma, beta):
        kept["y"] = layer.param_free_norm(x) * (1 + gamma) + beta
        return kept

    assert all(model(*pictures(), keeps) is kept for model in does)


def test_a_step_that_is_kept_does_not_keep_x(does):
    kept = []

    def keeps(layer, x, gamma, beta):
        n, scale = layer.param_free_norm(x), 1 + gamma
        kept.extend([weakref.ref(gamma), n, scale, n * scale])
        return kept[-1] + beta

    with torch.no_grad():
        for model in does:
            kept.clear()
            x, segmap = pictures()
            model(x, segmap, keeps)
            gone = weakref.ref(x)
            del x
            gc.collect()
            assert gone() is None and kept[0]() is None


def test_what_a_forward_keeps_is_computed(does, fused):
    own, ours = does
    kept = []

    def keeps(layer, x, gamma, beta):
        n = layer.param_free_norm(x)
        kept.append((n, n * gamma))
        return {"y": kept[-1][1] + beta, "n": n}

    with torch.no_grad():
        results = [model(*pictures(), keeps) for model in (ours, own)]
    assert len(fused) == 1 and type(results[0]["n"]) is torch.Tensor
    assert_agree(results[0], results[1])
    assert_agree([one + 0 for one in kept[0]], list(kept[1]))


@pytest.mark.parametrize("part", ["param_free_norm", "mlp_gamma"])
def test_hooks_see_tensors(does, part, fused):
    own, ours = does
    x, segmap = pictures()
    for model in (ours, own):
        model.get_submodule(part).register_full_backward_hook(lambda *given: None)
    assert_same_calls(lambda module, *given: module(*given), ours, own, x.requires_grad_(), segmap)
    assert not fused


def test_small_maps_are_left_to_the_own_forward(does, fused, monkeypatch):
    monkeypatch.undo()
    calls, modulate = [], fuse.spade_modulate
    monkeypatch.setattr(
        fuse, "spade_modulate", lambda *given, **named: calls.append(1) or modulate(*given, **named)
    )
    own, ours = does
    with torch.no_grad():
        for model in (own, ours):
            model.train()
        assert torch.equal(ours(*pictures()), own(*pictures()))
        assert not calls
        x, segmap = pictures()
        x, segmap = (one.tile(1, 1, 25, 25) for one in (x, segmap))
        assert_agree(ours(x, segmap), own(x, segmap), 2**10)  # sums of 37,500 elements
        is_batch = isinstance(own.param_free_norm, nn.BatchNorm2d)
        assert len(calls) == (x.numel() >= fuse.LEAST_OF_SLOW[0]) * is_batch


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: saved_and_loaded(model)])
def test_copies(copied, fused):
    own, ours = own_and_converted(FAMILIES["imaginaire, two conditions"])
    twin = copied(ours.eval())
    fused.clear()
    with torch.no_grad():
        assert torch.equal(twin(*pictures()), ours(*pictures()))
    assert len(fused) == 2 and "it is fast already" in spade_fast.convert(twin)[0].reason
    assert spade_fast.revert(twin) == 1 and type(twin) is type(own)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_recorded_calls_are_the_own_forward(does, fused):
    torch._dynamo.reset()
    own, ours = (model.eval() for model in does)
    given = pictures()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_agree(compiled(*given), own(*given))
    with torch.autocast("cpu", torch.bfloat16):
        single = copy.deepcopy(ours).float()
        found = single(*pictures(torch.float32))
        assert torch.equal(found, copy.deepcopy(own).float()(*pictures(torch.float32)))
    assert not fused
    assert_agree(ours(*given), own(*given))
    assert len(fused) == 1


def test_calls_of_fast_layers_with_more_arguments(fused):
    """Where the windows of a layer were proved for x and a condition alone."""
    torch.manual_seed(0)
    for make in (families.CLADE, lambda: families.ZeroSFT()):
        own = make().double()
        ours = copy.deepcopy(own)
        assert "windows" in spade_fast.convert(ours)[0].reason
        x, segmap = pictures()
        if make is families.CLADE:
            given, factor = (x, segmap), {"input_dist": segmap[:, :1]}
        else:
            given, factor = (segmap, x), {"h_ori": x, "control_scale": 0.5}

        def call(module, *given):
            return module(*given, **factor)

        fused.clear()
        assert_same_calls(call, ours, own, *(one.requires_grad_() for one in given))
        assert len(fused) == 1
