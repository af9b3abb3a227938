"""`spade-fast check`: a model of somebody else's, from its name to the table."""

import pytest
import torch
from families import CHANNELS, LABELS, LOOKALIKES, Block, Layer
from typer.testing import CliRunner

from spade_fast import check as checking
from spade_fast.cli import app


def block_and_inputs():
    return Block(Layer, 4), (torch.randn(1, CHANNELS, 8, 8), torch.randn(1, LABELS, 16, 16))


def lookalike_and_inputs():
    return LOOKALIKES["HiFaceGAN"][0](), (
        torch.randn(1, CHANNELS, 8, 8),
        torch.randn(1, LABELS, 16, 16),
    )


def only_a_block():
    return Block(Layer)


def run(function, *options):
    return CliRunner().invoke(
        app, ["check", f"{__name__}:{function}", "--seconds", "0", *options], env={"COLUMNS": "200"}
    )


def test_a_model_is_converted_compared_and_timed():
    result = run("block_and_inputs")
    assert result.exit_code == 0, result.output
    for part in (
        "residual block 8 → 8",
        "output 0",
        "gradient of",
        "forward and backward",
        "times as fast",
    ):
        assert part in result.output


def test_what_is_not_converted_is_said():
    result = run("lookalike_and_inputs")
    assert result.exit_code == 0 and "computes something else" in result.output


def test_a_model_that_differs_is_an_error(monkeypatch):
    convert = checking.convert
    monkeypatch.setattr(checking, "convert", lambda model: convert(model, probe=False))
    result = run("lookalike_and_inputs")
    assert result.exit_code == 1 and "differs" in result.output


@pytest.mark.parametrize(
    "name,message",
    [
        ("nothing", "should be MODULE:FUNCTION"),
        ("no_such_module:f", "cannot be imported"),
        (f"{__name__}:no_such", "cannot be imported"),
        (f"{__name__}:only_a_block", "should return (model, arguments)"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError) as error:
        checking.load(name)
    assert message in str(error.value)
    assert CliRunner().invoke(app, ["check", name]).exit_code == 2


@pytest.mark.parametrize(
    "ours",
    [{}, {"gradient of b": torch.tensor([float("nan")])}, {"gradient of b": torch.tensor([2.0])}],
)
def test_a_gradient_that_is_missing_not_a_number_or_another_is_the_worst(ours):
    truth = {
        "output 0": torch.ones(2),
        "gradient of a": torch.ones(1),
        "gradient of b": torch.ones(1),
    }
    errors = checking.compare(
        truth, {name: truth[name] for name in ("output 0", "gradient of a")} | ours
    )
    assert errors["output 0"] == 0 and errors["gradient of b"] >= 1 and len(errors) == 2


def test_nothing_is_changed():
    model, arguments = block_and_inputs()
    state, types = (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [type(module) for module in model.modules()],
    )
    random = torch.get_rng_state()
    result = checking.check(model, arguments, 0)
    assert result.agrees and result.report.converted == 4
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == types and torch.equal(
        random, torch.get_rng_state()
    )
