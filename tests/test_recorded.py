"""Recording a graph or transforming a function gives the right numbers, or a refusal that says what
to do; never other numbers.
"""

import copy
import functools
import warnings

import families
import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn as nn
from agree import NETWORK, assert_agree, assert_agree_beside, largest_of
from modulations import eager_modulate
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from twins import dense_map, label_map, layout_of, pictures, right_or_refused

import spade_fast
from spade_fast import reference

MODULES = {
    "instance": lambda package: package.SPADE(8, 5, 6),
    "instance, affine": lambda package: package.SPADE(8, 5, 6, affine=True),
    "batch": lambda package: package.SPADE(8, 5, 6, norm="batch"),
    "batch, eval": lambda package: package.SPADE(8, 5, 6, norm="batch").eval(),
    "group": lambda package: package.SPADE(8, 5, 6, norm="group", num_groups=4),
    "no norm": lambda package: package.SPADE(8, 5, 6, norm=nn.Identity()),
    "block": lambda package: package.SPADEResnetBlock(8, 6, "spadeinstance3x3", 5, nhidden=6),
    "spectral block": lambda package: package.SPADEResnetBlock(
        8, 8, "spectralspadebatch3x3", 5, nhidden=6
    ).eval(),
    "converted": None,
    "converted block": None,
}
FORWARDS = ["instance", "batch, eval", "no norm", "block", "converted"]
CONDITIONS = {"labels": label_map, "dense": lambda seed=2: dense_map(seed=seed).detach()}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(autouse=True)
def windows_wherever_possible():
    with spade_fast.window_mode("always"):
        yield


def both(name):
    """The package's module and the plain module, with the same weights and running statistics."""
    torch.manual_seed(0)
    if MODULES[name] is None:
        theirs = families.Block(families.Layer, 4, False) if "block" in name else families.Layer()
        ours = copy.deepcopy(theirs.double())
        assert spade_fast.convert(ours).converted
        return ours, theirs
    ours, theirs = (MODULES[name](package).double() for package in (spade_fast, reference))
    for buffer in ours.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def the_same(transform, name, *inputs):
    """Applies transform(module)(*inputs) to both modules: our result is right, or refused."""
    ours, theirs = both(name)
    inputs = [tensor.detach() for tensor in inputs]
    try:
        expected = transform(theirs)(*inputs)
    except Exception:  # eager PyTorch does not support it either
        pytest.skip("eager PyTorch refuses")
    right_or_refused(lambda: transform(ours)(*inputs), expected, assert_agree_beside)


@pytest.mark.parametrize("check_trace", [True, False])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", [*FORWARDS, "spectral block", "converted block"])
def test_jit_trace(name, condition, check_trace):
    x, segmap = pictures(seed=3), CONDITIONS[condition](seed=4)

    def traced(module):
        recorded = torch.jit.trace(
            module.eval(), (pictures(), CONDITIONS[condition]()), check_trace=check_trace
        )
        return lambda x, segmap: [recorded(x, segmap), recorded(x, segmap)]

    the_same(traced, name, x, segmap)


def test_jit_trace_with_the_other_kind_of_condition():
    """Recorded with a label map and called with a dense condition, and vice versa."""
    for first, second in ((label_map, dense_map), (dense_map, label_map)):
        the_same(
            lambda module: torch.jit.trace(module, (pictures(), first().detach())),
            "instance",
            pictures(seed=3),
            second(seed=4),
        )


def test_jit_trace_of_a_map_that_was_seen_before():
    """Its windows are already known."""
    x, segmap = pictures(), label_map()

    def traced(module):
        module(x, segmap)
        return torch.jit.trace(module, (x, segmap))

    the_same(traced, "instance", pictures(seed=3), label_map(seed=4))


