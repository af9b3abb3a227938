"""Tensors of other classes, and from inference mode, wherever a plain tensor is accepted."""

import copy

import families
import pytest
import torch
import torch.nn as nn
from agree import assert_agree
from twins import assert_same, label_map, outcome, pictures

import spade_fast
from spade_fast import reference


class Tagged(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapped(torch.Tensor):
    """A subclass that adds the result of every function to a list."""

    seen = []

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        y = super().__torch_function__(function, types, arguments, named or {})
        cls.seen.append(function)
        return y


def meta_tensor(tensor):
    from monai.data import MetaTensor

    return MetaTensor(tensor)


def image_of_torchvision(tensor):
    return pytest.importorskip("torchvision.tv_tensors").Image(tensor)


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


CLASSES = {
    "parameter": lambda tensor: nn.Parameter(tensor, requires_grad=False),
    "parameter with gradients": nn.Parameter,
    "subclass": lambda tensor: tensor.as_subclass(Tagged),
    "subclass with functions": lambda tensor: tensor.as_subclass(Wrapped),
    "tv_tensor": image_of_torchvision,
    "buffer": nn.Buffer,
    "MetaTensor": meta_tensor,
}
META_TENSOR = pytest.param("MetaTensor", marks=pytest.mark.needs("monai"))
MODELS = {
    "layer": lambda package: package.SPADE(8, 5, 6),
    "layer, batch": lambda package: package.SPADE(8, 5, 6, norm="batch"),
    "block": lambda package: package.SPADEResnetBlock(8, 6, "spectralspadebatch3x3", 5, nhidden=6),
    "converted": None,
}


def both(name):
    torch.manual_seed(0)
    if MODELS[name] is None:
        theirs = families.Block(families.SPADES["official, batch"], 6).double()
        ours = copy.deepcopy(theirs)
        assert spade_fast.convert(ours).converted == 4
    else:
        ours, theirs = (MODELS[name](package).double() for package in (spade_fast, reference))
        theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("kind", [*list(CLASSES)[:-1], META_TENSOR])
@pytest.mark.parametrize("name", MODELS)
def test_other_classes(name, kind, mode):
    ours, theirs = both(name)
    make = CLASSES[kind]
    calls = [
        lambda module, x: module(x, make(label_map())),
        lambda module, x: module(make(x), label_map()),
        lambda module, x: module(make(x.detach()), make(label_map())),
    ]
    with spade_fast.window_mode(mode):
        for call in calls:
            x = pictures().requires_grad_()
            assert_same(outcome(call, ours, x), outcome(call, theirs, x))
            assert type(call(ours, pictures())) is type(call(theirs, pictures()))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("which", ["x", "the condition", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_inference_tensors_in_training(name, which, mode, train):
    """What eager PyTorch accepts is accepted, and what it refuses does not give other numbers."""
    ours, theirs = (one.train(train) for one in both(name))
    x = inference(pictures()) if which != "the condition" else pictures().requires_grad_()
    segmap = inference(label_map()) if which != "x" else label_map()
    with spade_fast.window_mode(mode):
        for _ in range(2):
            found = outcome(lambda module: module(x, segmap), ours)
            expected = outcome(lambda module: module(x, segmap), theirs)
            if not isinstance(expected, Exception):
                assert_same(found, expected)
                continue
            # Eager may be unable to save an inference tensor for backward. Ours may not need it.
            if isinstance(found, Exception):
                assert isinstance(found, RuntimeError), found
            else:
                assert_same(
                    found, outcome(lambda module: module(x.clone(), segmap.clone()), theirs)
                )


@pytest.mark.parametrize("mode", ["always", "never"])
def test_a_condition_seen_in_inference_and_used_in_training(mode):
    ours, theirs = both("block")
    segmap = label_map()
    with spade_fast.window_mode(mode):
        with torch.inference_mode():
            copy.deepcopy(ours).eval()(pictures(), segmap)

        def call(module, x):
            return module(x, segmap)

        x = pictures().requires_grad_()
        assert_same(outcome(call, ours, x), outcome(call, theirs, x))


def test_a_layout_from_inference_used_in_training():
    ours, theirs = both("block")
    with torch.inference_mode():
        layouts = [
            spade_fast.SemanticLayout.from_segmap(label_map()),
            spade_fast.SemanticLayout.from_labels(label_map().argmax(1), 5),
        ]
        layouts += [
            spade_fast.SemanticLayout.stack([layouts[1]]),
            layouts[1].repeat(1),
            layouts[1].resize((6, 5)),
        ]
        layouts[0].prepare([(6, 5)], 3)
    for layout in layouts:
        segmap = layout.to_segmap(torch.float64).clone()
        own, twin = copy.deepcopy(ours), copy.deepcopy(theirs)
        x = pictures().requires_grad_()
        with spade_fast.window_mode("always"):
            assert_same(
                outcome(lambda module, x: module(x, layout), own, x),
                outcome(lambda module, x: module(x, segmap), twin, x),
            )


@pytest.mark.parametrize("kind", ["subclass", META_TENSOR, "parameter"])
def test_layouts_and_operations_of_other_classes(kind):
    make = CLASSES[kind]
    layout = spade_fast.SemanticLayout.from_segmap(make(label_map()))
    assert_agree(layout.to_segmap(torch.float64), label_map())
    arguments = pictures(), pictures(seed=5), pictures(seed=6)
    expected = reference.spade_modulate(*arguments)
    assert_agree(spade_fast.spade_modulate(*map(make, arguments)), expected)
    ours, _ = both("layer")
    with spade_fast.window_mode("always"):
        assert_agree(ours(make(pictures()), make(label_map())), ours(pictures(), label_map()))
