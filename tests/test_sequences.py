"""Random sequences of users' operations on a model: after each, it computes the same as its plain
twin. Also random layers, operations and calls against the reference.
"""

import copy
import io
import warnings

import families
import modulations
import pytest
import torch
from agree import assert_agree
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from modulations import LAYOUTS, disagreements
from twins import dense_map, label_map, layout_of, pictures, right_or_refused

import spade_fast
from spade_fast import reference
from spade_fast.agreement import excess

FEW = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


class Network(torch.nn.Module):
    """A layer and a block. The layers' class can be chosen."""

    def __init__(self, layer=families.SPADES["official, batch"]):
        super().__init__()
        self.first, self.block = layer(), families.Block(layer, fout=6)

    def forward(self, x, segmap):
        return self.block(torch.relu(self.first(x, segmap)), segmap)


class Generator(torch.nn.Module):
    """A generator with the call of the other models."""

    def __init__(self):
        super().__init__()
        stages = [("up_0", 8, 1), ("up_1", 6, 2)]
        self.own = spade_fast.SPADEGenerator(
            5, None, 1, stages=stages, last_scale=1, start=(6, 5), nhidden=4, norm_G=NORM_G
        )

    def forward(self, x, segmap):
        return self.own(segmap)


NORM_G = "spectralspadebatch3x3"
BLOCK = (8, 6, NORM_G, 5)
MODELS = {
    "block": lambda: [
        package.SPADEResnetBlock(*BLOCK, nhidden=6) for package in (spade_fast, reference)
    ],
    "converted": lambda: [Network() for _ in range(2)],
    "dropout": lambda: [Network(families.Dropout) for _ in range(2)],
    "generator": lambda: [Generator() for _ in range(2)],
}


class Pair:
    """A model and its twin. Both get the same operations, except for those that should change
    nothing.
    """

    def __init__(self, kind):
        torch.manual_seed(0)
        self.kind = kind
        self.model, self.twin = (one.double() for one in MODELS[kind]())
        # converges the singular vectors: σ of random vectors may be about zero
        with torch.no_grad():
            for seed in range(5):
                self.model.train()(pictures(seed=seed), label_map())
        self.twin.load_state_dict(self.model.state_dict())
        self.scopes, self.changed, self.number = [], False, 0

    def do(self, operation, mode, gradients):
        self.number += 1
        OPERATIONS[operation](self)
        segmap = [label_map, dense_map][self.number % 3 == 2](seed=self.number % 2)
        with spade_fast.window_mode(mode), torch.set_grad_enabled(gradients):
            self.compare(pictures(seed=self.number), segmap.detach())
            if self.kind != "converted" and self.kind != "dropout" and self.number % 2:
                layout = layout_of(seed=self.number % 2)
                self.compare(pictures(), label_map(seed=self.number % 2), layout)

    def compare(self, x, segmap, layout=None):
        results = []
        for one, condition in (
            (self.model, segmap if layout is None else layout),
            (self.twin, segmap),
        ):
            torch.manual_seed(self.number)
            given = x.clone().requires_grad_()
            y = one(given, condition)
            results.append([y])
            if y.requires_grad and self.kind != "generator":
                results[-1].extend(torch.autograd.grad(y.sin().sum(), given))
        assert_agree(*results)

    def both(self, change):
        self.changed = True
        for one in (self.model, self.twin):
            torch.manual_seed(self.number)
            change(one)

    def close(self):
        while self.scopes:
            leave_frozen(self)


