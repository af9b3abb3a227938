"""A watched module shows the same as in plain PyTorch, and a watcher's changes count: hooks,
checkpoints, replaced forwards, weights that are written to.
"""

import copy
import functools
import gc

import families
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from agree import NETWORK, assert_agree, assert_agree_beside
from label_maps import patches
from torch.func import functional_call
from torch.nn.modules import module as globally
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from twins import (
    assert_same,
    assert_same_calls,
    dense_map,
    label_map,
    layout_of,
    outcome,
    pictures,
)

import spade_fast
from spade_fast import SemanticLayout, reference

PARTS = [
    "",
    *("norm_0", "norm_1", "norm_s", "conv_0", "conv_1", "conv_s"),
    *("norm_0.mlp_shared", "norm_0.mlp_shared.0", "norm_0.mlp_gamma", "norm_s.param_free_norm"),
]


def our_block(norm_G="spadebatch3x3", **settings):
    arguments = (8, 6, norm_G, 5)
    ours, theirs = (
        package.SPADEResnetBlock(*arguments, nhidden=6, **settings).double()
        for package in (spade_fast, reference)
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def converted_block(layer=families.SPADES["official, batch"]):
    theirs = families.Block(layer, 6, spectral=False).double()
    ours = copy.deepcopy(theirs)
    assert spade_fast.convert(ours).converted == 4
    return ours, theirs


BLOCKS = {
    "ours": our_block,
    "spectral": lambda: our_block("spectralspadeinstance3x3"),
    "converted": converted_block,
}
CONDITIONS = {"label map": label_map, "dense": dense_map}


@pytest.fixture(params=BLOCKS)
def blocks(request):
    torch.manual_seed(0)
    return BLOCKS[request.param]()


@pytest.fixture(params=CONDITIONS)
def segmap(request):
    with spade_fast.window_mode("never" if request.param == "dense" else "always"):
        yield CONDITIONS[request.param]()


def call(module, x, segmap):
    return module(x, segmap)


def kept(values):
    """The values that a hook was given: tensors with a copy of their values, and the types of
    everything else.
    """
    return [
        (value, value.detach().clone()) if isinstance(value, torch.Tensor) else type(value)
        for value in tree_leaves(values)
        if not isinstance(value, torch.Tensor) or value.is_floating_point()
    ]


def assert_seen_alike(ours, theirs):
    """Asserts that hooks were given the same by both, and that nothing was overwritten later."""
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, our), (_, their) in zip(ours, theirs):
        assert len(our) == len(their), name
        for one, other in zip(our, their):
            if isinstance(other, type):
                assert one == other, name
            else:
                assert isinstance(one, tuple), f"{name} sees a {one}, not a tensor"
                assert_agree(one[1], other[1], largest=1.0, name=name)
                assert torch.equal(one[0], one[1]), f"{name}: written over later"


