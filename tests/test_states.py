"""A proof about a module in one state does not count for another: mode, autocast, attributes,
initial zeros, sizes.
"""

import argparse
import collections
import copy
import dataclasses
import functools
import gc
import queue
import random
import threading
import weakref

import families
import numpy as np
import pytest
import torch
import torch.nn as nn
from agree import assert_agree
from twins import assert_same_calls, dense_map, label_map, pictures

import spade_fast
from spade_fast.convert.swap import Fast, FastSPADE, views_of_marks
from spade_fast.nn.unchanged import NAME


def both(make, train=True, probe=True):
    """A model that was converted in this mode, and its plain twin."""
    torch.manual_seed(0)
    own = make().double().train(train)
    model = copy.deepcopy(own)
    spade_fast.convert(model, probe=probe)
    return model, own


def call(module, x, segmap):
    return module(x, segmap)


def assert_same_forwards(model, own):
    """With a dense condition and a label map, at pixels and at windows."""
    for segmap in (dense_map(), label_map()):
        for mode in ("auto", "always", "never"):
            with spade_fast.window_mode(mode):
                x = pictures().requires_grad_()
                assert_same_calls(call, model, own, x, segmap)


ASKERS = {
    "dropout": families.Dropout,
    "noise": families.NoiseInTraining,
    "only in eval": families.OnlyInEval,
    "dropout in a block": lambda: families.DropoutBlock(families.Layer),
    "dropout in a block's layers": lambda: families.Block(families.Dropout, fout=4),
}


def by_attribute(model, train):
    for module in model.modules():
        module.training = train


@pytest.mark.parametrize("set_mode", [nn.Module.train, by_attribute])
@pytest.mark.parametrize("converted_in", [True, False])
@pytest.mark.parametrize("layer", ASKERS)
def test_both_modes(layer, converted_in, set_mode):
    model, own = both(ASKERS[layer], converted_in)
    for train in (converted_in, not converted_in, converted_in, not converted_in):
        for module in (model, own):
            set_mode(module, train)
        assert_same_forwards(model, own)


def test_a_part_whose_mode_differs():
    """As when batch norms are held in eval mode while the rest trains."""
    model, own = both(lambda: families.Layer(nn.BatchNorm2d(8, affine=False)))
    for module in (model, own):
        module.param_free_norm.eval()
    assert_same_forwards(model, own)
    model, own = both(families.Dropout, False)
    for module in (model, own):
        module.train().mlp_shared.eval()
    assert_same_forwards(model, own)


def set_strength(module):
    module.strength = 1.0


def set_share(module):
    module.share.fill_(1.0)


def exchange_share(module):
    module.share = torch.ones((), dtype=torch.float64)


def set_option(module):
    module.opt.strength = 1.0


@pytest.mark.parametrize("change", [set_strength, set_share, exchange_share, set_option])
def test_a_setting_that_changes_later(change):
    model, own = both(families.Strength)
    assert_same_forwards(model, own)
    for module in (model, own):
        change(module)
    assert_same_forwards(model, own)


def test_a_method_that_is_exchanged_later():
    """A block's own activation, as a method."""
    model, own = both(lambda: families.Block(families.Layer))
    for module in (model, own):
        module.actvn = torch.tanh
    assert_same_forwards(model, own)


def test_a_hidden_activation_that_is_exchanged_later():
    model, own = both(families.Layer)
    for module in (model, own):
        module.mlp_shared[1] = nn.Tanh()
    assert_same_forwards(model, own)


@pytest.mark.parametrize("part", ["param_free_norm", "mlp_shared", "mlp_gamma", "mlp_beta"])
def test_a_part_that_is_exchanged(part):
    model, own = both(lambda: families.Layer(nn.BatchNorm2d(8)))
    for module in (model, own):
        setattr(module, part, nn.Identity())
    assert_same_forwards(model, own)


@pytest.mark.parametrize("converted_inside", [True, False])
def test_autocast(converted_inside):
    with torch.autocast("cpu", torch.bfloat16, enabled=converted_inside):
        model, own = both(families.AsksAutocast)
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_same_forwards(model, own)