def step(pair):
    def change(one):
        optimizer = torch.optim.SGD(one.parameters(), 0.05)
        with torch.enable_grad():
            one(pictures(), label_map()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if pair.kind != "generator" or pair.model.training:
        pair.both(change)


def swapped(pair):
    """Exchanges the weights' data, runs a forward, and restores them."""

    def change(one):
        with torch.no_grad():
            kept = {name: tensor.data for name, tensor in one.named_parameters()}
            for tensor in one.parameters():
                tensor.data = 0.5 * tensor.data
            y = one.eval()(pictures(), label_map())
            for name, tensor in one.named_parameters():
                tensor.data = kept[name]
        found.append(y)

    found, modes = [], [pair.model.training, pair.twin.training]
    if pair.kind == "generator" and pair.model.training:
        return
    pair.both(change)
    for one, mode in zip((pair.model, pair.twin), modes):
        one.train(mode)
    assert_agree(*found)


def ema(pair):
    def change(one):
        with torch.no_grad():
            for tensor in one.parameters():
                tensor.lerp_(torch.randn_like(tensor) * 0.3, 0.1)

    pair.both(change)


def load(pair):
    def change(one):
        state = one.state_dict()
        one.load_state_dict(
            {
                name: tensor + 0.05 * torch.randn_like(tensor)
                if tensor.is_floating_point() and not name.endswith(("_u", "_v", "_var"))
                else tensor.clone()
                for name, tensor in state.items()
            }
        )

    pair.both(change)


def replaced(pair, copied):
    pair.close()  # frozen holds for this very object
    with torch.no_grad():  # otherwise spectral norm's computed weight cannot be copied
        for one in (pair.model, pair.twin):
            torch.manual_seed(pair.number)
            one(pictures(), label_map())
    pair.model, pair.twin = copied(pair.model), copied(pair.twin)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def enter_frozen(pair):
    if any("SPADE" in type(one).__name__ or "Fast" in repr(one) for one in pair.model.modules()):
        scope = spade_fast.frozen(pair.model)
        scope.__enter__()
        pair.scopes.append(scope)


def leave_frozen(pair):
    if pair.scopes:
        try:
            pair.scopes.pop(pair.number % len(pair.scopes)).__exit__(None, None, None)
        except RuntimeError as error:
            assert "weights changed inside frozen" in str(error)
            assert pair.changed


def fold(pair):
    if pair.kind == "generator" and not pair.model.training:
        pair.model.own.fold_spectral_norm()


def convert(pair):
    if pair.kind in ("converted", "dropout"):
        spade_fast.convert(pair.model)


def trace(pair):
    """Traces copies in eval mode, and calls them with another map."""
    if pair.kind == "generator":
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in (pair.model, pair.twin):
            torch.manual_seed(pair.number)
            one(pictures(), label_map())
        ours, theirs = (copy.deepcopy(one).eval() for one in (pair.model, pair.twin))
        x, segmap = pictures(seed=8), label_map(seed=9)
        right_or_refused(
            lambda: torch.jit.trace(ours, (pictures(), label_map()), check_trace=False)(x, segmap),
            theirs(x, segmap),
        )


OPERATIONS = {
    "nothing": lambda pair: None,
    "train": lambda pair: pair.both(lambda one: one.train()),
    "eval": lambda pair: pair.both(lambda one: one.eval()),
    "step": step,
    "ema": ema,
    "swap": swapped,
    "load": load,
    "deepcopy": lambda pair: replaced(pair, copy.deepcopy),
    "pickle": lambda pair: replaced(pair, pickled),
    "enter frozen": enter_frozen,
    "leave frozen": leave_frozen,
    "fold": fold,
    "convert": convert,
    "revert": lambda pair: spade_fast.revert(pair.model),
    "trace": trace,
}
MODES = st.sampled_from(["auto", "always", "never"])


COMMON = [name for name in OPERATIONS if name not in ("fold", "convert", "revert", "trace")]
OF_KINDS = {
    "block": [*COMMON, "trace"],
    "converted": [*COMMON, "convert", "revert", "trace"],
    "dropout": ["train", "eval", "convert", "revert", "load"],
    "generator": ["fold", "fold", "eval", "train", "ema", "load", "swap", "enter frozen", "step"],
}


def sequences(kind):
    """Sequences of operations on such a model, each with a mode, and with or without gradients."""
    step = st.tuples(st.sampled_from(OF_KINDS[kind]), MODES, st.booleans())
    return st.tuples(st.just(kind), st.lists(step, min_size=6, max_size=12))


@pytest.mark.full
@FEW
@given(st.sampled_from([*MODELS]).flatmap(sequences), st.booleans())
def test_sequences_of_operations(sequence, train):
    kind, steps = sequence
    pair = Pair(kind)
    pair.both(lambda one: one.train(train))
    try:
        if kind in ("converted", "dropout"):
            spade_fast.convert(pair.model)
        for operation, mode, gradients in steps:
            pair.do(operation, mode, gradients)
    finally:
        pair.close()


@st.composite
def layers(draw):
    """Settings of a SPADE, its arguments' shapes and strides, and the form of the call."""
    dims = draw(st.integers(1, 3))
    channels = draw(st.sampled_from([1, 2, 4, 6]))
    side = st.integers(2, 5)
    return {
        "settings": {
            "norm": draw(st.sampled_from(["instance", "batch", "syncbatch", "group"])),
            "num_groups": draw(st.sampled_from([g for g in (1, 2, 3, 4) if channels % g == 0])),
            "affine": draw(st.booleans()),
            "kernel_size": draw(st.sampled_from([1, 3, 5])),
            "eps": draw(st.sampled_from([1e-5, 1e-3, 0.3])),
            "spatial_dims": dims,
        },
        "channels": channels,
        "batches": draw(st.sampled_from([(2, 2), (3, 3), (3, 1), (1, 2)])),
        "size": [draw(st.integers(4, 6)), *[draw(side) for _ in range(dims - 1)]],
        "condition_size": [draw(st.integers(1, 9)) for _ in range(dims)],
        "x_layout": draw(st.sampled_from(LAYOUTS)),
        "condition_layout": draw(st.sampled_from(LAYOUTS)),
        "kind": draw(st.sampled_from(["dense", "labels", "layout"])),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        "train": draw(st.booleans()),
        "mode": draw(MODES),
        "form": draw(st.sampled_from(["by position", "condition by name", "by name"])),
        "seed": draw(st.integers(0, 9)),
    }


def results(layer, x, segmap, dy, form):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    arguments, named = {
        "by position": ((x, segmap), {}),
        "condition by name": ((x,), {"segmap": segmap}),
        "by name": ((), {"x": x, "segmap": segmap}),
    }[form]
    y = layer(*arguments, **named)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy.to(y.dtype))
    found = {"y": y.detach(), **dict(zip(["x", *parameters], gradients))}
    return found | {
        name: one.clone() for name, one in layer.named_buffers() if one.is_floating_point()
    }


