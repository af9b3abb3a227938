"""Builds the compiled kernels: csrc/cpu into spade_fast._cpu, and csrc/cuda into spade_fast._cuda
where the installed torch has CUDA and nvcc is found.

Everything else about the package is in pyproject.toml. Ninja recompiles only what changed, headers
included. If a compiler is missing or fails, the package is installed without that library; the
build and `spade-fast info` report it. The kernels use only PyTorch's stable ABI, so that a library
built with one torch works with later ones. Building the CUDA kernels needs no GPU.

Environment variables: CUDA_HOME or CUDA_PATH, the folder of CUDA if nvcc is not on PATH;
TORCH_CUDA_ARCH_LIST, such as "8.0;9.0"; MAX_JOBS, the number of parallel compilers;
SKIP_CUDA_BUILD=1, to leave the CUDA kernels out; FORCE_CUDA=1, to build them even if torch has no
CUDA, and to fail if they cannot be built.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_path, get_platform

import pybind11
import torch
from ninja.ninja_syntax import Writer, escape
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError
from torch.utils.cpp_extension import include_paths, library_paths

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the ABI of torch 2.10
CPU_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",  # leaky ReLU is not vectorised otherwise
    "-fvisibility=hidden",
    # Python's own flags request debug information. CXXFLAGS replaces them, and may request it too.
    *([] if "CXXFLAGS" in os.environ else ["-g0"]),
    STABLE_ABI,
]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI]
TORCH = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu"]
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"


def cpu_commands(compiler):
    """The commands that compile and link the CPU library, without the files."""
    if compiler.compiler_type != "unix":
        raise CompileError(
            f"the flags are for g++, but the compiler type is {compiler.compiler_type}"
        )
    paths = [get_path("include"), pybind11.get_include(), *include_paths()]
    compile_one = [*compiler.compiler_so_cxx, *CPU_FLAGS, *(f"-isystem{path}" for path in paths)]
    return compile_one, [*compiler.linker_so_cxx, "-Wl,--no-as-needed"]


def cuda_commands(compiler):
    """The commands that compile and link the CUDA library with nvcc, without the files."""
    nvcc = find_nvcc()
    if os.environ.get("SKIP_CUDA_BUILD") == "1":
        raise CompileError("SKIP_CUDA_BUILD is 1")
    if torch.version.cuda is None and not FORCE_CUDA:
        raise CompileError("this torch has no CUDA; FORCE_CUDA=1 builds the kernels anyway")
    if nvcc is None:
        raise CompileError("there is no nvcc in CUDA_HOME, CUDA_PATH or PATH")
    paths = [f"-isystem={path}" for path in include_paths()]
    compile_one = [nvcc, *CUDA_FLAGS, *architectures(), *paths]
    return compile_one, [nvcc, "-shared", "-Xlinker=--no-as-needed"]


COMMANDS = {"spade_fast._cpu": cpu_commands, "spade_fast._cuda": cuda_commands}


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = (
        shutil.which("nvcc", path=os.pathsep.join(str(Path(home) / "bin") for home in homes))
        if homes
        else None
    )
    return found or shutil.which("nvcc")


def architectures():
    """nvcc's flags: machine code for each architecture, and PTX of the lowest for all others."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0"
    numbers = sorted({int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", listed)})
    if not numbers or numbers[0] < 80:
        raise CompileError(
            f"TORCH_CUDA_ARCH_LIST is {listed!r}; it should list architectures from 8.0 on, such as"
            " 8.0;9.0"
        )
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*codes, f"-gencode=arch=compute_{numbers[0]},code=compute_{numbers[0]}"]


class BuildAndReport(build_ext):
    """build_ext by ninja, which reports at its end what was built and what was not."""

    def run(self):
        self.reasons = {}
        super().run()
        print(f"spade_fast {self.distribution.get_version()} for torch {torch.__version__}")
        for name in COMMANDS:
            reason = self.reasons.get(name)
            said = f"NOT BUILT: {reason}{self.older(name)}" if reason else "built"
            print(f"    {name:16} {said}")

    def older(self, name):
        """Removes an older library from where this build would have put it, or else that one would
        be installed. Returns words about it, and about those left among the sources.
        """
        target, words = Path(self.get_ext_fullpath(name)), ""
        if target.exists():
            target.unlink()
            words = f"; the older {os.path.relpath(target)} was removed"
        for left in sorted(Path().glob(f"{name.replace('.', '/')}.*")):
            words += f"; the older {left} is left, and may be loaded by a Python that runs here"
        return words

    def build_extensions(self):
        # Kept between builds, unlike the temporary folder of an editable install.
        self.folder = Path("build", f"ninja-{get_platform()}-{sys.implementation.cache_tag}")
        if self.force:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "build.ninja", "w") as file:
            writer = Writer(file)
            writer.variable("builddir", str(self.folder))
            for extension in self.extensions:
                try:
                    commands = COMMANDS[extension.name](self.compiler)
                except CompileError as error:
                    self.reasons[extension.name] = str(error)
                else:
                    self.write_rules(writer, extension, *map(shlex.join, commands))
        super().build_extensions()

    def write_rules(self, writer, extension, compile_one, link):
        name = extension.name.rpartition(".")[2]
        compiled = f"{escape(compile_one)} -MD -MF $out.d -c $in -o $out"
        writer.rule(f"compile{name}", compiled, depfile="$out.d", deps="gcc")
        writer.rule(f"link{name}", f"{escape(link)} $in -o $out {escape(shlex.join(TORCH))}")
        objects = {f"{self.folder / source}.o": source for source in extension.sources}
        for target, source in objects.items():
            writer.build(target, f"compile{name}", source)
        writer.build(self.library(extension), f"link{name}", list(objects))

    def library(self, extension):
        return str(self.folder / self.get_ext_filename(extension.name))

    def build_extension(self, extension):
        """Called by super().build_extensions(), which lets optional ones fail."""
        if extension.name not in self.reasons and not self.run_ninja(self.library(extension)):
            self.reasons[extension.name] = "compilation failed; see the messages above"
        if extension.name in self.reasons:
            raise CompileError(self.reasons[extension.name])
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.library(extension), target)

    def run_ninja(self, target):
        jobs = os.environ.get("MAX_JOBS") or os.cpu_count()
        options = [f"-j{jobs}", "-f", self.folder / "build.ninja", target]
        return (
            subprocess.run([sys.executable, "-m", "ninja", *options], check=False).returncode == 0
        )


class WithoutTests(sdist):
    """An sdist with all of csrc: the extensions' sources and dependencies. It leaves the tests out,
    because they need the benchmarks and their results, and so run from the repository only.
    """

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(
            base_dir, [file for file in files if Path(file).parts[0] != "tests"]
        )


def sources(folder, *patterns):
    return sorted(str(path) for pattern in patterns for path in Path(folder).glob(pattern))


setup(
    ext_modules=[
        Extension(
            "spade_fast._cpu",
            sources=sources("csrc/cpu", "*.cpp"),
            depends=[*sources("csrc/cpu", "*.h"), *sources("csrc/common", "*.h")],
            language="c++",
            optional=True,  # the package works without it
        ),
        Extension(
            "spade_fast._cuda",
            sources=sources("csrc/cuda", "*.cu", "*.cpp"),
            depends=[*sources("csrc/cuda", "*.h"), *sources("csrc/common", "*.h")],
            optional=not FORCE_CUDA,
        ),
    ],
    cmdclass={"build_ext": BuildAndReport, "sdist": WithoutTests},
)
