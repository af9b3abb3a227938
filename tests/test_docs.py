"""README and docs are true: every block of Python and every command runs."""

import contextlib
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import liveportrait
import pytest
import torch
import typer
from drawn_data import draw_folder
from typer.testing import CliRunner

from benchmarks import summary
from benchmarks.cli import app as benchmarks
from spade_fast import ConvEncoder, SPADEGenerator, checkpoint
from spade_fast.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NETWORKS = """
import torch
from torch import nn
from spade_fast import reference

class Colour(nn.Module):
    def forward(self, images):
        return images.double().mean((2, 3))

class Dark(nn.Module):
    def forward(self, images):
        return images.long().sum(1) % 182

def features():
    return Colour()

def segmentation():
    return Dark()

def generator_and_inputs():
    labels = torch.eye(5)[torch.randint(5, (1, 8, 8))].movedim(-1, 1)
    return reference.SPADE(4, 5, nhidden=4), (torch.randn(1, 4, 8, 8), labels)
"""
# Makes a command take a second: the last of several equal options wins.
SMALLER = {
    "train": "--crop-size 64 --ngf 2 --ndf 2 --nhidden 2 --workers 0 --batch 1 --steps 1",
    "train --resume": "--steps 2",
}
SERVES = {"paint"}  # runs until it is stopped; see tests/test_paint.py
# Commands that CI or contributors run.
OTHERS = (
    "pip",
    "python -m pytest",
    "pre-commit",
    "flags=",
    "CFLAGS=",
    "export LD_PRELOAD",
    "ASAN_OPTIONS",
    "unset LD_PRELOAD",
)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that the pages use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    draw_folder("data", 3)
    shutil.copytree("data/img", "images")
    Path("my_project").mkdir()
    Path("my_project/models.py").write_text(NETWORKS)
    Path("my_networks.py").write_text(NETWORKS)
    small = {"crop_size": 32, "ngf": 2, "nhidden": 2}
    checkpoint.write(SPADEGenerator.official(184, **small), "latest_net_G.pth")
    checkpoint.write(ConvEncoder(ndf=2), "latest_net_E.pth")
    modules = liveportrait.check_out(tmp_path)
    yield
    for module in ("my_networks", "my_project", "my_project.models", *modules):
        sys.modules.pop(module, None)


def pages(**needed):
    """All pages, marked with the packages that they need."""
    return [
        pytest.param(page, marks=pytest.mark.needs(*needed[page.stem]), id=page.stem)
        if page.stem in needed
        else pytest.param(page, id=page.stem)
        for page in PAGES
    ]


@pytest.mark.parametrize(
    "page",
    pages(
        convert=["monai", "diffusers"],
        recipes=["monai", "einops", "onnx", "onnxscript", "onnxruntime"],
    ),
)
def test_python(page, folder):
    code = blocks(page, "python")
    found, names = io.StringIO(), {}
    with contextlib.redirect_stdout(found):
        for block in code:
            torch.manual_seed(0)
            exec(compile(block, page.name, "exec"), names)
    for shown in blocks(page, "text"):
        assert shown in found.getvalue()


@pytest.mark.parametrize(
    "page",
    pages(README=["torchmetrics"], evaluate=["torchmetrics"], networks=["onnx", "onnxscript"]),
)
def test_commands(page, folder):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    if page.stem == "generate":
        run_command(shlex.split(TRAIN)[1:])  # as the page on training does
    for line in lines:
        line = line.partition("  #")[0].strip()
        if line.startswith("spade-fast "):
            run_command(shlex.split(line)[1:])
        elif line.startswith("python -m benchmarks "):
            parse(benchmarks, shlex.split(line)[3:])
        else:
            assert line.startswith(OTHERS), f"{page.name} has {line!r}, which nothing runs"


TRAIN = (
    "spade-fast train --preset small --labels data/label --images data/img --instances data/inst"
    " --convention coco_stuff --no-perceptual --out run"
)


def run_command(words):
    name = words[0]
    if name in SERVES:
        return parse(app, words)
    if name == "compare":
        shutil.copy(*words[1:])
    key = "train --resume" if "--resume" in words and name == "train" else name
    result = CliRunner().invoke(app, [*words, *SMALLER.get(key, "").split()])
    assert result.exit_code == 0, result.output
    return None


def parse(typer_app, words):
    """Raises if the command does not have these options."""
    group = typer.main.get_command(typer_app)
    name, command, rest = group.resolve_command(typer.Context(group), list(words))
    command.make_context(name, rest)


def test_the_table_of_measurements():
    assert summary.summary() in (ROOT / "docs/pages/benchmarks.md").read_text()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links {target}"
