"""The command itself: its output and errors before it does any work."""

import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import spade_fast
from spade_fast.cli import app, train
from spade_fast.cli.options import as_options

COMMANDS = (
    "info",
    "check",
    "check-data",
    "train",
    "generate",
    "export",
    "evaluate",
    "compare",
    "paint",
)
# `python -m spade_fast` in an interpreter that can report its imports.
AS_COMMAND = "import runpy, sys; sys.orig_argv[1:] = ['-m', 'spade_fast']; "
RUN = """
sys.argv[1:] = {words}
try:
    runpy.run_module("spade_fast", run_name="__main__")
except SystemExit as ended:
    print(ended.code)
"""
SHOW_HEAVY = "print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"


def python(code):
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_help_and_version_import_nothing_heavy():
    calls = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    code = "".join(f"{RUN.format(words=words)}\n{SHOW_HEAVY}\n" for words in calls)
    output = python(AS_COMMAND + code)
    assert re.findall(r"^(\d)\n(\[.*)$", output, re.MULTILINE) == [("0", "[]")] * len(calls)
    version, help, *helps, _ = output.split("0\n[]\n")
    assert version == f"spade_fast {spade_fast.__version__}\n"
    assert all(name in help for name in COMMANDS)
    for name, said in zip(COMMANDS, helps, strict=True):
        assert f"spade-fast {name} [OPTIONS]" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_the_lines_of_a_help_text_follow_the_width_of_the_terminal(name):
    command = typer.main.get_command(app).commands[name]
    first, *others = [" ".join(part.split()) for part in command.help.split("\n\n")]
    wide = {"COLUMNS": "400"}
    for words, parts in (["--help"], [first]), ([name, "--help"], [first, *others]):
        output = CliRunner().invoke(app, words, env=wide).output
        assert all(part.replace("`", "") in output for part in parts)


def test_a_users_module_can_import_the_whole_package(tmp_path):
    (tmp_path / "models.py").write_text("import spade_fast\nprint(spade_fast.convert.__class__)")
    code = f"import os; os.chdir({str(tmp_path)!r}); {AS_COMMAND}"
    code += RUN.format(words=["check", "models:nothing"])
    assert python(code).splitlines()[0] == "<class 'function'>"


def test_the_package_is_complete_inside_the_command():
    show = "import spade_fast; print(sorted(spade_fast.__all__), spade_fast.kernels.__name__, "
    show += "spade_fast.SPADE(2, 3), hasattr(spade_fast, 'nothing')); "
    show += "from spade_fast import *; print(convert.__module__)"
    assert python(AS_COMMAND + show) == python("import sys; " + show)


@pytest.mark.parametrize(
    "words",
    [
        "check-data --labels MISSING --images .",
        "check-data --labels . --images MISSING",
        "check-data --labels . --images . --instances MISSING",
        "train --labels MISSING --images . --out run",
        "train --labels . --images MISSING --out run",
        "train --labels . --images . --instances MISSING --out run",
        "train --labels . --images . --palette MISSING --out run",
        "train --resume MISSING",
        "generate . --labels MISSING --out out",
        "generate . --labels . --instances MISSING --out out",
        "generate . --labels . --style MISSING --out out",
        "evaluate --generated MISSING",
        "evaluate --generated . --photographs MISSING",
        "evaluate --generated . --labels MISSING",
        "evaluate --generated . --labels . --classes MISSING",
        "generate MISSING --labels . --out out",
        "export MISSING --out g.onnx",
        "compare MISSING MISSING",
        "paint MISSING",
    ],
)
def test_missing_paths_are_reported(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words.split()
    before = words[words.index("MISSING") - 1]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "MISSING" in result.output
    name = before if before.startswith("--") else {"compare": "one"}.get(before, "weights")
    assert result.output.startswith(
        f"Error: {name} is MISSING, which does not exist; it should be a"
    )
    assert result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, expected",
    [
        ("num_classes is 3; it should be", "--num-classes is 3; it should be"),
        ("norm_G is 'spade'", "--norm-g is 'spade'"),
        ("labels and images are not given", "--labels and --images are not given"),
        ("steps is 3 and epochs is 2", "--steps is 3 and epochs is 2"),
        ("they make 3: num_classes should be 2", "they make 3: --num-classes should be 2"),
        (
            "it needs labels; labels and steps should be",
            "it needs labels; --labels and --steps should be",
        ),
        ("run/config.yaml: steps is 3", "run/config.yaml: steps is 3"),
        ("labels/a.png is not an image", "labels/a.png is not an image"),
        ("my_labels should be", "my_labels should be"),
        ("images: there are none", "images: there are none"),
    ],
)
def test_messages_name_options(words, expected):
    assert as_options(words, train.command()) == expected


@pytest.mark.parametrize(
    "words",
    [
        "check-data --labels . --images . --convention coco",
        "train --crop-size 40",
        "generate weights.pth --labels . --out out --dtype float8",
        "evaluate --generated . --size large",
    ],
)
def test_each_command_refuses_in_the_words_that_were_typed(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").touch()
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2
    assert re.match(f"Error: {words.split()[-2]} is .*should", result.stderr), result.output
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_whole_name_of_each_option_at_80_columns(name):
    output = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
    options = typer.main.get_command(app).commands[name].params
    names = [word for one in options for word in (*one.opts, *one.secondary_opts)]
    assert all(f" {word} " in output for word in names if word.startswith("--")), output
    assert "…" not in output
