"""The package as a kernel of the Hugging Face Hub: PyPI's `kernels` reads its build.toml, and the
layout in docs/pages/hub.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("kernels")

ROOT = Path(__file__).parent.parent
PROGRAM = """
import importlib, sys
from pathlib import Path
import torch
from kernels import get_local_kernel

kernel = get_local_kernel(Path("."))
reference = importlib.import_module(f"{kernel.__name__}.reference")
x, gamma, beta = torch.randn(3, 2, 4, 5, 6)
for backend in ("triton", "torch"):
    with kernel.use_backend(backend):
        y = kernel.spade_modulate(x, gamma, beta, activation="leaky_relu")
    expected = reference.spade_modulate(x, gamma, beta, activation="leaky_relu")
    print((y - expected).abs().max() < 1e-5)
print("spade_fast" in sys.modules, Path(kernel.__file__).parent)
"""


def copy_package(folder):
    shutil.copytree(
        ROOT / "spade_fast", folder, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )


def test_build_toml_is_read(tmp_path):
    from kernels._rust import Backend, Build

    shutil.copy(ROOT / "docs/kernel/build.toml", tmp_path)
    copy_package(tmp_path / "torch-ext" / "spade_fast")
    assert Build.open(tmp_path).general.backends == [Backend.CPU, Backend.CUDA]
    text = (tmp_path / "build.toml").read_text()
    (tmp_path / "build.toml").write_text(text.replace("license", "licence"))
    with pytest.raises(ValueError, match="licence"):
        Build.open(tmp_path)


def test_the_layout_of_the_hub_is_loaded(tmp_path):
    for backend in ("cpu", "cuda"):
        variant = tmp_path / "build" / f"torch-{backend}"
        copy_package(variant)
        metadata = {
            "id": f"spade_fast_{backend}_for_the_test",
            "name": "spade-fast",
            "version": 1,
            "license": "BSD-3-Clause",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata))
    environment = {
        name: value for name, value in os.environ.items() if name != "SPADE_FAST_BACKEND"
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment | {"TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    *agree, last = run.stdout.splitlines()
    assert agree == ["tensor(True)"] * 2
    assert last.split() == ["False", str(tmp_path / "build/torch-cpu")]