@pytest.mark.parametrize("gradients", [True, False])
def test_with_and_without_gradients(gradients):
    with torch.set_grad_enabled(gradients):
        model, own = both(families.AsksForGradients)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert_same_forwards(model, own)


def zero_gamma_and_beta(module):
    for part in (module.mlp_gamma, module.mlp_beta):
        nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)


def zero_shared(module):
    nn.init.zeros_(module.mlp_shared[0].weight), nn.init.zeros_(module.mlp_shared[0].bias)


def zero_everything(module):
    zero_gamma_and_beta(module), zero_shared(module)


def dead_relu(module):
    """Every hidden unit is below zero, whatever the condition."""
    nn.init.constant_(module.mlp_shared[0].bias, -100.0)


ZEROS = [zero_gamma_and_beta, zero_shared, zero_everything, dead_relu]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("layer", [families.Bilinear, families.BilinearWhereSmaller])
def test_initial_zeros_in_weights(layer, zero, frozen):
    """They hide what the forward computes from its condition."""

    def made():
        module = layer()
        with torch.no_grad():
            zero(module)
        return module.requires_grad_(not frozen)

    model, own = both(made)
    for module in (model, own):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
    assert_same_forwards(model, own)


@pytest.mark.parametrize("layer", ["bilinear", "PSFRGAN"])
def test_initial_zeros_where_the_modulation_alone_is_fused(layer):
    def made():
        module = families.FUSED[layer]()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "norm" not in name:
                    parameter.zero_()
        return module

    model, own = both(made)
    for module in (model, own):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
    assert_same_forwards(model, own)


def test_a_block_of_zeros():
    """conv_1 is initially zero, as in diffusion models, and hides the activation before it."""

    def made():
        module = families.OtherBlock(families.Layer, spectral=False)
        with torch.no_grad():
            for part in (module.conv_0, module.conv_1):
                part.weight.zero_(), part.bias.zero_()
        return module.requires_grad_(False)

    model, own = both(made)
    for module in (model, own):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
    assert_same_forwards(model, own)


def test_a_scale_of_noise_that_is_initially_zero():
    model, own = both(families.VITONHD)
    assert_same_forwards(model, own)
    for module in (model, own):
        with torch.no_grad():
            module.noise_scale.fill_(0.5)
    assert_same_forwards(model, own)


