"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_convert_prints_the_table_that_is_shown():
    pytest.importorskip("monai")
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
