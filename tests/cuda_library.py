"""csrc/cuda compiled for the host: a library whose operators run on the CPU."""

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

from spade_fast.kernels import contract, cuda_numbering, operators, torch_backend

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = os.environ.get("CXXFLAGS", "").split()
NAMESPACE = "spade_fast_cuda_on_host"  # of the library that all tests share
# sanitizers cannot be combined
CAN_WATCH = not any(flag.startswith("-fsanitize") for flag in FLAGS)


def build(folder, namespace, watched=False, numbers=None):
    """Builds and loads the library, and returns it with a backend of its operators.

    folder: of shared_folder. watched: compile the kernels so that their memory accesses are
    watched. numbers: other values for constants of csrc, by name.
    """

    def sources():
        shutil.copytree(CSRC, folder / "csrc")
        for name, value in (numbers or {}).items():
            set_constant(folder / "csrc" / "cuda", name, value)
        return sorted((folder / "csrc" / "cuda").glob("*.c*"))

    library = build_once(folder, sources, namespace, watched)
    operators.declare(namespace, contract.MODULATION | contract.GATHERING)
    operators.declare_numbering(namespace)
    torch.ops.load_library(library)
    own = operators.declared(namespace, contract.MODULATION) | cuda_numbering.of(namespace)
    return ctypes.CDLL(library), replace(torch_backend.BACKEND, name="cuda on host", **own)


def build_one(source, folder):
    """Builds and loads a library with the watched kernels of one file, and without operators."""
    return ctypes.CDLL(build_once(folder, lambda: [source], "", watched=True))


def shared_folder(tmp_path_factory, name):
    """A folder of this run of the tests, the same one in all processes of a parallel run."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name


def build_once(folder, sources, namespace, watched):
    """The library in `folder`, which the first process that comes builds, while others wait."""
    library = folder / "library.so"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not library.exists():
            everything = [TESTS / "cuda_on_host.cpp", *sources()]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(
                    lambda source: compile_one(source, folder, namespace, watched), everything
                )
                link(list(objects), library)
    return library


def set_constant(folder, name, value):
    """Changes the constant in the one file that defines it."""
    count = 0
    for path in folder.iterdir():
        text, found = re.subn(
            rf"(constexpr \w+ {name} =\s+)\w+;", rf"\g<1>{value};", path.read_text()
        )
        path.write_text(text)
        count += found
    if count != 1:
        raise ValueError(f"name is {name}; it should be a constant of {folder}: {count} are found")


def compile_one(source, folder, namespace, watched=False):
    result = folder / f"{source.name}.o"
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-DSPADE_FAST_NAMESPACE={namespace}",
        "-DSPADE_FAST_DISPATCH_KEY=CPU",
        *FLAGS,
        *(f"-isystem{path}" for path in include_paths()),
    ]
    if watched and source.suffix == ".cu":
        flags += ["-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"]
    if source.name != "cuda_on_host.cpp":
        flags += ["-include", TESTS / "cuda_on_host.h"]
    subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", result], check=True)
    return result


def link(objects, library):
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    paths = [f"-L{path}" for path in library_paths()]
    subprocess.run(
        [COMPILER, "-shared", *FLAGS, *objects, "-o", library, *paths, *libraries], check=True
    )
