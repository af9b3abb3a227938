"""Builds the compiled kernels: csrc/cpu into spade_fast._cpu, and csrc/cuda into spade_fast._cuda
where nvcc is found.

Everything else about the package is in pyproject.toml. Where a compiler is missing or fails, the
package is installed without its work, and says so here and in `spade-fast info`. The kernels use
PyTorch's stable ABI alone: a library built with one torch serves the later ones, and the CUDA
kernels are built without a GPU, beside a torch for the CPU too.

Environment variables: CUDA_HOME or CUDA_PATH, where nvcc is if not on PATH; TORCH_CUDA_ARCH_LIST,
such as "8.0;9.0"; MAX_JOBS, compilers at once; SKIP_CUDA_BUILD=1; FORCE_CUDA=1, for an error where
the CUDA kernels cannot be built.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group
from torch.utils.cpp_extension import include_paths, library_paths

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # that of torch 2.10
CPU_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",  # without it a leaky ReLU is not vectorised
    "-fvisibility=hidden",
    STABLE_ABI,
]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI]


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = (
        shutil.which("nvcc", path=os.pathsep.join(str(Path(home) / "bin") for home in homes))
        if homes
        else None
    )
    return found or shutil.which("nvcc")


def architectures():
    """nvcc's flags: machine code for each architecture, and PTX of the lowest for what has none."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0"
    numbers = sorted({int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", listed)})
    if not numbers or numbers[0] < 80:
        raise CompileError(
            f"TORCH_CUDA_ARCH_LIST is {listed!r}, it should have numbers from 8.0 on, such as"
            " 8.0;9.0"
        )
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*codes, f"-gencode=arch=compute_{numbers[0]},code=compute_{numbers[0]}"]


class BuildAndReport(build_ext):
    """build_ext that knows nvcc, and says at its end what was built and what was not."""

    def run(self):
        self.reasons = {}
        super().run()
        print(f"spade_fast {self.distribution.get_version()} for torch {torch.__version__}")
        for extension in self.extensions:
            outdated = newer_group(
                extension.depends + extension.sources,
                self.get_ext_fullpath(extension.name),
                "newer",
            )
            built = not outdated and extension.name not in self.reasons
            reason = self.reasons.get(extension.name, "the compiler says why above")
            print(f"    {extension.name:16} {'built' if built else f'NOT BUILT: {reason}'}")

    def build_extension(self, extension):
        if extension.name != "spade_fast._cuda":
            return super().build_extension(extension)
        try:
            self.build_cuda(extension)
        except CompileError as error:
            self.reasons[extension.name] = str(error)
            raise

    def build_cuda(self, extension):
        nvcc, library = find_nvcc(), Path(self.get_ext_fullpath(extension.name))
        if os.environ.get("SKIP_CUDA_BUILD") == "1":
            raise CompileError("SKIP_CUDA_BUILD is 1")
        if nvcc is None:
            raise CompileError("there is no nvcc in CUDA_HOME, CUDA_PATH or PATH")
        if not self.force and not newer_group(
            extension.depends + extension.sources, str(library), "newer"
        ):
            return
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        flags = [*CUDA_FLAGS, *architectures(), *(f"-isystem={path}" for path in include_paths())]

        def compile_one(source):
            target = str(folder / f"{Path(source).name}.o")
            spawn([nvcc, *flags, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            objects = list(pool.map(compile_one, extension.sources))
        paths = [f"-L{path}" for path in library_paths()]
        spawn(
            [
                nvcc,
                "-shared",
                *objects,
                "-o",
                str(library),
                *paths,
                "-Xlinker=--no-as-needed",
                "-ltorch",
                "-ltorch_cpu",
            ]
        )


def spawn(command):
    print(" ".join(command))
    if subprocess.run(command, check=False).returncode != 0:
        raise CompileError("nvcc says why above")


ParallelCompile("MAX_JOBS").install()  # as many compilers at once as it says, or as there are cores


def sources(folder, *patterns):
    return sorted(str(path) for pattern in patterns for path in Path(folder).glob(pattern))


setup(
    ext_modules=[
        Extension(
            "spade_fast._cpu",
            sources=sources("csrc/cpu", "*.cpp"),
            depends=[*sources("csrc/cpu", "*.h"), *sources("csrc/common", "*.h")],
            include_dirs=[pybind11.get_include(), *include_paths()],
            library_dirs=library_paths(),
            extra_compile_args=CPU_FLAGS,
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"],
            language="c++",
            optional=True,  # the package works without it
        ),
        Extension(
            "spade_fast._cuda",
            sources=sources("csrc/cuda", "*.cu", "*.cpp"),
            depends=[*sources("csrc/cuda", "*.h"), *sources("csrc/common", "*.h")],
            optional=os.environ.get("FORCE_CUDA") != "1",
        ),
    ],
    cmdclass={"build_ext": BuildAndReport},
)