def hook_everything(module, seen, name):
    module.register_forward_pre_hook(
        lambda module, arguments, named: seen.append((f"{name}, before", kept([arguments, named]))),
        with_kwargs=True,
    )
    module.register_forward_hook(
        lambda module, arguments, named, y: seen.append(
            (f"{name}, after", kept([arguments, named, y]))
        ),
        with_kwargs=True,
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_see_the_same(blocks, segmap, part, gradients):
    found = []
    for block in blocks:
        seen = []
        hook_everything(block.get_submodule(part), seen, part)
        with torch.set_grad_enabled(gradients):
            found.append((seen, outcome(call, block, pictures().requires_grad_(), segmap)))
    assert_seen_alike(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


def changes_y(module):
    module.register_forward_hook(lambda module, arguments, y: y * 2 + 1)


def changes_y_in_place(module):
    def hook(module, arguments, y):
        y.mul_(2).add_(1)

    module.register_forward_hook(hook)


def changes_x(module):
    module.register_forward_pre_hook(
        lambda module, arguments: (arguments[0] * 2 + 1, *arguments[1:])
    )


def changes_x_with_names(module):
    def hook(module, arguments, named):
        given = [arguments[0] * arguments[0].sigmoid() if arguments else None, *arguments[1:]]
        return tuple(given[: len(arguments)]), named

    module.register_forward_pre_hook(hook, with_kwargs=True)


def changes_the_condition(module):
    module.register_forward_pre_hook(
        lambda module, arguments: (arguments[0], *(one * 2 for one in arguments[1:]))
    )


def changes_gradients(module):
    module.register_full_backward_hook(
        lambda module, dx, dy: tuple(None if one is None else one * 2 for one in dx)
    )


CHANGES = [
    changes_y,
    changes_y_in_place,
    changes_x,
    changes_x_with_names,
    changes_the_condition,
    changes_gradients,
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_by_hooks_count(blocks, segmap, part, change):
    for block in blocks:
        change(block.get_submodule(part))
    assert_same_calls(call, *blocks, pictures().requires_grad_(), segmap)
    with torch.no_grad():
        assert_same_calls(call, *blocks, pictures(), segmap)


@pytest.mark.parametrize("part", ["norm_0", "norm_s", "conv_0", "norm_0.mlp_gamma", ""])
def test_gradients_in_hooks(blocks, segmap, part):
    found = []
    for block in blocks:
        seen = []
        block.get_submodule(part).register_full_backward_hook(
            lambda module, dx, dy: seen.append((part, kept([dx, dy])))
        )
        found.append((seen, outcome(call, block, pictures().requires_grad_(), segmap)))
    assert_seen_alike(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


GLOBAL = {
    "forward": lambda hook: globally.register_module_forward_hook(
        lambda module, arguments, y: hook(module, [y])
    ),
    "before forward": lambda hook: globally.register_module_forward_pre_hook(
        lambda module, arguments: hook(module, arguments)
    ),
    "backward": lambda hook: globally.register_module_full_backward_hook(
        lambda module, dx, dy: hook(module, dy)
    ),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", GLOBAL)
def test_global_hooks_see_the_same(blocks, segmap, kind, gradients):
    found = []
    for block in blocks:
        names, seen = {module: name for name, module in block.named_modules()}, []

        def hook(module, values, names=names, seen=seen):
            if module in names:
                seen.append((names[module], kept(values)))

        handle = GLOBAL[kind](hook)
        try:
            with torch.set_grad_enabled(gradients):
                found.append((seen, outcome(call, block, pictures().requires_grad_(), segmap)))
        finally:
            handle.remove()
    for one in found:  # shortcut and residual branch may be computed in any order
        one[0].sort(key=lambda pair: pair[0])
    assert_seen_alike(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.ReLU, "norms"])
def test_changes_by_global_hooks_count(blocks, segmap, kind):
    found = []
    for block in blocks:
        norms = (block.norm_0, block.norm_1, block.norm_s)

        def hook(module, arguments, y, norms=norms):
            if module in norms if kind == "norms" else isinstance(module, kind):
                return y * 2 + 1

        handle = globally.register_module_forward_hook(hook)
        try:
            found.append(outcome(call, block, pictures().requires_grad_(), segmap))
        finally:
            handle.remove()
    assert_same(*found)


def saves_convolutions(context, operation, *arguments, **named):
    if operation in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, saves_convolutions),
    },
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("around", ["block", "part"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(blocks, segmap, kind, around, train):
    found = []
    for block in blocks:
        x = pictures().requires_grad_()
        part = block.train(train) if around == "block" else block.train(train).norm_0
        y = checkpoint(part, x, segmap, **CHECKPOINTS[kind])
        y.sin().sum().backward()
        gradients = [x.grad, *(one.grad for one in block.parameters() if one.grad is not None)]
        found.append([y, *gradients, *(one.double() for one in block.buffers())])
    assert_agree_beside(*found)


class BecomesAnother(nn.Module):
    """A norm that chooses its class in its first forward."""

    def forward(self, x):
        self.__class__ = nn.InstanceNorm2d
        nn.InstanceNorm2d.__init__(self, x.shape[1])
        return self(x)


class BecomesBatchNorm(BecomesAnother):
    def forward(self, x):
        self.__class__ = nn.BatchNorm2d
        nn.BatchNorm2d.__init__(self, x.shape[1], dtype=x.dtype)
        return self(x)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LazyInstanceNorm2d,
        lambda: nn.LazyInstanceNorm2d(affine=True),
        lambda: nn.LazyBatchNorm2d(affine=False),
        nn.LazyBatchNorm2d,
        BecomesAnother,
        BecomesBatchNorm,
    ],
)
@pytest.mark.parametrize("made", ["ours", "converted"])
@pytest.mark.parametrize("train", [True, False])
def test_a_norm_that_becomes_another_in_its_first_forward(norm, made, train, segmap):
    if made == "ours":
        ours, theirs = (package.SPADE(8, 5, 6, norm=norm()) for package in (spade_fast, reference))
    else:
        ours, theirs = (families.Layer(norm()) for _ in range(2))
    for name in ("mlp_shared", "mlp_gamma", "mlp_beta"):
        setattr(theirs, name, copy.deepcopy(getattr(ours, name)))
    ours, theirs = ours.double(), theirs.double()
    if made == "converted":
        spade_fast.convert(ours)
        assert type(ours.param_free_norm) is type(theirs.param_free_norm)
    for module in (ours, theirs):
        module.train(train)
    for _ in range(3):
        x = pictures().requires_grad_()
        results = []
        for module in (ours, theirs):
            y = module(x, segmap)
            results.append([y, *torch.autograd.grad(y.sin().sum(), x)])
        assert_agree(*results)
    assert type(ours.param_free_norm) is type(theirs.param_free_norm)


@pytest.mark.parametrize("parts", ["whole", "norms alone"])
def test_an_eval_forward_and_a_train_forward_before_the_first_ones_backward(segmap, parts):
    """The first forward's gradients are the same as without the second. (PyTorch's own batch norm
    differs: in backward it reads the running statistics, which have changed.)
    """
    torch.manual_seed(0)
    ours, theirs = our_block()  # without spectral norm, whose vectors eager overwrites, too
    alone = copy.deepcopy(theirs)
    x = pictures().requires_grad_()

    def forwards(block):
        first = block.eval()(x, segmap)
        if parts == "whole":
            block.train()
        else:
            for norm in (block.norm_0, block.norm_1, block.norm_s):
                norm.param_free_norm.train()
        return first, block(x * 2, segmap)

    def gradients(block, y):
        return torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])

    first, second = forwards(ours)
    expected_first, expected = alone.eval()(x, segmap), forwards(theirs)[1]
    found = [*gradients(ours, first), *gradients(ours, second), *ours.buffers()]
    truth = [*gradients(alone, expected_first), *gradients(theirs, expected), *theirs.buffers()]
    assert_agree_beside(found, truth)