@FEW
@given(layers())
def test_layers_against_the_reference(case):
    torch.manual_seed(case["seed"])
    ours, theirs = (
        package.SPADE(case["channels"], 4, 5, **case["settings"]).train(case["train"])
        for package in (spade_fast, reference)
    )
    dtype = case["dtype"]
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    theirs.load_state_dict(ours.state_dict())
    truth = copy.deepcopy(theirs).double()
    batch, batch_of_condition = case["batches"]
    x = case["x_layout"](torch.randn(batch, case["channels"], *case["size"]).to(dtype) + 1)
    size = (batch_of_condition, *case["condition_size"])
    if case["kind"] == "dense":
        segmap = torch.randn(size[0], 4, *size[1:]).to(dtype)
        given = segmap = case["condition_layout"](segmap)
    else:
        given = layout = spade_fast.SemanticLayout.from_labels(torch.randint(4, size), 4)
        segmap = layout.to_segmap(dtype)
        if case["kind"] == "labels":
            given = segmap = case["condition_layout"](segmap)
    dy = torch.randn(max(batch, batch_of_condition), case["channels"], *case["size"])
    try:
        true = results(truth, x.double(), segmap.double(), dy, "by position")
    except Exception as error:  # such as for one value per channel in train mode
        kinds = (type(error), ValueError, RuntimeError)
        try:
            found = results(ours, x, given, dy, case["form"])
        except kinds:
            return
        raise AssertionError(f"y is {found['y'].shape} where eager raises") from error
    eager = results(theirs, x, segmap, dy, "by position")
    with spade_fast.window_mode(case["mode"]):
        found = results(ours, x, given, dy, case["form"])
    largest = max(one.abs().max().item() for name, one in true.items() if name != "y")
    for name in true:
        scale = true[name].abs().max().item()
        if name.endswith("bias") and name.replace("bias", "weight") in true:
            scale = max(scale, true[name.replace("bias", "weight")].abs().max().item())
        if name not in ("y", "x"):  # gradients may be zero in exact arithmetic
            scale = max(scale, 0.1 if "running" in name else 1e-2 * largest)
        if name == "x":
            scale = max(scale, 1e-2 * dy.abs().max().item())
        assert excess(found[name], eager[name], true[name], scale) <= 1, name


@st.composite
def operations(draw):
    """Arguments of modulations.sample, with at least two images: for a single image and a
    channels-last dy, eager PyTorch's gradient of instance norm is wrong.
    """
    dims, channels = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    dtype = draw(dtypes)
    return {
        "shape": (
            draw(st.integers(2, 3)),
            channels,
            draw(st.integers(5, 7)),
            *[draw(st.integers(1, 4)) for _ in range(dims - 1)],
        ),
        "norm": draw(st.sampled_from(["instance", "batch", "syncbatch", "group", None])),
        "activation": draw(st.sampled_from([None, "relu", "leaky_relu", "silu"])),
        "dtype": dtype,
        "gamma_dtype": draw(st.sampled_from([None, torch.float32])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "gamma_layout": draw(st.sampled_from(LAYOUTS)),
        "dy_layout": draw(st.sampled_from(LAYOUTS)),
        "affine": draw(st.booleans()),
        "training": draw(st.booleans()),
        "rows": draw(st.sampled_from([None, None, 2, 5])),
    }, draw(st.integers(0, 9))


@FEW
@given(operations())
def test_the_operation_against_the_reference(case):
    arguments, seed = case
    torch.manual_seed(seed)
    shape = arguments.pop("shape")
    if arguments["norm"] is None:
        arguments["affine"] = False
    assert not disagreements(*modulations.sample(shape, **arguments))
