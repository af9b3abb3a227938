"""After `convert`, a module accepts every call that its own forward accepted, with the same values,
gradients, buffers and kinds of errors as before.
"""

import copy
import functools

import families
import pytest
import torch
import torch.nn as nn
from agree import CANCELLED
from families import LABELS, SPADES
from twins import assert_same, assert_same_calls, dense_map, label_map, outcome, pictures

import spade_fast
from spade_fast import reference
from spade_fast.convert import fuse

FACTOR = pictures(2, 1, seed=5)
CONDITIONS = {"dense": dense_map, "labels": label_map}
OTHER = label_map(seed=7)
STATES = [("dense", "auto", True), ("labels", "always", True), ("labels", "always", False)]


def by_position(module, x, segmap):
    return module(x, segmap)


COMMON = {
    "by position": by_position,
    "the condition of one image": lambda module, x, segmap: module(x, segmap[:1]),
    "x of one image": lambda module, x, segmap: module(x[:1], segmap),
    "smaller by 2": lambda module, x, segmap: module(x, segmap[:, :, :6:2, :10:2]),
    "smaller by 4": lambda module, x, segmap: module(
        torch.cat([x, x, x, x], 2).tile(4), segmap[:, :, :6, :5]
    ),
    "of x's size": lambda module, x, segmap: module(x, segmap[:, :, ::2, ::2]),
    "odd": lambda module, x, segmap: module(x, segmap[:, :, 1:, 3:]),
    "one pixel": lambda module, x, segmap: module(x, segmap[:, :, :1, :1]),
    "x of one row": lambda module, x, segmap: module(x[:, :, :1], segmap),
    "a condition of 3 images": lambda module, x, segmap: module(x, torch.cat([segmap, segmap[:1]])),
    "an empty condition": lambda module, x, segmap: module(x, segmap[:, :, :0]),
    "no images": lambda module, x, segmap: module(x[:0], segmap[:0]),
    "too few channels of x": lambda module, x, segmap: module(x[:, 1:], segmap),
    "too few channels of the condition": lambda module, x, segmap: module(x, segmap[:, 1:]),
    "whole numbers": lambda module, x, segmap: module(x, segmap.detach().long()),
    "another dtype": lambda module, x, segmap: module(x, segmap.float()),
    "without a batch": lambda module, x, segmap: module(x[0], segmap[0]),
    "None": lambda module, x, segmap: module(x, None),
    "no condition": lambda module, x, segmap: module(x),
    "nothing": lambda module, x, segmap: module(),
    "one too many": lambda module, x, segmap: module(x, segmap, None, None, None, None, None),
    "an unknown name": lambda module, x, segmap: module(x, segmap, unknown=None),
    "the package's activation": lambda module, x, segmap: module(x, segmap, activation="relu"),
    "the package's slope": lambda module, x, segmap: module(x, segmap, negative_slope=0.3),
    "the package's moments": lambda module, x, segmap: module(x, segmap, moments=None),
    "the package's scale": lambda module, x, segmap: module(x, segmap, scale=2),
    "forward": lambda module, x, segmap: module.forward(x, segmap),
    "x twice": lambda module, x, segmap: module(x, segmap, x=x),
    "strings": lambda module, x, segmap: module("x", segmap),
    "an extra None": lambda module, x, segmap: module(x, segmap, None),
    "an extra False": lambda module, x, segmap: module(x, segmap, False),
    "an extra True": lambda module, x, segmap: module(x, segmap, True),
    "an extra 1": lambda module, x, segmap: module(x, segmap, 1),
    "an extra 0": lambda module, x, segmap: module(x, segmap, 0),
    "an extra 2": lambda module, x, segmap: module(x, segmap, 2),
    "an extra tensor": lambda module, x, segmap: module(x, segmap, FACTOR),
    "two extra": lambda module, x, segmap: module(x, segmap, None, FACTOR),
}


def named(x, segmap, **extra):
    """A call that passes x and the condition by these names."""
    names = {"x": x, "segmap": segmap}
    return lambda module, x, segmap: module(**{names["x"]: x, names["segmap"]: segmap}, **extra)