@pytest.mark.parametrize("part", [part for part in PARTS if part])
def test_a_forward_that_was_replaced(blocks, segmap, part):
    """As in libraries that move weights to a device only while they are used."""
    calls = []
    for block in blocks:
        module = block.get_submodule(part)
        own = module.forward

        def wrapped(*arguments, own=own, **named):
            calls.append(part)
            y = own(*arguments, **named)
            return y * 2 + 1

        module.forward = wrapped
    assert_same_calls(call, *blocks, pictures().requires_grad_(), segmap)
    assert len(calls) == 2


@pytest.mark.parametrize("part", ["mlp_shared.0", "mlp_gamma", "mlp_beta", "param_free_norm"])
def test_weights_that_exist_only_while_their_module_is_called(part, segmap):
    """Offloaded: on the meta device except during the module's own forward."""
    ours, theirs = (
        package.SPADE(8, 5, 6, affine=True).double() for package in (spade_fast, reference)
    )
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        module = layer.get_submodule(part)
        own, kept_weights = module.forward, dict(module.named_parameters())

        def wrapped(x, module=module, own=own, weights=kept_weights):
            return with_weights(module, own, weights, x)

        for name, one in kept_weights.items():
            setattr(module, name, nn.Parameter(one.to("meta")))
        module.forward = wrapped
    y, expected = ours(pictures(), segmap), theirs(pictures(), segmap)
    assert_agree(y, expected)


