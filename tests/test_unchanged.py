"""Facts about a module are determined again when anything in the module changes."""

import argparse
import copy
import dataclasses
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn

from spade_fast import SPADE
from spade_fast.nn.parts import Known
from spade_fast.nn.unchanged import until_changed


class Mine(nn.Conv2d):
    pass


@dataclasses.dataclass
class Settings:
    numbers: object
    hidden: float = dataclasses.field(default=0.0, compare=False)


def layer():
    spade = SPADE(4, 3, nhidden=5)
    spade.mlp_shared[1].settings = Settings(np.zeros(2))
    spade.listed, spade.options = [1, [2]], argparse.Namespace(flags={"a": (1, [2])})
    spade.mlp_gamma.written = [torch.zeros(1)]
    return spade.eval()


def answers(spade):
    """A list that grows with each new determination, and a function that triggers one if needed."""
    asked = []
    return asked, lambda: until_changed(spade, lambda module: asked.append(module) or len(asked))


CHANGES = {
    "a mode": lambda spade: spade.mlp_beta.train(),
    "a part": lambda spade: setattr(spade, "mlp_gamma", nn.Conv2d(5, 4, 3, padding=1)),
    "a part of a part": lambda spade: spade.mlp_shared.append(nn.ReLU()),
    "a part that is gone": lambda spade: delattr(spade, "mlp_beta"),
    "a class": lambda spade: setattr(spade.mlp_gamma, "__class__", Mine),
    "its class": lambda spade: setattr(spade, "__class__", type("Other", (SPADE,), {})),
    "a setting": lambda spade: setattr(spade.mlp_gamma, "padding", (2, 2)),
    "a new setting": lambda spade: setattr(spade, "new", None),
    "its own setting": lambda spade: setattr(spade, "norm_nc", 5),
    "a setting's name": lambda spade: vars(spade).update(other=vars(spade).pop("norm_nc")),
    "inside a list": lambda spade: spade.listed[1].append(3),
    "inside a namespace": lambda spade: spade.options.flags.update(a=2),
    "deep inside a namespace": lambda spade: spade.options.flags["a"][1].append(3),
    "inside an object": lambda spade: setattr(spade.mlp_shared[1].settings, "hidden", 1.0),
    "inside an array in an object": lambda spade: spade.mlp_shared[1].settings.numbers.fill(1),
    "a weight": lambda spade: setattr(
        spade.mlp_beta, "weight", nn.Parameter(torch.ones(4, 5, 3, 3))
    ),
    "a weight that is gone": lambda spade: setattr(spade.mlp_beta, "bias", None),
    "a buffer": lambda spade: spade.mlp_beta.register_buffer("own", torch.zeros(1)),
    "a hook": lambda spade: spade.mlp_beta.register_forward_hook(print),
    "its own hook": lambda spade: spade.register_forward_pre_hook(print),
    "a forward": lambda spade: setattr(spade.mlp_beta, "forward", print),
    "all attributes": lambda spade: setattr(spade.mlp_beta, "__dict__", dict(vars(spade.mlp_beta))),
    "spectral norm": lambda spade: nn.utils.spectral_norm(spade.mlp_gamma),
    "a parametrization": lambda spade: nn.utils.parametrizations.weight_norm(spade.mlp_gamma),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_asks_again(change):
    spade = layer()
    del spade.mlp_gamma.written
    _, ask = answers(spade)
    assert [ask(), ask()] == [1, 1]
    CHANGES[change](spade)
    assert [ask(), ask()] == [2, 2]


def test_an_equal_setting_changes_nothing():
    spade = layer()
    del spade.mlp_gamma.written
    _, ask = answers(spade)
    assert ask() == 1
    spade.mlp_gamma.groups, spade.mlp_beta.padding = True, (1, 1)
    assert ask() == 1


def test_an_object_replaced_by_one_that_calls_itself_equal_asks_again():
    spade = layer()
    del spade.mlp_gamma.written
    _, ask = answers(spade)
    assert [ask(), ask()] == [1, 1]
    spade.mlp_shared[1].settings = Settings(spade.mlp_shared[1].settings.numbers)
    assert [ask(), ask()] == [2, 2]
    spade.mlp_shared[1].settings.hidden = 1.0
    assert [ask(), ask()] == [3, 3]


@pytest.mark.parametrize("shape", [(), (1,), (2,), (0,)])
def test_a_tensor_replaced_by_an_equal_one_asks_again(shape):
    spade = layer()
    del spade.mlp_gamma.written
    conv = spade.mlp_beta
    conv.own, conv.number = torch.ones(shape), 1.0
    conv.register_parameter("scale", nn.Parameter(torch.ones(shape)))
    _, ask = answers(spade)
    assert [ask(), ask()] == [1, 1]
    conv.own = torch.ones(shape)
    assert [ask(), ask()] == [2, 2]
    conv._parameters = dict(conv._parameters)
    assert [ask(), ask()] == [3, 3]
    conv.scale = nn.Parameter(torch.ones(shape))
    assert [ask(), ask()] == [4, 4]


def test_values_that_cannot_be_compared_ask_again():
    spade = layer()
    del spade.mlp_gamma.written
    spade.mlp_beta.own = np.zeros(2)
    _, ask = answers(spade)
    assert [ask(), ask()] == [1, 1]
    spade.mlp_beta.own = np.zeros(2)
    assert [ask(), ask()] == [2, 2]


def test_a_class_whose_forward_is_replaced(monkeypatch):
    spade = layer()
    del spade.mlp_gamma.written
    spade.mlp_gamma.__class__ = Mine
    _, ask = answers(spade)
    assert [ask(), ask()] == [1, 1]
    monkeypatch.setattr(Mine, "forward", lambda self, x: x)
    assert ask() == 2


def test_attributes_with_tensors_ask_each_time():
    _, ask = answers(layer())
    assert [ask(), ask(), ask()] == [1, 2, 3]


def test_a_global_hook_asks_each_time():
    spade = layer()
    del spade.mlp_gamma.written
    _, ask = answers(spade)
    ask()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert [ask(), ask()] == [2, 3]
    finally:
        handle.remove()
    assert ask() == 1


def test_copies_and_replicas_have_their_own_facts():
    spade = SPADE(4, 3, nhidden=5).eval()
    found = Known.of(spade)
    assert Known.of(spade) is found
    replica = spade._replicate_for_data_parallel()
    for other in (
        copy.deepcopy(spade),
        pickle.loads(pickle.dumps(spade)),
        copy.copy(spade),
        replica,
    ):
        assert Known.of(other).parts is not found.parts
        assert Known.of(other).parts.gamma is other.mlp_gamma
        other.mlp_gamma.weight.data_ptr()
        assert Known.of(spade) is found
    assert list(spade.state_dict()) == list(SPADE(4, 3, nhidden=5).state_dict())


def test_a_module_without_references_is_freed_at_once():
    spade = SPADE(4, 3, nhidden=5)
    Known.of(spade)
    gone = weakref.ref(spade), weakref.ref(spade.mlp_gamma.weight)
    del spade
    assert [ref() for ref in gone] == [None, None]


def test_threads_that_ask_during_a_change():
    spade, wrong = SPADE(4, 3, nhidden=5).eval(), []
    parts = [nn.Conv2d(5, 4, 3, padding=1) for _ in range(2)]

    def ask():
        for _ in range(200):
            if Known.of(spade).parts.gamma not in parts:
                wrong.append(True)

    spade.mlp_gamma = parts[0]
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(200):
        spade.mlp_gamma = parts[number % 2]
        assert Known.of(spade).parts.gamma is parts[number % 2]
    for thread in threads:
        thread.join()
    assert not wrong