SIZES = [(3, 5), (2, 5), (3, 2), (4, 4), (6, 5), (1, 1), (6, 10), (12, 5), (12, 10), (24, 20)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "layer", [families.BilinearWhereSmaller, families.NowcastNet, families.Bilinear]
)
def test_conditions_of_other_sizes_than_in_the_proof(layer, size):
    model, own = both(layer)
    for x_size in ((6, 5), (12, 10)):
        for segmap in (dense_map(size=size), label_map(size=size)):
            for mode in ("auto", "always"):
                with spade_fast.window_mode(mode):
                    x = pictures(size=x_size).requires_grad_()
                    assert_same_calls(call, model, own, x, segmap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_that_changes_later(dtype):
    """For a norm, and for a whole layer, that compute in float32 whatever x's dtype."""

    class InFloat32(families.Layer):
        def forward(self, x, segmap):
            if x.dtype == torch.float64:
                return super().forward(x, segmap)
            return super().forward(x, segmap) * 2

    model, own = both(InFloat32)
    for module in (model, own):
        module.to(dtype)
    x, segmap = pictures().to(dtype), label_map().to(dtype)
    assert_same_calls(call, model, own, x, segmap)


class Reads(families.Layer):
    """Scales γ by a strength that may change later."""

    def strength(self):
        return 1.0

    def forward(self, x, segmap):
        hidden = self.mlp_shared(families.to_size(segmap, x))
        gamma = self.strength() * self.mlp_gamma(hidden)
        return self.param_free_norm(x) * (1 + gamma) + self.mlp_beta(hidden)


def reads(what, prepare, change):
    """A function that makes a module whose strength is read in this way, and a function that
    changes the strength.
    """

    def make():
        kind = type("Reads", (Reads,), {"strength": what, "of_the_class": 1.0})
        module = kind()
        prepare(module)
        return module

    return make, change


def nothing(module):
    pass


READERS = {
    "a private attribute": reads(
        lambda self: self._strength,
        lambda module: setattr(module, "_strength", 1.0),
        lambda module: setattr(module, "_strength", 0.0),
    ),
    "options": reads(
        lambda self: self.opt.strength,
        lambda module: setattr(module, "opt", argparse.Namespace(strength=1.0)),
        lambda module: setattr(module.opt, "strength", 0.0),
    ),
    "a dictionary": reads(
        lambda self: self.settings["strength"],
        lambda module: setattr(module, "settings", {"strength": 1.0}),
        lambda module: module.settings.update(strength=0.0),
    ),
    "a buffer of whole numbers": reads(
        lambda self: float(self.step > 10),
        lambda module: module.register_buffer("step", torch.tensor(100)),
        lambda module: module.step.fill_(1),
    ),
    "the class": reads(
        lambda self: self.of_the_class,
        nothing,
        lambda module: setattr(getattr(module, "own_class", type(module)), "of_the_class", 0.0),
    ),
    "a method": reads(
        lambda self: 1.0,
        nothing,
        lambda module: setattr(
            getattr(module, "own_class", type(module)), "strength", lambda self: 0.0
        ),
    ),
    "a part": reads(
        lambda self: self.mlp_gamma.gain,
        lambda module: setattr(module.mlp_gamma, "gain", 1.0),
        lambda module: setattr(module.mlp_gamma, "gain", 0.0),
    ),
    "a part of a part": reads(
        lambda self: self.mlp_shared[0].gain,
        lambda module: setattr(module.mlp_shared[0], "gain", 1.0),
        lambda module: setattr(module.mlp_shared[0], "gain", 0.0),
    ),
    "the mode of a part of a part": reads(
        lambda self: float(self.mlp_shared[0].training),
        lambda module: module.train(),
        lambda module: module.mlp_shared[0].eval(),
    ),
    "a part's mode": reads(
        lambda self: float(self.mlp_gamma.training),
        nothing,
        lambda module: module.mlp_gamma.eval(),
    ),
}


@pytest.mark.parametrize("what", READERS)
def test_anything_that_a_forward_reads_may_change(what):
    make, change = READERS[what]
    model, own = both(make)
    for module in (model, own):
        change(module)
    assert_same_forwards(model, own)


def is_known_unchanged(module):
    """Whether the next call compares objects alone, and no marks."""
    found = vars(module)[NAME]
    is_own = found.owner is not None and found.owner() is module
    return is_own and found.kept[views_of_marks][0].holds(module)


SEEN = {
    "a list in a tuple in a dictionary": reads(
        lambda self: self.settings["of"][0][-1],
        lambda module: setattr(module, "settings", {"of": ([1.0],)}),
        lambda module: module.settings["of"][0].append(0.0),
    ),
    "a dictionary's order": reads(
        lambda self: float(next(iter(self.settings)) == "first"),
        lambda module: setattr(module, "settings", {"first": 0, "second": 0}),
        lambda module: module.settings.update(first=module.settings.pop("first")),
    ),
    "a list in itself": reads(
        lambda self: self.settings[1][1][0],
        lambda module: (
            setattr(module, "settings", [1.0]),
            module.settings.append(module.settings),
        ),
        lambda module: module.settings.__setitem__(0, 0.0),
    ),
    "a tensor": reads(
        lambda self: self.gain,
        lambda module: setattr(module, "gain", torch.ones((), dtype=torch.float64)),
        lambda module: module.gain.zero_(),
    ),
    "a number's type": reads(
        lambda self: float(type(self.gain) is float),
        lambda module: setattr(module, "gain", 1.0),
        lambda module: setattr(module, "gain", 1),
    ),
    "an attribute that was not there": reads(
        lambda self: float(not hasattr(self, "gain")),
        nothing,
        lambda module: setattr(module, "gain", None),
    ),
    "an attribute that has gone": reads(
        lambda self: float(hasattr(self, "gain")),
        lambda module: setattr(module, "gain", None),
        lambda module: delattr(module, "gain"),
    ),
    "a buffer that is exchanged": reads(
        lambda self: float(self.step),
        lambda module: module.register_buffer("step", torch.tensor(1)),
        lambda module: setattr(module, "step", torch.tensor(0)),
    ),
    "a list of the class": reads(
        lambda self: self.of_all[0],
        lambda module: setattr(type(module), "of_all", [1.0]),
        lambda module: module.of_all.__setitem__(0, 0.0),
    ),
}


class Options:
    def __init__(self, strength=1.0):
        self.strength = strength

    def read(self):
        return self.strength


class Slotted:
    __slots__ = ("strength", "unset")

    def __init__(self):
        self.strength = 1.0


@dataclasses.dataclass
class Configuration:
    strength: float = 1.0


class Named(dict):
    """Its keys are attributes as well."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class Described(list):
    """It has attributes, and hides what it contains."""

    def __iter__(self):
        return iter(())

    def __deepcopy__(self, memo):
        return described(*list.__iter__(self))


class Pair(collections.namedtuple("Pair", "first second")):
    pass


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.options, self.scale = Options(), nn.Parameter(torch.ones(()))


def with_itself(options):
    options.itself = [options]
    return options


def described(*contents):
    made = Described(contents)
    made.strength = 1.0
    return made


def set_strength_of(held):
    held.strength = 0.0


def first(held):
    return float(held[0])


def set_first(held):
    held[0] = 0


# What an attribute holds, how its strength is read, and how that is changed.
OBJECTS = {
    "an object": (Options, lambda held: held.strength, set_strength_of),
    "an object in an object": (
        lambda: Options(Options()),
        lambda held: held.strength.strength,
        lambda held: set_strength_of(held.strength),
    ),
    "an object in a list": (
        lambda: [Options()],
        lambda held: held[0].strength,
        lambda held: set_strength_of(held[0]),
    ),
    "an object in itself": (
        lambda: with_itself(Options()),
        lambda held: held.itself[0].strength,
        set_strength_of,
    ),
    "an attribute of an object that was not there": (
        Options,
        lambda held: float(not hasattr(held, "off")),
        lambda held: setattr(held, "off", True),
    ),
    "an object's class": (
        Options,
        lambda held: float(type(held) is Options),
        lambda held: setattr(held, "__class__", type("Others", (Options,), {})),
    ),
    "slots": (Slotted, lambda held: held.strength, set_strength_of),
    "a slot that was not set": (
        Slotted,
        lambda held: float(not hasattr(held, "unset")),
        lambda held: setattr(held, "unset", None),
    ),
    "a dataclass": (Configuration, lambda held: held.strength, set_strength_of),
    "a class of dictionaries": (
        lambda: Named(strength=1.0),
        lambda held: held.strength,
        set_strength_of,
    ),
    "an ordered dictionary": (
        lambda: collections.OrderedDict(strength=1.0),
        lambda held: held["strength"],
        lambda held: held.update(strength=0.0),
    ),
    "an ordered dictionary's order": (
        lambda: collections.OrderedDict(first=1.0, second=0.0),
        lambda held: next(iter(held.values())),
        lambda held: held.move_to_end("first"),
    ),
    "a dictionary's default": (
        lambda: collections.defaultdict(int),
        lambda held: float(held.default_factory is int),
        lambda held: setattr(held, "default_factory", float),
    ),
    "a set": (lambda: {"on"}, lambda held: float("on" in held), lambda held: held.clear()),
    "a deque": (lambda: collections.deque([1.0]), first, set_first),
    "a class of lists": (lambda: described(1.0), first, set_first),
    "an attribute of a list": (described, lambda held: held.strength, set_strength_of),
    "a list in a named tuple": (
        lambda: Pair([1.0], 0.0),
        lambda held: held.first[0],
        lambda held: set_first(held.first),
    ),
    "an array": (lambda: np.ones(1), first, set_first),
    "an array's shape": (
        lambda: np.ones((1, 2)),
        lambda held: float(held.shape[0] == 1),
        lambda held: setattr(held, "shape", (2, 1)),
    ),
    "bytes": (lambda: bytearray(b"\1"), first, set_first),
    "a method's object": (
        lambda: Options().read,
        lambda held: held(),
        lambda held: set_strength_of(held.__self__),
    ),
    "a builtin method's object": (
        lambda: [1.0].count,
        lambda held: float(held(1.0)),
        lambda held: held.__self__.clear(),
    ),
    "a partial function's arguments": (
        lambda: functools.partial(getattr, Options(), "strength"),
        lambda held: held(),
        lambda held: set_strength_of(held.args[0]),
    ),
    "another module": (
        lambda: (Parent(),),
        lambda held: held[0].options.strength,
        lambda held: set_strength_of(held[0].options),
    ),
    "another module's mode": (
        lambda: (Parent(),),
        lambda held: float(held[0].training),
        lambda held: held[0].eval(),
    ),
    "another module's parameter": (
        lambda: (Parent().requires_grad_(False),),
        lambda held: held[0].scale,
        lambda held: held[0].scale.zero_(),
    ),
}


def held_by(name):
    make, read, change = OBJECTS[name]
    return reads(
        lambda self: read(self.held),
        lambda module: setattr(module, "held", make()),
        lambda module: change(module.held),
    )


SEEN |= {name: held_by(name) for name in OBJECTS}


@pytest.mark.parametrize("what", OBJECTS)
def test_objects_that_stay_as_they_are_leave_a_layer_fast(what, monkeypatch):
    make, change = SEEN[what]
    model, own = both(make)
    twin, fast, compute = copy.deepcopy(model), [], FastSPADE._fast
    monkeypatch.setattr(FastSPADE, "_fast", lambda *given: fast.append(1) or compute(*given))
    for module in (model, model, twin):
        assert_same_calls(call, module, own, pictures(), label_map())
    assert len(fast) == 3 and is_known_unchanged(model) and is_known_unchanged(twin)
    for module in (model, twin, own):
        change(module)
    for module in (model, twin):
        assert_same_calls(call, module, own, pictures(), label_map())
    assert len(fast) == 3


class Synchronised(nn.BatchNorm2d):
    """As its published twin holds what gathers statistics: an object that calls it, with a lock."""

    def __init__(self, channels):
        super().__init__(channels, affine=False)
        self.master = Options(self.gather)
        self.master.queue, self.master.lock = queue.Queue(), threading.Lock()

    def gather(self, statistics):
        return statistics


def test_objects_that_refer_to_their_layer_leave_it_fast():
    layer = families.Layer(Synchronised(8)).double()
    layer.held = {"layer": layer, "shared": layer.mlp_shared[0], "activation": layer.forward}
    assert spade_fast.convert(layer)[0].converted
    for _ in range(2):
        layer(pictures(), label_map()).sum().backward()
        torch.optim.SGD(layer.parameters(), 0.01).step()
        assert layer._is_proved(pictures(), label_map()) and is_known_unchanged(layer)


@pytest.mark.parametrize(
    "value,kind",
    [
        (random.Random(0), "Random"),
        (torch.Generator(), "Generator"),
        (iter([1]), "list_iterator"),
        (np.array([[]], dtype=object), "an array of objects"),
        (np.array("2000-01-01", dtype="datetime64"), "an array of other than numbers"),
    ],
)
def test_attributes_that_cannot_be_watched(value, kind):
    for held in (value, Options([value])):
        layer = families.Layer()
        layer.held = held
        (entry,) = spade_fast.convert(layer)
        assert not entry.converted
        assert entry.reason == f"attributes hold what cannot be watched ({kind}): held"


@pytest.mark.parametrize("what", SEEN)
def test_changes_between_calls(what):
    """Without a probe; the first call is before the change."""
    make, change = SEEN[what]
    model, own = both(make, probe=False)
    x, segmap = pictures(), dense_map()
    with torch.no_grad():
        before = model(x, segmap)
        assert is_known_unchanged(model)
        for module in (model, own):
            change(module)
        assert torch.equal(model(x, segmap), own(x, segmap))
        assert (own(x, segmap) - before).abs().max() > 1e-3 * before.abs().max()


def test_a_proof_is_for_a_single_module():
    model, _ = both(families.Layer, probe=False)
    model(pictures(), dense_map())
    for other in (copy.deepcopy(model), copy.copy(model), replica(model)):
        assert not is_known_unchanged(other)
        assert other._is_proved(pictures(), dense_map())
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None  # even without a garbage collector, because its tensors may be large
    finally:
        gc.enable()


def nested(depth):
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "value",
    [
        list(range(10**6)),
        dict.fromkeys(range(600)),
        [[0] * 600, [1] * 600],
        set(range(2000)),
        np.zeros(10**5),
        (nn.ModuleList(nn.ReLU() for _ in range(100)),),
    ],
)
def test_attributes_that_are_too_large_to_be_watched(value):
    layer = families.Layer()
    layer.history = value
    report = spade_fast.convert(layer)
    assert not report.converted
    assert report[0].reason == "attributes have too many values to be watched: history"


@pytest.mark.parametrize("value", [nested(300), [[]] * 300, {"a": dict.fromkeys(range(300))}])
def test_attributes_that_are_deep_or_long(value):
    def make():
        layer = families.Layer()
        layer.history = value
        return layer

    model, own = both(make, probe=False)
    for segmap in (dense_map(), label_map()):
        assert_same_calls(call, model, own, pictures(), segmap)
        assert is_known_unchanged(model)
    model.history.clear()
    assert not is_known_unchanged(model)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.acts = families.conv(5, 6), nn.ReLU(), True

    def forward(self, x):
        return self.act(self.conv(x)) if self.acts else self.conv(x)


def wrapped():
    layer = families.Layer()
    layer.mlp_shared = Wrapper()
    return layer


@pytest.mark.parametrize("make", [wrapped, lambda: families.Block(wrapped, spectral=False)])
def test_a_wrappers_flag_may_change(make):
    model, own = both(make)
    assert isinstance(model, Fast)
    for module in (*model.modules(), *own.modules()):
        if isinstance(module, Wrapper):
            module.acts = False
    assert_same_forwards(model, own)


class Keeps(families.Layer):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x, segmap):
        self.sizes.append(x.shape)
        return super().forward(x, segmap)


def test_a_forward_with_side_effects_is_left_alone():
    layer = Keeps()
    report = spade_fast.convert(layer)
    assert not report.converted and "changes its attributes: sizes" in report[0].reason
    assert not layer.sizes


@pytest.mark.parametrize("name", ["modulate", "call", "kind", "spade_form"])
def test_names_that_the_fast_class_needs(name):
    layer = families.Layer()
    setattr(layer, name, 1)
    report = spade_fast.convert(layer)
    assert f"needs: {name}" in report[0].reason
    assert report.converted == (name == "modulate")  # which the own forward does without


def replica(module):
    """As DataParallel makes it: its weights are plain tensors, not parameters."""
    copied = module._replicate_for_data_parallel()
    copied._former_parameters = {}
    for name, parameter in module._parameters.items():
        if parameter is None:
            copied._parameters[name] = None
        else:
            copied._former_parameters[name] = parameter
            setattr(copied, name, parameter.view_as(parameter))
    for name, child in module._modules.items():
        copied._modules[name] = replica(child)
    return copied


@pytest.mark.parametrize("mode", ["always", "never"])
def test_replicas_of_data_parallel(mode):
    converted = families.Block(families.Layer, fout=4).eval()
    spade_fast.convert(converted)
    block = spade_fast.SPADEResnetBlock(8, 4, "spectralspadebatch3x3", 5).eval()
    for model in (converted, block, spade_fast.SPADE(8, 5)):
        x, segmap = pictures().float(), label_map().float()
        with spade_fast.window_mode(mode):
            assert_agree(replica(model)(x, segmap), model(x, segmap))
    assert replica(converted)._is_proved(x, segmap)


def test_reverting_while_it_is_called():
    model, own = both(families.Layer)

    def hook(module, arguments):
        spade_fast.revert(module)

    model.register_forward_pre_hook(hook)
    assert_same_forwards(model, own)