@pytest.mark.parametrize("given", ["layout", "label map"])
def test_an_offloaded_generator(given):
    """Its weights are in memory only while their layers are called, and on the meta device
    otherwise.
    """
    accelerate = pytest.importorskip("accelerate")
    arguments = (5, 3, 1), {"stages": [("up_0", 8, 2)], "start": (6, 5), "nhidden": 4}
    ours, own = (spade_fast.SPADEGenerator(*arguments[0], **arguments[1]) for _ in range(2))
    own.load_state_dict(ours.state_dict())
    accelerate.cpu_offload(ours, execution_device="cpu")
    layout, z = layout_of(), torch.randn(2, 3)
    segmap = layout if given == "layout" else layout.to_segmap()
    with torch.no_grad():
        expected = own(layout.to_segmap(), z)
        assert_agree(ours(segmap, z), expected, NETWORK)
        with spade_fast.frozen(ours):
            assert_agree(ours(segmap, z), expected, NETWORK)
        torch.manual_seed(0)
        drawn = ours(segmap)
        torch.manual_seed(0)
        assert_agree(drawn, ours(segmap, torch.randn(2, 3)))
    with pytest.raises(ValueError, match="z is on meta; it should be on the weights' device, cpu"):
        own(segmap, z.to("meta"))


def with_weights(module, forward, weights, x):
    away = {name: getattr(module, name) for name in weights}
    for name, one in weights.items():
        setattr(module, name, one)
    try:
        return forward(x)
    finally:
        for name, one in away.items():
            setattr(module, name, one)


def generators(norm_G="spectralspadebatch3x3", last_scale=1, **settings):
    """A small generator, and another with the same weights that is never folded."""
    torch.manual_seed(0)
    stages = [("up_0", 8, 1), ("up_1", 4, 2)]

    def make():
        return spade_fast.SPADEGenerator(
            5, None, 1, stages=stages, start=(6, 5), norm_G=norm_G, nhidden=4, last_scale=last_scale
        )

    ours, theirs = make().double(), make().double()
    with torch.no_grad():
        for _ in range(3):
            ours(label_map())
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def others(generator, seed=1):
    torch.manual_seed(seed)
    return {
        name: one + 0.3 * torch.randn_like(one) if name.endswith("weight_orig") else one.clone()
        for name, one in generator.state_dict().items()
    }


def ema_lerp(generator):
    with torch.no_grad():
        for name, one in generator.named_parameters():
            one.lerp_(others(generator)[name], 0.5)


def ema_copy(generator):
    with torch.no_grad():
        for name, one in generator.named_parameters():
            one.copy_(others(generator)[name])


def ema_data(generator):
    for name, one in generator.named_parameters():
        one.data = others(generator)[name]


def fused_lerp(generator):
    new = others(generator)
    with torch.no_grad():
        torch._foreach_lerp_(
            list(generator.parameters()),
            [new[name] for name, _ in generator.named_parameters()],
            0.5,
        )


def optimizer_step(generator):
    optimizer = torch.optim.SGD(generator.parameters(), 0.1)
    torch.manual_seed(2)
    for one in generator.parameters():
        one.grad = torch.randn_like(one)
    optimizer.step()


def load_a_part(generator):
    new = others(generator)
    prefix = "up_0."
    generator.up_0.load_state_dict(
        {name[len(prefix) :]: one for name, one in new.items() if name.startswith(prefix)}
    )


def load_a_convolution(generator):
    prefix = "up_1.conv_0."
    generator.up_1.conv_0.load_state_dict(
        {name[len(prefix) :]: one for name, one in others(generator).items() if prefix in name}
    )


def load_everything(generator):
    generator.load_state_dict(others(generator))


def load_by_assignment(generator):
    generator.load_state_dict(others(generator), assign=True)


def other_vectors(generator):
    with torch.no_grad():
        generator.up_0.conv_0.weight_u.copy_(F.normalize(torch.ones(8).double(), dim=0))


def half_and_back(generator):
    generator.float().double()


def exchange_a_parameter(generator):
    convolution = generator.up_0.conv_0
    convolution.weight_orig = nn.Parameter(others(generator)["up_0.conv_0.weight_orig"])