MADE = {
    **{name: SPADES[name] for name in ("official, instance", "official, batch", "imaginaire")},
    "SDM": SPADES["SDM, a norm of its own"],
    "block": lambda: families.Block(families.Layer),
    "block with a shortcut": lambda: families.Block(SPADES["official, batch"], fout=4),
    "CLADE": families.CLADE,
    "CLADE's block": families.CLADEBlock,
    "class-adaptive": families.ClassAdaptive,
    "class-adaptive, edges": families.ClassAdaptiveWithEdges,
    "class-adaptive block": lambda: families.CLADEBlock(families.ClassAdaptive),
    "INADE": families.INADE,
    "INADE's block": families.INADEBlock,
    "padding beside": families.PaddingBeside,
    "padding beside, batch": lambda: families.PaddingBeside(norm=nn.BatchNorm2d(8, affine=False)),
    "NowcastNet": families.NowcastNet,
    "imaginaire's own": families.ImaginaireNorm,
    "imaginaire's own, apart": lambda: families.ImaginaireNorm(separate_projection=True),
    "imaginaire's own, one condition": lambda: families.ImaginaireNorm(1, True, spectral=False),
    "imaginaire's own, one chunked": lambda: families.ImaginaireNorm(1, spectral=False),
    "SEAN's ACE": families.ACE,
    "VITON-HD": families.VITONHD,
    "up": lambda: families.UpBlock(families.Layer),
    "scale": lambda: families.ScaleBlock(families.Layer),
    "keyword": lambda: families.KeywordBlock(families.Layer),
    "own names": families.OwnNames,
    "shifted": families.Shifted,
    "strict": families.Strict,
    "any named": families.AnyNamed,
    "any more": families.AnyMore,
    "condition optional": families.ConditionOptional,
    "no resize": families.NoResize,
    "bilinear where smaller": families.BilinearWhereSmaller,
}
OWN = {
    "official, instance": {
        "by name": named("x", "segmap"),
        "the condition by name": lambda module, x, segmap: module(x, segmap=segmap),
        "another name": named("x", "seg"),
    },
    "block": {"by name": named("x", "seg"), "another name": named("x", "segmap")},
    "CLADE": {
        "by name": named("x", "segmap", input_dist=None),
        "given": lambda module, x, segmap: module(x, segmap, input_dist=FACTOR),
    },
    "CLADE's block": {
        "by name": named("x", "seg", input_dist=None),
        "given": named("x", "seg", input_dist=FACTOR),
    },
    "class-adaptive": {
        "by name": named("x", "segmap", distances=None),
        "given": named("x", "segmap", distances=FACTOR),
    },
    "INADE": {
        "all five": lambda module, x, segmap: module(x, segmap, FACTOR, FACTOR, OTHER[:, :1]),
        "the last": lambda module, x, segmap: module(x, segmap, sketch=OTHER[:, :1]),
    },
    "INADE's block": {
        "all five, four of them None": lambda module, x, segmap: module(
            x, segmap, None, None, None
        ),
        "all five": lambda module, x, segmap: module(x, segmap, FACTOR, FACTOR, OTHER[:, :1]),
        "noise": named("x", "seg", noise=FACTOR),
    },
    "padding beside": {
        "by name": named("x", "segmap", similarity_map=None),
        "given": named("x", "segmap", similarity_map=OTHER[:, :1]),
    },
    "imaginaire": {"two": lambda module, x, segmap: module(x, segmap, OTHER)},
    **{
        f"imaginaire's own{which}": {
            "two": lambda module, x, segmap: module(x, segmap, OTHER),
            "the second": lambda module, x, segmap: module(x, None, OTHER),
            "the first": lambda module, x, segmap: module(x, segmap, None),
            "a list": lambda module, x, segmap: module(x, *[segmap, OTHER]),
            "three": lambda module, x, segmap: module(x, segmap, OTHER, segmap),
        }
        for which in ("", ", apart", ", one condition", ", one chunked")
    },
    "up": {
        **{
            f"up={up}": named("x", "seg", up=up)
            for up in (False, True, 0, 1, None, "yes", torch.tensor(True))
        },
    },
    "scale": {f"scale={scale}": named("x", "seg", scale=scale) for scale in (1.0, 1, 2, 0.5)},
    "keyword": {f"{strength}": named("x", "seg", strength=strength) for strength in (1.0, 1, 2)},
    "own names": {
        "activation": named("x", "segmap", activation=torch.tanh),
        "none": named("x", "segmap", activation=None, moments=2.0, negative_slope=1.0),
        "moments": named("x", "segmap", moments=3.0),
        "negative_slope": named("x", "segmap", negative_slope=0.3),
    },
    "shifted": {
        "a tensor": named("x", "segmap", shift=FACTOR),
        "zeros": named("x", "segmap", shift=torch.zeros(2, 1, 1, 1, dtype=torch.float64)),
        "a tensor of one": named("x", "segmap", shift=torch.tensor(0.0)),
        "wanting gradients": named("x", "segmap", shift=torch.zeros((), requires_grad=True)),
    },
    "strict": {f"{flag}": named("x", "segmap", flag=flag) for flag in (True, 1, 1.0, False)},
    "any named": {
        "more": named("x", "segmap", more=3),
        "the package's": named("x", "segmap", activation="relu", moments=None),
    },
    "condition optional": {
        "by name": lambda module, x, segmap: module(x, segmap=None),
    },
    "VITON-HD": {"given": lambda module, x, segmap: module(x, segmap, OTHER[:, :1])},
    "SEAN's ACE": {"styles": lambda module, x, segmap: module(x, segmap, styles())},
}
CASES = [(family, form) for family in MADE for form in [*COMMON, *OWN.get(family, {})]]


