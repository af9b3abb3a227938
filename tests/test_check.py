"""`spade-fast check`: another project's model, from its name to the table."""

from collections import namedtuple

import pytest
import torch
from families import CHANNELS, FUSED, LABELS, LOOKALIKES, Block, Layer
from typer.testing import CliRunner

import spade_fast
from spade_fast import SemanticLayout
from spade_fast import check as checking
from spade_fast.cli import app, table_of


def block_and_inputs():
    return Block(Layer, 4), (torch.randn(1, CHANNELS, 8, 8), torch.randn(1, LABELS, 16, 16))


def lookalike_and_inputs():
    return LOOKALIKES["subtracts"][0](), x_and_segmap()


def bilinear_and_inputs():
    return FUSED["bilinear"](), x_and_segmap()


def x_and_segmap():
    return torch.randn(1, CHANNELS, 8, 8), torch.randn(1, LABELS, 16, 16)


def only_a_block():
    return Block(Layer)


def no_spade_and_inputs():
    return torch.nn.Conv2d(3, 3, 3), (torch.randn(1, 3, 8, 8),)


def label_map_and_inputs():
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, 20:40, 10:30] = 1
    segmap = SemanticLayout.from_labels(labels, LABELS).to_segmap()
    return Layer(), (torch.randn(1, CHANNELS, 64, 64), segmap)


def layer_and_inputs():
    return Layer(), (torch.randn(1, CHANNELS, 8, 8), torch.randn(1, LABELS, 16, 16))


def converted_and_inputs():
    model, arguments = layer_and_inputs()
    spade_fast.convert(model)
    return model, arguments


def our_own_and_inputs():
    arguments = torch.randn(1, CHANNELS, 8, 8), torch.randn(1, LABELS, 16, 16)
    return spade_fast.SPADE(CHANNELS, LABELS), arguments


def one_argument_too_few():
    return Layer(), (torch.randn(1, CHANNELS, 8, 8),)


def channels_that_do_not_fit():
    return Layer(), (torch.randn(1, CHANNELS, 8, 8), torch.randn(1, LABELS + 1, 16, 16))


def scripted():
    return torch.jit.trace(*no_spade_and_inputs()), (torch.randn(1, 3, 8, 8),)


def raises():
    raise KeyError("theirs")


def leaves():
    raise SystemExit(0)


def run(function, *options, columns=200):
    return CliRunner().invoke(
        app,
        ["check", f"{__name__}:{function}", "--seconds", "0", *options],
        env={"COLUMNS": str(columns)},
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
        "outputs, gradients and buffers of its own class",
        "relative to the norm of the model's own result, and at most 1e-08 counts as agreement.",
        "Only the worst gradient is shown.",
        "counts the calls of SPADEs that compute γ and β once per distinct window",
    ):
        assert part in " ".join(result.output.split())


def test_modules_that_are_not_converted_are_reported():
    result = run("lookalike_and_inputs")
    assert result.exit_code == 1 and "does not return" in result.output
    assert "Nothing was converted" in result.output and "Time of a call" not in result.output


@pytest.mark.parametrize("function", ["no_spade_and_inputs", "our_own_and_inputs"])
def test_a_model_is_not_compared_with_itself(function):
    result = run(function)
    assert result.exit_code == 1 and "Nothing was converted" in result.output
    assert "Time of a call" not in result.output


def test_a_converted_model_is_compared_with_its_original_class(monkeypatch):
    kinds, outcome = [], checking.outcome
    monkeypatch.setattr(
        checking,
        "outcome",
        lambda model, arguments: kinds.append(type(model)) or outcome(model, arguments),
    )
    model, arguments = converted_and_inputs()
    result = checking.check(model, arguments, 0)
    assert result.agrees and kinds == [Layer, type(model)] and type(model) is not Layer


@pytest.mark.parametrize(
    "function,way,other",
    [
        ("layer_and_inputs", "pixels: 1", "windows:"),
        ("label_map_and_inputs", "windows: 1", "pixels:"),
    ],
)
def test_windows_or_pixels_are_reported_with_the_times(function, way, other):
    result = run(function)
    assert result.exit_code == 0, result.output
    assert result.output.count(way) == 2 and other not in result.output
    assert ("random numbers have no windows" in result.output) == (way == "pixels: 1")


@pytest.mark.parametrize(
    "function,words,frames",
    [
        ("raises", "KeyError: 'theirs'", ["in raises"]),
        ("leaves", "SystemExit: 0", ["in leaves"]),
        ("one_argument_too_few", "missing 1 required positional argument: 'segmap'", []),
        ("channels_that_do_not_fit", "RuntimeError: ", ["in forward"]),
        ("scripted", "model is scripted", []),
    ],
)
def test_failures_of_the_users_code_are_shown_as_such(function, words, frames):
    result = run(function)
    assert result.exit_code == 1 and words in result.output, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "spade_fast/check.py" not in result.output
    found = [line for line in result.output.splitlines() if line.startswith("  File ")]
    assert [line.split(", ")[-1] for line in found[:1]] == frames
    assert all(__file__ in line or "families" in line for line in found[:1])


@pytest.mark.parametrize(
    "source,words",
    [
        ("import no_such_thing", "No module named 'no_such_thing'"),
        ("from torch import no_such_name", "ImportError: cannot import name 'no_such_name'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_a_users_module_that_fails(source, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = "theirs" + "".join(filter(str.isalnum, source))
    (tmp_path / f"{name}.py").write_text(source)
    result = CliRunner().invoke(app, ["check", f"{name}:f"])
    assert result.exit_code == 1 and words in result.output, result.output
    assert f"{name} cannot be imported:" in result.output and f"{name}.py" in result.output
    assert "importlib" not in result.output and "spade_fast/" not in result.output


def test_tables_fit_in_80_columns():
    for result in (
        run("layer_and_inputs", columns=80),
        CliRunner().invoke(app, ["info"], env={"COLUMNS": "80"}),
    ):
        text = result.output
        text = text[text.index("Agreement") :] if "Agreement" in text else text
        assert result.exit_code == 0 and "…" not in text
        assert max(map(len, text.splitlines())) <= 80


def test_a_long_name_continues_on_the_next_line():
    table, name = table_of("what", "error"), "gradient." * 20
    table.add_row(name, "1.0")
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    cells = [line.split("│")[1].strip() for line in capture.get().splitlines() if "│" in line]
    assert "".join(cells) == name


def test_arguments_in_dictionaries_and_named_tuples_are_converted_to_float64():
    Pair = namedtuple("Pair", "x number")
    found = checking._double(({"x": torch.ones(1)}, Pair(torch.ones(1), 3), [torch.ones(1).int()]))
    assert found[0]["x"].dtype == found[1].x.dtype == torch.float64 and found[1].number == 3
    assert found[2][0].dtype == torch.int32


def test_a_model_that_differs_is_an_error(monkeypatch):
    convert = checking.convert
    monkeypatch.setattr(checking, "convert", lambda model: convert(model, probe=False))
    result = run("bilinear_and_inputs")
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
def test_a_gradient_that_is_missing_nan_or_wrong_has_the_worst_error(ours):
    truth = {
        "output 0": torch.ones(2),
        "gradient of a": torch.ones(1),
        "gradient of b": torch.ones(1),
    }
    errors = checking.compare(
        truth, {name: truth[name] for name in ("output 0", "gradient of a")} | ours
    )
    assert errors["output 0"] == 0 and errors["gradient of b"] >= 1 and len(errors) == 2


def test_the_users_model_is_unchanged():
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