WRITES = [
    ema_lerp,
    ema_copy,
    ema_data,
    fused_lerp,
    optimizer_step,
    load_a_part,
    load_a_convolution,
    load_everything,
    load_by_assignment,
    other_vectors,
    half_and_back,
    exchange_a_parameter,
]


@pytest.mark.parametrize("write", WRITES)
def test_weights_written_into_a_folded_generator(write):
    ours, theirs = generators()
    ours.fold_spectral_norm()
    segmap = label_map()
    for _ in range(2):
        with torch.no_grad():
            assert_agree(ours(segmap), theirs(segmap), NETWORK)
        for generator in (ours, theirs):
            write(generator)
    with torch.no_grad():
        assert_agree(ours(segmap), theirs(segmap), NETWORK)
    with torch.no_grad(), spade_fast.frozen(ours):
        assert_agree(ours(segmap), theirs(segmap), NETWORK)


def test_a_folded_generator_with_other_weights_for_one_call():
    ours, theirs = generators()
    new = others(ours)
    ours.fold_spectral_norm()
    segmap = label_map()
    with torch.no_grad():
        for weights in ({}, new, {}):
            assert_agree(
                functional_call(ours, weights, (segmap,)),
                functional_call(theirs, {**theirs.state_dict(), **weights}, (segmap,)),
            )


def test_parts_of_a_folded_generator():
    """Train mode, and a copy, of a single part."""
    ours, theirs = generators()
    ours.fold_spectral_norm()
    x, segmap = pictures(channels=16), label_map()
    copied = copy.deepcopy(ours)
    ema_copy(copied), ema_copy(theirs)
    with torch.no_grad():
        assert_agree(copied(segmap), theirs(segmap))
    ours, theirs = generators()
    ours.fold_spectral_norm()
    for generator in (ours, theirs):
        generator.up_0.train()
    for _ in range(2):
        assert_same_calls(call, ours.up_0, theirs.up_0, x.requires_grad_(), segmap)


@pytest.mark.parametrize("way", ["averaged model", "data parallel", "sequential"])
def test_a_folded_generator_inside_another_module(way):
    ours, theirs = generators()
    wrap = {
        "averaged model": lambda one: torch.optim.swa_utils.AveragedModel(
            one, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        ),
        "data parallel": nn.DataParallel,
        "sequential": nn.Sequential,
    }[way]
    wrapped = wrap(ours).eval()
    inside = wrapped[0] if way == "sequential" else wrapped.module
    inside.fold_spectral_norm()
    segmap = label_map()
    with torch.no_grad():
        assert_agree(wrapped(segmap), theirs(segmap))
        if way == "averaged model":
            plain = wrap(theirs)
            moved = copy.deepcopy(theirs)
            ema_copy(moved)
            for averaged in (wrapped, plain):
                averaged.update_parameters(theirs), averaged.update_parameters(moved)
            assert_agree(wrapped.eval()(segmap), plain.eval()(segmap))
            for averaged in (wrapped, plain):
                torch.optim.swa_utils.update_bn([segmap], averaged)
            assert_agree(wrapped.eval()(segmap), plain.eval()(segmap))


FIRST = {
    "as it is": lambda conv: conv,
    "spectral norm": nn.utils.spectral_norm,
    "parametrized": nn.utils.parametrizations.spectral_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "a hook": lambda conv: changes_y(conv) or conv,
    "a hook before": lambda conv: changes_x(conv) or conv,
    "a hook on gradients": lambda conv: changes_gradients(conv) or conv,
    "reflection": lambda conv: nn.Conv2d(8, 3, 4, 2, 2, padding_mode="reflect").double(),
    "kernel (4, 3)": lambda conv: nn.Conv2d(8, 3, (4, 3), 2, 2).double(),
    "stride (2, 1)": lambda conv: nn.Conv2d(8, 3, 4, (2, 1), 2).double(),
    "padding (2, 1)": lambda conv: nn.Conv2d(8, 3, 4, 2, (2, 1)).double(),
    "padding valid": lambda conv: nn.Conv2d(8, 3, 4, 1, "valid").double(),
    "groups": lambda conv: nn.Conv2d(8, 4, 4, 2, 2, groups=2).double(),
    "dilation": lambda conv: nn.Conv2d(8, 3, 3, 2, 2, dilation=2).double(),
    "kernel 9": lambda conv: nn.Conv2d(8, 3, 9, 2, 4).double(),
    "no bias": lambda conv: nn.Conv2d(8, 3, 4, 2, 2, bias=False).double(),
    "forward replaced": lambda conv: (
        setattr(conv, "forward", lambda x, own=conv.forward: own(x) * 2) or conv
    ),
    "a sequence": lambda conv: nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)).double(),
}


