"""What the README shows is what happens."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from drawn_data import draw_folder
from typer.testing import CliRunner

from spade_fast import checkpoint
from spade_fast.cli import app
from spade_fast.data import read_labels, read_photograph
from spade_fast.training import Config

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.needs("monai")
def test_convert_prints_the_table_that_is_shown():
    code, printed = re.search(
        r"## Other people's models.*?```python\n(.*?)```\s+```text\n(.*?)```", README, re.DOTALL
    ).groups()
    torch.manual_seed(0)
    found = io.StringIO()
    with contextlib.redirect_stdout(found):
        exec(code, {})
    assert found.getvalue() == printed


def test_the_generators_over_time_and_of_a_volume_run():
    names = {}
    exec(re.search(r"Time is a dimension.*?```python\n(.*?)```", README, re.DOTALL).group(1), names)
    assert names["returns"].shape == (100, 1, 128) and names["volume"].shape == (1, 1, 16, 32, 32)


def test_the_training_section_runs_as_written(tmp_path, monkeypatch):
    """On drawn scenes, with fewer steps and channels."""
    section = re.search(r"## Train\n(.*?)\n## ", README, re.DOTALL).group(1)
    commands, code = re.search(
        r"```bash\n(.*?)```.*?```python\n(.*?)```", section, re.DOTALL
    ).groups()
    draw_folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    check, train, resume = commands.splitlines()
    few = {"10000": "1", "12000": "2"}
    for command in (check, f"{train} --ngf 2 --ndf 2 --nhidden 2 --workers 0", resume):
        words = [few.get(word, word) for word in shlex.split(command)[1:]]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "sheet.png").is_file()
    assert checkpoint.load(tmp_path / "run" / "generator.safetensors").label_nc == 184
    settings = Config.load(tmp_path / "run" / "config.yaml")
    labels, photographs = (
        sorted((tmp_path / "data" / kind).iterdir()) for kind in ("label", "img")
    )
    pairs = [(read_labels(one), read_photograph(other)) for one, other in zip(labels, photographs)]
    names = {"pairs": pairs}
    exec(code, names)
    assert settings.crop_size == 128 and names["step"].number == 3