def styles():
    return pictures(2, LABELS, (3,), seed=9)


@functools.cache
def original_and_converted(family):
    """The model unchanged, and converted."""
    torch.manual_seed(0)
    own = MADE[family]().double()
    model = copy.deepcopy(own)
    spade_fast.convert(model)
    return model, own


@pytest.mark.parametrize("family,form", CASES)
@pytest.mark.parametrize("state", STATES, ids=lambda state: "-".join(map(str, state)))
def test_every_call_matches_the_twins(family, form, state, monkeypatch):
    monkeypatch.setattr(fuse, "pays", lambda elements, is_slow: True)
    call = COMMON.get(form) or OWN[family][form]
    kind, mode, train = state
    model, own = (copy.deepcopy(one).train(train) for one in original_and_converted(family))
    x, segmap = pictures().requires_grad_(), CONDITIONS[kind]()
    with spade_fast.window_mode(mode):
        ours = outcome(call, model, x, segmap)
    assert_same(ours, outcome(call, own, x, segmap))


@pytest.mark.parametrize(
    "family",
    [
        "CLADE",
        "class-adaptive",
        "INADE",
        "padding beside",
        "shifted",
        "own names",
        "any more",
        "any named",
        "strict",
    ],
)
def test_layers_with_more_arguments_are_converted(family):
    assert isinstance(original_and_converted(family)[0], type(original_and_converted(family)[1]))
    report = spade_fast.convert(copy.deepcopy(original_and_converted(family)[1]))
    assert report.converted == 1, report


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("form", ["dictionary", "both", "another width", "missing"])
def test_conditions_in_dictionaries(form, mode):
    torch.manual_seed(0)
    own = families.StableSR().double()
    model = copy.deepcopy(own)
    spade_fast.convert(model)
    calls = {
        "dictionary": lambda module, x, segmap: module(x, {"5": segmap}),
        "both": lambda module, x, segmap: module({"5": x}, {"5": segmap[:1]}, 5),
        "another width": lambda module, x, segmap: module({"5": x}, {"5": segmap}, size=4),
        "missing": lambda module, x, segmap: module(x, {"4": segmap}),
    }
    for segmap in (label_map(size=(6, 5)), dense_map(size=(6, 5))):
        with spade_fast.window_mode(mode):
            assert_same_calls(calls[form], model, own, pictures().requires_grad_(), segmap)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("obj_dic", [None, {}])