@pytest.mark.parametrize("condition", ["layout", "label map", "together"])
@pytest.mark.parametrize("first", FIRST)
def test_the_discriminators_first_convolution(first, condition):
    image, segmap = pictures(2, 3, (16, 14)).requires_grad_(), label_map(size=(16, 14))

    def made():
        torch.manual_seed(0)
        discriminator = spade_fast.MultiscaleDiscriminator(8, 1, 3).double()
        layer = discriminator.discriminator_0.model0
        layer[0] = FIRST[first](layer[0])
        if getattr(layer[0], "out_channels", 3) != 3:
            layer.append(nn.Conv2d(layer[0].out_channels, 3, 1).double())
        return discriminator

    ours, own = made(), made()

    def plainly(discriminator, image):
        """Calls each part of the discriminator itself."""
        together = torch.cat([segmap, image], dim=1)
        results = [discriminator.discriminator_0.model0(together)]
        for number in range(1, 5):
            results.append(getattr(discriminator.discriminator_0, f"model{number}")(results[-1]))
        return results

    layout = SemanticLayout.from_segmap(segmap)
    given = {
        "layout": lambda module, image: module(image, layout),
        "label map": lambda module, image: module(image, segmap),
        "together": lambda module, image: module(torch.cat([segmap, image], dim=1)),
    }[condition]
    assert_same(outcome(given, ours, image), outcome(plainly, own, image))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Tanh(), nn.Identity(), nn.PReLU(), nn.SiLU()]
)
@pytest.mark.parametrize("watched", [False, True])
def test_the_discriminators_first_activation(activation, watched):
    torch.manual_seed(0)
    ours = spade_fast.MultiscaleDiscriminator(8, 1, 3).double()
    ours.discriminator_0.model0[1] = copy.deepcopy(activation).double()
    if watched:
        changes_y(ours.discriminator_0.model0[1])
    image, segmap = pictures(2, 3, (16, 14)).requires_grad_(), label_map(size=(16, 14))
    layout = SemanticLayout.from_segmap(segmap)
    expected = outcome(
        lambda module, image: module(torch.cat([segmap, image], 1)), copy.deepcopy(ours), image
    )
    assert_same(outcome(lambda module, image: module(image, layout), ours, image), expected)


@pytest.mark.parametrize(
    "part", ["discriminator_0", "discriminator_0.model0", "discriminator_1.model0.0"]
)
def test_hooks_in_a_discriminator_of_a_layout(part):
    found = []
    image, segmap = pictures(2, 3, (16, 14)), label_map(size=(16, 14))
    for condition in (SemanticLayout.from_segmap(segmap), None):
        torch.manual_seed(0)
        discriminator = spade_fast.MultiscaleDiscriminator(8, 2, 3).double()
        changes_y(discriminator.get_submodule(part)) if part != "discriminator_0" else None
        calls = []
        discriminator.get_submodule(part).register_forward_hook(
            lambda *arguments: calls.append(part)
        )
        given = (torch.cat([segmap, image], 1),) if condition is None else (image, condition)
        found.append((tree_leaves(discriminator(*given)), calls))
    assert found[0][1] == found[1][1] == [part]
    assert_agree(found[0][0], found[1][0])


