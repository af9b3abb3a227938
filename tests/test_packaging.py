"""From the sources to a wheel: with a compiler, and with one that does not work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
# The finder of an editable install would find what the wheel lacks in the sources.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, spade_fast.reference
x = torch.randn(2, 3, 4, 4)
print(spade_fast.__file__)
ours, theirs = (one.spade_modulate(x, x, x) for one in (spade_fast, spade_fast.reference))
print(torch.allclose(ours, theirs, atol=1e-5))
print(spade_fast.kernels.cpu_backend.library is not None)
print(torch.ops.spade_fast.plane_moments(x).shape)
"""


@pytest.mark.parametrize("compiler", ["works", "fails"])
def test_wheel(compiler, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", "*.so", "build", "*.egg-info", "__pycache__"),
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "SPADE_FAST_BACKEND", "FORCE_CUDA")
    }
    environment["SKIP_CUDA_BUILD"] = "1"  # test_cuda.py has nvcc compile every kernel
    if compiler == "fails":
        environment |= {"CC": "false", "CXX": "false"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = subprocess.run(
        [*pip, "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tmp_path, source],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert (
        "spade_fast._cpu  built" if compiler == "works" else "spade_fast._cpu  NOT BUILT"
    ) in build.stdout + build.stderr
    (wheel,) = tmp_path.glob("spade_fast-*.whl")
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--target", target, wheel], check=True, env=environment
    )
    for name in (
        "py.typed",
        "paint/page.html",
        "paint/page.css",
        "paint/page.js",
        "paint/icon.svg",
    ):
        assert (target / "spade_fast" / name).exists()
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(target)},
    )
    assert run.stdout.split() == [
        str(target / "spade_fast" / "__init__.py"),
        "True",
        str(compiler == "works"),
        *"torch.Size([2, 2, 3])".split(),
    ], run.stderr


IMPORTED = """
import sys, torch
sys.modules["numpy"] = None  # torch imports it where it is installed; now importing it fails
before = set(sys.modules)
import spade_fast
print(*{name.partition(".")[0] for name in sys.modules.keys() - before})
"""


def test_the_import_brings_nothing_but_itself_and_torch():
    run = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True
    )
    found = set(run.stdout.split())
    assert "spade_fast" in found
    assert not found - {"spade_fast", "torch"} - sys.stdlib_module_names