def test_a_block_with_styles(train, obj_dic):
    torch.manual_seed(0)
    own = families.SEANBlock().double().train(train)
    model = copy.deepcopy(own)
    spade_fast.convert(model)
    seen = []

    def call(module, x, segmap, codes):
        objects = None if obj_dic is None else {}
        seen.append(objects)
        return module(x, segmap, codes, objects)

    inputs = pictures().requires_grad_(), label_map(), styles().requires_grad_()
    with spade_fast.window_mode("always"):
        assert_same_calls(call, model, own, *inputs)
        assert_same_calls(lambda module, *inputs: module(*inputs), model, own, *inputs)
        assert_same_calls(lambda module, x, segmap, _: module(x, segmap), model, own, *inputs)
    assert obj_dic is None or seen[0].keys() == seen[1].keys() == {"seen"}


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("segmap", CONDITIONS)
def test_a_block_that_is_recomputed_in_backward(checkpointed, mode, segmap):
    torch.manual_seed(0)
    own = families.SDMBlock(checkpointed).double()
    model = copy.deepcopy(own)
    assert spade_fast.convert(model).converted == 2
    x, emb = pictures().requires_grad_(), pictures(2, 3, ()).requires_grad_()
    with spade_fast.window_mode(mode):

        def call(module, *inputs):
            return module(*inputs)

        assert_same_calls(call, model, own, x, CONDITIONS[segmap]().requires_grad_(), emb)


@pytest.mark.parametrize("layer", [families.Layer, SPADES["affine group norm"], families.CLADE])
@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.needs("monai")
def test_a_meta_tensor_as_condition(layer, mode):
    from monai.data import MetaTensor

    own = layer().double()
    model = copy.deepcopy(own)
    spade_fast.convert(model)
    calls = [
        lambda module, x, segmap: module(x, MetaTensor(segmap)),
        lambda module, x, segmap: module(MetaTensor(x), segmap),
        lambda module, x, segmap: module(MetaTensor(x), MetaTensor(segmap)),
    ]
    with spade_fast.window_mode(mode):
        for call in calls:
            assert_same_calls(call, model, own, pictures().requires_grad_(), label_map())
            expected, found = (
                type(call(module, pictures(), label_map())) for module in (own, model)
            )
            assert found is expected


@pytest.mark.needs("monai")
def test_monais_layer_keeps_its_own_errors():
    from monai.networks.blocks import spade_norm

    own = spade_norm.SPADE(LABELS, 8, 3, 2, 6).double()
    model = copy.deepcopy(own)
    assert spade_fast.convert(model).converted == 1
    for form in COMMON:
        # The gradient of the bias before an instance norm is rounding only.
        given = pictures().requires_grad_(), label_map()
        assert_same_calls(COMMON[form], model, own, *given, roundings=CANCELLED)


def test_a_converted_layer_broadcasts_a_layout_of_one_image():
    torch.manual_seed(0)
    own = families.Block(SPADES["official, batch"], fout=4).double()
    model = copy.deepcopy(own)
    spade_fast.convert(model)
    layout = spade_fast.SemanticLayout.from_segmap(label_map(1))
    x = pictures().requires_grad_()
    theirs = outcome(by_position, own, x, label_map(1))
    for mode in ("auto", "always", "never"):
        own_model = copy.deepcopy(model)
        with spade_fast.window_mode(mode):
            ours = outcome(lambda module, x: module(x, layout), own_model, x)
        assert_same({key: ours[key] for key in theirs}, theirs)


@pytest.mark.parametrize("norm", ["instance", "batch", "syncbatch", "group"])
@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("batches", [(1, 3), (3, 1), (4, 2), (2, 4), (0, 1), (1, 0)])
def test_batches_of_our_own_layer_broadcast(norm, mode, batches):
    """As in eager PyTorch: only 1 broadcasts to N."""
    ours, theirs = (
        module.SPADE(8, LABELS, 6, norm=norm, num_groups=4).double()
        for module in (spade_fast, reference)
    )
    theirs.load_state_dict(ours.state_dict())
    x = pictures(batches[0]).requires_grad_()
    for segmap in (dense_map(batches[1]), label_map(batches[1])):
        with spade_fast.window_mode(mode):
            found = outcome(by_position, ours, x, segmap)
        expected = outcome(by_position, theirs, x, segmap)
        if isinstance(expected, Exception):
            assert isinstance(found, (ValueError, RuntimeError)), found
        else:
            assert_same(found, expected)


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("fout", [6, 8])
def test_batches_of_our_own_block_broadcast(fout, mode):
    arguments = (8, fout, "spectralspadebatch3x3", LABELS)
    ours, theirs = (
        module.SPADEResnetBlock(*arguments, nhidden=6).double()
        for module in (spade_fast, reference)
    )
    theirs.load_state_dict(ours.state_dict())
    for segmap in (dense_map(1), label_map(1)):
        with spade_fast.window_mode(mode):
            assert_same_calls(by_position, ours, theirs, pictures(3).requires_grad_(), segmap)