LAST = {
    "a hook": changes_y,
    "a hook before": changes_x,
    "gradients": changes_gradients,
    "reflection": lambda conv: (
        setattr(conv, "padding_mode", "reflect")
        or setattr(conv, "_reversed_padding_repeated_twice", [1, 1, 1, 1])
    ),
    "spectral norm": nn.utils.spectral_norm,
    "parametrized": nn.utils.parametrizations.weight_norm,
    "forward replaced": lambda conv: setattr(
        conv, "forward", lambda x, own=conv.forward: own(x) * 2
    ),
    "dilation": lambda conv: (setattr(conv, "dilation", (2, 2)), setattr(conv, "padding", (2, 2))),
}


@pytest.mark.parametrize("last_scale", [1, 2, 3])
@pytest.mark.parametrize("last", LAST)
def test_the_generators_last_convolution(last, last_scale):
    generator, twin = generators("spadeinstance3x3", last_scale)
    for one in (generator, twin):
        torch.manual_seed(3)
        LAST[last](one.conv_img)

    def plainly(generator, segmap):
        x = generator.fc(F.interpolate(segmap, size=(6, 5)))
        x = generator.up_0(x, segmap)
        x = generator.up_1(x.repeat_interleave(2, 2).repeat_interleave(2, 3), segmap)
        x = F.leaky_relu(x, 0.2)
        x = x.repeat_interleave(last_scale, 2).repeat_interleave(last_scale, 3)
        return torch.tanh(generator.conv_img(x))

    assert_same(
        outcome(lambda module, segmap: module(segmap), generator, label_map()),
        outcome(plainly, twin, label_map()),
    )


@pytest.mark.parametrize("change", [changes_y, changes_y_in_place, changes_x, changes_gradients])
@pytest.mark.parametrize("part", ["layer1", "layer1.0", "layer2.1"])
def test_hooks_in_the_encoder(part, change):
    torch.manual_seed(0)
    ours, theirs = spade_fast.ConvEncoder(2, 3).double(), reference.ConvEncoder(2, 3).double()
    theirs.load_state_dict(ours.state_dict())
    if part == "layer1" and change is not changes_x:
        return  # here, the result is after the activation
    for encoder in (ours, theirs):
        change(encoder.get_submodule(part))
    image = pictures(2, 3, (8, 8)).requires_grad_()
    assert_same_calls(lambda module, image: module(image), ours, theirs, image)


def test_tensors_captured_by_an_encoders_hook_are_not_overwritten():
    encoder, seen = spade_fast.ConvEncoder(2, 3).double(), []
    for part in ("layer1.0", "layer1.1", "layer2.1", "layer6"):
        encoder.get_submodule(part).register_forward_hook(
            lambda module, arguments, y: seen.append((y, y.detach().clone()))
        )
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            encoder(pictures(2, 3, (8, 8)))
    assert len(seen) == 8 and all(torch.equal(*pair) for pair in seen)


def test_tensors_captured_by_a_global_hook_are_not_overwritten():
    generator, _ = generators()
    discriminator = spade_fast.MultiscaleDiscriminator(8, 1, 3).double()
    seen = []
    handle = globally.register_module_forward_hook(
        lambda module, arguments, y: seen.extend(
            (one, one.detach().clone()) for one in tree_leaves(y) if isinstance(one, torch.Tensor)
        )
    )
    try:
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), spade_fast.window_mode("always"):
                generator(label_map())
                discriminator(pictures(2, 3, (16, 14)), layout_of(size=(16, 14)))
                discriminator(pictures(2, 8, (16, 14)))
    finally:
        handle.remove()
    assert len(seen) > 40 and all(torch.equal(*pair) for pair in seen)


def test_returned_tensors_are_not_overwritten():
    """Not by a later call, whatever its caller."""
    for norm_G in ("spadeinstance3x3", "spectralspadebatch3x3"):
        block, _ = our_block(norm_G)
        block.eval()
        layout = SemanticLayout.from_labels(patches((2, 12, 10), 5), 5)
        with torch.no_grad(), spade_fast.window_mode("always"), spade_fast.frozen(block):
            first = block(pictures(), layout)
            kept_value = first.clone()
            for seed in range(3):
                block(pictures(seed=seed + 5), layout)
            gc.collect()
            assert torch.equal(first, kept_value)