def test_jit_trace_of_a_generator():
    norm_G = "spectralspadeinstance3x3"
    ours = spade_fast.SPADEGenerator.official(5, crop_size=64, norm_G=norm_G, ngf=1, nhidden=4)
    theirs = reference.SPADEGenerator(5, 1, crop_size=64, norm_G=norm_G)
    for stage in ("head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3"):
        before = getattr(theirs, stage)
        after = reference.SPADEResnetBlock(
            before.conv_0.in_channels, before.conv_1.out_channels, norm_G, 5, nhidden=4
        )
        setattr(theirs, stage, after)
    ours, theirs = ours.double().eval(), theirs.double().eval()
    theirs.load_state_dict(ours.state_dict())
    maps = [label_map(1, size=(64, 64), seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        right_or_refused(
            lambda: torch.jit.trace(ours, (maps[0],), check_trace=False)(maps[1]),
            theirs(maps[1]),
            functools.partial(assert_agree, roundings=NETWORK),
        )


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", FORWARDS)
def test_make_fx(name, condition, tracing_mode):
    def recorded(module):
        parameters = dict(module.state_dict())

        def forward(parameters, x, segmap):
            return functional_call(module, parameters, (x, segmap))

        example = pictures(), CONDITIONS[condition]()
        graph = make_fx(forward, tracing_mode=tracing_mode)(parameters, *example)
        return lambda x, segmap: graph(parameters, x, segmap)

    the_same(recorded, name, pictures(seed=3), CONDITIONS[condition](seed=4))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", FORWARDS)
def test_make_fx_of_gradients(name, condition):
    def recorded(module):
        parameters = {key: one.detach() for key, one in module.named_parameters()}

        def loss(parameters, x, segmap):
            return functional_call(module, parameters, (x, segmap)).sin().sum()

        example = parameters, pictures(), CONDITIONS[condition]()
        graph = make_fx(torch.func.grad(loss, (0, 1)))(*example)
        return lambda x, segmap: graph(parameters, x, segmap)

    the_same(recorded, name, pictures(seed=3), CONDITIONS[condition](seed=4))


@pytest.mark.parametrize("name", FORWARDS)
def test_symbolic_make_fx_with_other_sizes(name):
    def recorded(module):
        def forward(x, segmap):
            return module(x, segmap)

        module.requires_grad_(False)
        return make_fx(forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            pictures(), label_map()
        )

    the_same(recorded, name, pictures(3, size=(8, 7)), label_map(3, size=(16, 14), seed=4))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", FORWARDS)
def test_fx_symbolic_trace(name, condition):
    the_same(torch.fx.symbolic_trace, name, pictures(seed=3), CONDITIONS[condition](seed=4))


TRANSFORMS = {
    "vmap over both": lambda forward: torch.vmap(forward),
    "vmap over x": lambda forward: lambda x, segmap: torch.vmap(forward, (0, None))(x, segmap[0]),
    "vmap over the condition": lambda forward: (
        lambda x, segmap: torch.vmap(forward, (None, 0))(x[0], segmap)
    ),
    "vmap of grad": lambda forward: torch.vmap(
        torch.func.grad(lambda x, segmap: forward(x, segmap).sin().sum(), (0, 1))
    ),
    "jvp": lambda forward: (
        lambda x, segmap: torch.func.jvp(forward, (x[0], segmap[0]), (x[1], segmap[1]))
    ),
    "jvp in x": lambda forward: (
        lambda x, segmap: torch.func.jvp(lambda x: forward(x, segmap[0]), (x[0],), (x[1],))
    ),
    "jvp in the condition": lambda forward: (
        lambda x, segmap: torch.func.jvp(
            lambda segmap: forward(x[0], segmap), (segmap[0],), (segmap[1],)
        )
    ),
    "jvp without grad": lambda forward: (
        lambda x, segmap: torch.no_grad()(torch.func.jvp)(
            forward, (x[0], segmap[0]), (x[1], segmap[1])
        )
    ),
    "grad": lambda forward: (
        lambda x, segmap: torch.func.grad(lambda x, segmap: forward(x, segmap).sin().sum(), (0, 1))(
            x[0], segmap[0]
        )
    ),
    "grad of grad": lambda forward: (
        lambda x, segmap: torch.func.grad(
            lambda x: torch.func.grad(lambda x: forward(x, segmap[0]).sin().sum())(x).sin().sum()
        )(x[0])
    ),
    "vjp": lambda forward: lambda x, segmap: torch.func.vjp(forward, x[0], segmap[0])[1](x[1]),
    "jacrev": lambda forward: (
        lambda x, segmap: torch.func.jacrev(
            lambda x, segmap: forward(x, segmap)[:, :2, 0].sin().sum(-1), (0, 1)
        )(x[0], segmap[0])
    ),
    "jacfwd": lambda forward: (
        lambda x, segmap: torch.func.jacfwd(lambda few: forward(x[0] + few.sum(), segmap[0]))(
            x.new_zeros(2)
        )
    ),
    "hvp": lambda forward: (
        lambda x, segmap: torch.func.jvp(
            torch.func.grad(lambda x: forward(x, segmap[0]).sin().sum()), (x[0],), (x[1],)
        )
    ),
    "linearize": lambda forward: (
        lambda x, segmap: torch.func.linearize(lambda x: forward(x, segmap[0]), x[0])[1](x[1])
    ),
    "functionalize": lambda forward: (
        lambda x, segmap: torch.func.functionalize(forward)(x[0], segmap[0])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ["instance", "batch, eval", "group", "block"])
def test_function_transforms(name, condition, transform):
    xs = pictures(4).view(2, 2, 8, 6, 5)
    segmaps = torch.stack([CONDITIONS[condition](seed=seed) for seed in (4, 5)])
    the_same(lambda module: TRANSFORMS[transform](module), name, xs, segmaps)


@pytest.mark.float64
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_vectorized_jacobians(norm):
    """Their backward is vectorised after an ordinary forward."""
    x, gamma, beta = torch.randn(3, 2, 4, 3, 2, dtype=torch.float64)
    settings = {"norm": norm, "num_groups": 2 if norm == "group" else None}

    def modulated(x):
        return spade_fast.spade_modulate(x, gamma, beta, **settings)

    found = [torch.autograd.functional.jacobian(modulated, x, vectorize=own) for own in (0, 1)]
    assert_agree(*found)


@pytest.mark.parametrize("label_nc,nhidden", [(3, 8), (8, 3)])
def test_vmap_of_channels_last(label_nc, nhidden):
    layers = [spade_fast.SPADE(4, label_nc, nhidden) for _ in range(2)]
    stacked, _ = torch.func.stack_module_state(layers)
    x = torch.randn(1, 4, 6, 6).to(memory_format=torch.channels_last)
    segmap = torch.randn(1, label_nc, 6, 6)
    expected = torch.stack([layer(x, segmap) for layer in layers])
    over_parameters = torch.vmap(lambda given: functional_call(layers[0], given, (x, segmap)))
    assert_agree(over_parameters(stacked), expected)
    over_conditions = torch.vmap(lambda segmap: layers[0](x, segmap))
    assert_agree(over_conditions(segmap[None]), expected[:1])


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad", "jacrev"])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ["instance, affine", "block"])
def test_function_transforms_over_parameters(name, condition, transform):
    """As for ensembles and for per-sample gradients."""

    def transformed(module):
        parameters = {key: one.detach() for key, one in module.named_parameters()}
        others = {key: one.sin() for key, one in parameters.items()}

        def forward(parameters, x, segmap):
            return functional_call(module, parameters, (x, segmap))

        def loss(parameters, x, segmap):
            return forward(parameters, x, segmap).sin().sum()

        def of_one(parameters, x, segmap):
            return loss(parameters, x[None], segmap[None])

        def per_sample(x, segmap):
            return torch.vmap(torch.func.grad(of_one), (None, 0, 0))(parameters, x, segmap)

        stacked = {key: torch.stack([one, others[key]]) for key, one in parameters.items()}
        return {
            "vmap": lambda *inputs: torch.vmap(forward, (0, None, None))(stacked, *inputs),
            "jvp": lambda *inputs: torch.func.jvp(
                lambda parameters: forward(parameters, *inputs), (parameters,), (others,)
            ),
            "grad": per_sample,
            "jacrev": lambda *inputs: torch.func.jacrev(
                lambda parameters: forward(parameters, *inputs)[:, 0, 0, :2]
            )(parameters),
        }[transform]

    the_same(transformed, name, pictures(), CONDITIONS[condition]())


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("of", ["x", "the condition", "parameters"])
@pytest.mark.parametrize("condition", [*CONDITIONS, "layout"])
@pytest.mark.parametrize("name", [*FORWARDS, "batch", "group"])
def test_dual_numbers(name, condition, of, gradients):
    """The tangents of forward-mode differentiation."""
    ours, theirs = both(name)
    x, segmap = pictures(), label_map() if condition == "layout" else CONDITIONS[condition]()
    if condition == "layout" and of == "the condition":
        return

    def tangent(module, segmap):
        module = copy.deepcopy(module)
        with fwAD.dual_level(), torch.set_grad_enabled(gradients):
            given = x
            if of == "x":
                given = fwAD.make_dual(x, x.sin())
            if of == "the condition":
                segmap = fwAD.make_dual(segmap, segmap.cos())
            parameters = {key: one.detach() for key, one in module.named_parameters()}
            if of == "parameters":
                parameters = {
                    key: fwAD.make_dual(one, one.sin()) for key, one in parameters.items()
                }
            y = functional_call(module, parameters, (given, segmap))
            return list(fwAD.unpack_dual(y))

    try:
        expected = tangent(theirs, segmap)
    except Exception:
        pytest.skip("eager PyTorch refuses")
    if condition == "layout":
        segmap = layout_of()
    right_or_refused(lambda: tangent(ours, segmap), expected, assert_agree_beside)


NORMS = {
    "instance": {},
    "instance, affine": {"affine": True},
    "batch": {"norm": "batch"},
    "batch, eval": {"norm": "batch", "training": False},
    "group, without the one": {"norm": "group", "num_groups": 4, "plus_one": False},
    "none": {"norm": None},
}


def modulation(norm, table, activation="silu"):
    """Both implementations as functions of x, γ and β, and these tensors."""
    settings = {**NORMS[norm], "activation": activation}
    if settings.pop("affine", False):
        settings |= {"weight": pictures(8, 1, ())[:, 0], "bias": pictures(8, 1, (), 3)[:, 0]}
    if settings.get("norm") == "batch" and not settings.get("training", True):
        settings |= {"running_mean": torch.ones(8).double(), "running_var": torch.ones(8).double()}
    if table:
        gamma, beta = pictures(4, 8, (), 6), pictures(4, 8, (), 7)
        settings["index"] = torch.arange(2 * 6 * 5).view(2, 6, 5) % 4
    else:
        gamma, beta = pictures(seed=6), pictures(seed=7)

    def bound(operation):
        return lambda x, gamma, beta: operation(x, gamma, beta, **settings)

    return bound(spade_fast.spade_modulate), bound(eager_modulate), (pictures(), gamma, beta)


OF_MODULATION = {
    "jvp": lambda f: lambda *inputs: torch.func.jvp(f, inputs, tuple(one.sin() for one in inputs)),
    "jvp without grad": lambda f: (
        lambda *inputs: torch.no_grad()(torch.func.jvp)(
            f, inputs, tuple(one.sin() for one in inputs)
        )
    ),
    "jvp in γ": lambda f: (
        lambda x, gamma, beta: torch.func.jvp(
            lambda gamma: f(x, gamma, beta), (gamma,), (gamma.sin(),)
        )
    ),
    "grad": lambda f: torch.func.grad(lambda *inputs: f(*inputs).sin().sum(), (0, 1, 2)),
    "hvp": lambda f: (
        lambda x, gamma, beta: torch.func.jvp(
            torch.func.grad(lambda x: f(x, gamma, beta).sin().sum()), (x,), (x.sin(),)
        )
    ),
    "vmap": lambda f: (
        lambda x, gamma, beta: torch.vmap(f, (0, None, None))(
            torch.stack([x, x.sin()]), gamma, beta
        )
    ),
    "vmap over γ": lambda f: (
        lambda x, gamma, beta: torch.vmap(f, (None, 0, 0))(
            x, torch.stack([gamma, gamma.sin()]), torch.stack([beta, beta.sin()])
        )
    ),
    "jacrev": lambda f: (
        lambda *inputs: torch.func.jacrev(lambda *inputs: f(*inputs)[:, 0, 0, :2], (0, 1, 2))(
            *inputs
        )
    ),
    "jacfwd": lambda f: (
        lambda x, gamma, beta: torch.func.jacfwd(lambda few: f(x * (1 + few.sum()), gamma, beta))(
            x.new_zeros(2)
        )
    ),
    "make_fx": lambda f: lambda *inputs: make_fx(f)(*(one.cos() for one in inputs))(*inputs),
    "symbolic make_fx": lambda f: (
        lambda *inputs: make_fx(f, tracing_mode="symbolic")(*(one.cos() for one in inputs))(*inputs)
    ),
    "jit.trace": lambda f: (
        lambda *inputs: torch.jit.trace(f, tuple(one.cos() for one in inputs))(*inputs)
    ),
    "fx.symbolic_trace": lambda f: torch.fx.symbolic_trace(
        type("Root", (nn.Module,), {"forward": lambda self, x, gamma, beta: f(x, gamma, beta)})()
    ),
    "functionalize": lambda f: torch.func.functionalize(f),
}


@pytest.mark.parametrize("transform", OF_MODULATION)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_operation_transformed(norm, table, transform):
    ours, theirs, inputs = modulation(norm, table)
    try:
        expected = OF_MODULATION[transform](theirs)(*inputs)
    except Exception:
        pytest.skip("eager PyTorch refuses")

    def compare(found, expected):
        # A norm undoes a scaling of x: its derivative is a small difference of numbers near 1.
        assert_agree(found, expected, largest=max(1.0, largest_of(expected)))

    right_or_refused(lambda: OF_MODULATION[transform](ours)(*inputs), expected, compare)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dual", ["x", "gamma", "x gamma beta"])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_operation_with_dual_numbers(norm, table, dual, gradients):
    ours, theirs, inputs = modulation(norm, table)

    def tangent(operation):
        with fwAD.dual_level(), torch.set_grad_enabled(gradients):
            given = [
                fwAD.make_dual(one, one.sin()) if name in dual.split() else one
                for name, one in zip(("x", "gamma", "beta"), inputs)
            ]
            return list(fwAD.unpack_dual(operation(*given)))

    right_or_refused(lambda: tangent(ours), tangent(theirs), assert_agree_beside)


def compare_kinds(found, expected):
    assert (found.shape, found.dtype, found.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )


@pytest.mark.parametrize("condition", [*CONDITIONS, "of one image"])
@pytest.mark.parametrize("name", MODULES)
def test_meta_tensors(name, condition):
    ours, theirs = (module.to("meta") for module in both(name))
    x = pictures().to("meta")
    segmap = (label_map(1) if condition == "of one image" else CONDITIONS[condition]()).to("meta")
    right_or_refused(lambda: ours(x, segmap), theirs(x, segmap), compare_kinds)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", MODULES)
def test_fake_tensors(name, condition):
    ours, theirs = both(name)
    x, segmap = pictures(), CONDITIONS[condition]()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x, segmap = fake.from_tensor(x), fake.from_tensor(segmap)
        x.requires_grad_()

        def with_gradient(module):
            y = module(x, segmap)
            return [y, *torch.autograd.grad(y.sum(), x)]

        for number in range(2):
            right_or_refused(
                lambda: with_gradient(ours)[number], with_gradient(theirs)[number], compare_kinds
            )


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_meta_and_fake_tensors_of_the_operation(norm, table):
    ours, theirs, inputs = modulation(norm, table)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        faked = [fake.from_tensor(one) for one in inputs]
        right_or_refused(lambda: ours(*faked), theirs(*faked), compare_kinds)


def test_converting_and_constructing_under_a_meta_device_context():
    with torch.device("meta"):
        made = spade_fast.SPADEResnetBlock(8, 6, "spectralspadebatch3x3", 5)
        assert all(tensor.is_meta for tensor in made.parameters())
    torch.manual_seed(0)
    own = families.Layer().double()
    model = copy.deepcopy(own)
    with torch.device("meta"):
        report = spade_fast.convert(model)
    assert report.converted == 1, report
    x, segmap = pictures(), label_map()
    assert_agree(model(x, segmap), own(x, segmap))


def sizes_of(factor):
    height, width = (
        torch.export.Dim("height", min=2, max=64),
        torch.export.Dim("width", min=2, max=64),
    )
    return {"x": {2: height, 3: width}, "segmap": {2: factor * height, 3: factor * width}}


@pytest.mark.parametrize("factor", [1, 2, None])
@pytest.mark.parametrize("name", ["instance", "block"])
def test_export_with_dynamic_height_and_width(name, factor):
    Dim = torch.export.Dim
    if factor is None:
        sizes = {one: {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} for one in ("x", "segmap")}
        size, other = (11, 9), (13, 21)
    else:
        sizes, size, other = sizes_of(factor), (6 * factor, 5 * factor), (8 * factor, 12 * factor)

    class Named(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x, segmap):
            return self.module(x, segmap)

    def exported(module):
        example = pictures(), label_map(size=size)
        return torch.export.export(
            Named(module.eval()), example, dynamic_shapes=sizes, strict=False
        ).module()

    with torch.no_grad():
        the_same(exported, name, pictures(size=(8, 12)), label_map(size=other, seed=4))


def test_a_trace_of_one_image_is_right_for_several():
    def modulated(x):
        return spade_fast.spade_modulate(x, 0.5 * x, x, norm="batch")

    one, several = torch.randn(1, 2, 3, 4), torch.randn(3, 2, 3, 4)
    traced = torch.jit.trace(modulated, (one,))
    assert_agree(traced(several), modulated(several))


def test_a_trace_does_not_assume_that_sizes_are_equal():
    ours, theirs = both("instance")
    x, segmap = pictures(), dense_map(size=(6, 5))
    traced = torch.jit.trace(ours, (x, segmap))
    for size in ((6, 5), (12, 10), (1, 1)):
        segmap = dense_map(size=size)
        assert_agree(traced(x, segmap), theirs(x, segmap))
