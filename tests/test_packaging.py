"""From the sources to a wheel, with a compiler that works and one that does not; what a second
build compiles again, and what the import loads.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("PYTHONPATH", "SPADE_FAST_BACKEND", "FORCE_CUDA", "SKIP_CUDA_BUILD")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OURS}
MAKE = "from setuptools import build_meta; build_meta.build_{}('dist')"
NO_COMPILER = {"SKIP_CUDA_BUILD": "1", "CC": "false", "CXX": "false"}
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
IMPORTED = """
import sys, torch
sys.modules["numpy"] = None  # torch imports it where it is installed; now importing it fails
before = set(sys.modules)
import spade_fast
print(*{name.partition(".")[0] for name in sys.modules.keys() - before})
"""


# In torch 2.11, the oldest that the package takes. TORCH_TARGET_VERSION hides newer functions from
# the compiler, but not newer macros, with which an older torch does not build.
MACROS = {
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_TORCH_CHECK",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources."""
    folder = tmp_path_factory.mktemp("sources") / "source"
    left = shutil.ignore_patterns(".git", "*.so", "build", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, folder, ignore=left)


@pytest.fixture(scope="module")
def sdist(source):
    subprocess.run(
        [sys.executable, "-c", MAKE.format("sdist")], cwd=source, check=True, env=ENVIRONMENT
    )
    (found,) = source.glob("dist/*.tar.gz")
    return found


def test_the_oldest_torch_has_the_macros():
    texts = [path.read_text() for path in (ROOT / "csrc").rglob("*.*")]
    assert set(re.findall(r"\b(?:STABLE_|STD_)?TORCH_[A-Z_]+\b", "".join(texts))) == MACROS


def test_the_sdist_has_all_sources_and_no_tests(sdist):
    with tarfile.open(sdist) as archive:
        found = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    folders = (ROOT / "csrc", ROOT / "spade_fast")
    sources = {
        path.relative_to(ROOT)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    assert sources and not sources - found
    assert not [path for path in found if path.parts[:1] in (("tests",), ("benchmarks",))]


def test_an_editable_install_uses_a_path_that_type_checkers_read(source):
    subprocess.run(
        [sys.executable, "-c", MAKE.format("editable")],
        cwd=source,
        check=True,
        env=ENVIRONMENT | NO_COMPILER,
    )
    (wheel,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [archive.read(name).decode().strip() for name in files] == [str(source)]
    assert files[0].endswith(".pth")


def quick_compiler(folder):
    """Variables for a compiler that optimises less, whatever it is told: what it makes is right and
    slow, as is enough for a wheel that is only imported.
    """
    program = folder / "compiler"
    program.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    program.chmod(0o755)
    return {"CXX": str(program)}


@pytest.mark.full
@pytest.mark.parametrize("compiler", ["works", "fails"])
def test_wheel(compiler, sdist, tmp_path):
    target = tmp_path / "target"
    environment = ENVIRONMENT | {"SKIP_CUDA_BUILD": "1"}  # test_cuda.py compiles every kernel
    environment |= NO_COMPILER if compiler == "fails" else quick_compiler(tmp_path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = subprocess.run(
        [*pip, "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist],
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
        *["torch.Size([2,", "2,", "3])"],
    ], run.stderr


@pytest.fixture
def small(tmp_path):
    """A folder with setup.py and two sources for the CPU, one of which includes a header."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "spade_fast").mkdir()
    for folder in ("cpu", "cuda", "common"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    cpu = tmp_path / "csrc" / "cpu"
    (cpu / "with.cpp").write_text('#include "header.h"\nint one = NUMBER;\n')
    (cpu / "without.cpp").write_text("int other = 2;\n")
    (cpu / "header.h").write_text("#define NUMBER 1\n")
    return tmp_path


def build(folder, *where, **variables):
    """Builds, by default in place. Returns the exit code and the output."""
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *(where or ["--inplace"])],
        cwd=folder,
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_only_what_changed_is_compiled(small):
    def compiled(said):
        return [name for name in ("with.cpp", "without.cpp") if f"-c csrc/cpu/{name} " in said]

    assert compiled(build(small)[1]) == ["with.cpp", "without.cpp"]
    (library,) = small.glob("spade_fast/_cpu.*")
    before = library.read_bytes()
    code, said = build(small)
    assert code == 0 and not compiled(said) and "spade_fast._cpu  built" in said
    (small / "csrc" / "cpu" / "header.h").write_text("#define NUMBER 3\n")
    assert compiled(build(small)[1]) == ["with.cpp"]
    assert library.read_bytes() != before
    (small / "csrc" / "cpu" / "with.cpp").write_text("wrong\n")
    code, said = build(small)
    assert code == 0 and "spade_fast._cpu  NOT BUILT: compilation failed" in said
    assert not library.exists()


def test_cuda_kernels_are_built_if_possible_or_forced(small):
    import torch

    if torch.version.cuda is None:
        assert "spade_fast._cuda NOT BUILT: this torch has no CUDA; FORCE_CUDA=1" in build(small)[1]
    code, said = build(small, FORCE_CUDA="1", SKIP_CUDA_BUILD="1")
    assert code != 0 and "SKIP_CUDA_BUILD is 1" in said
    code, said = build(small, FORCE_CUDA="1", CUDA_HOME="/nowhere", PATH="/nowhere")
    assert code != 0 and "there is no nvcc in CUDA_HOME, CUDA_PATH or PATH" in said
    code, said = build(small, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="7.5")
    assert code != 0
    if shutil.which("nvcc"):
        assert "TORCH_CUDA_ARCH_LIST is '7.5'; it should list architectures from 8.0 on" in said


def test_older_libraries_are_reported(small):
    name = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    among_sources = small / "spade_fast" / name
    installed = small / "lib" / "spade_fast" / name
    installed.parent.mkdir(parents=True)
    among_sources.touch(), installed.touch()
    (small / "spade_fast" / "_cuda.older.so").touch()
    said = build(small, "--build-lib", "lib", **NO_COMPILER)[1]
    removed, left = (
        f"the older lib/spade_fast/{name} was removed",
        f"the older spade_fast/{name} is left",
    )
    assert "spade_fast._cpu  NOT BUILT: " in said and removed in said and left in said
    assert "the older spade_fast/_cuda.older.so is left, and may be loaded" in said
    assert not installed.exists() and among_sources.exists()
    said = build(small, **NO_COMPILER)[1]
    assert f"the older spade_fast/{name} was removed" in said and f"{name} is left" not in said
    assert not among_sources.exists()


def test_the_import_loads_only_itself_and_torch():
    run = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True
    )
    found = set(run.stdout.split())
    assert "spade_fast" in found
    assert not found - {"spade_fast", "torch"} - sys.stdlib_module_names
