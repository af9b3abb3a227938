"""Builds the compiled kernels: csrc/cpu into spade_fast._cpu. Everything else about the package is in pyproject.toml.

Where the compiler is missing or fails, the package is installed without its work, and says so here and in `spade-fast info`.
The kernels use PyTorch's stable ABI alone: a library built with one torch serves the later ones.
"""

from pathlib import Path

import pybind11
import torch
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

CPU_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",  # without it a leaky ReLU is not vectorised
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10
]


class BuildAndReport(build_ext):
    """build_ext that says at its end what was built and what was not."""

    def run(self):
        super().run()
        print(f"spade_fast {self.distribution.get_version()} for torch {torch.__version__}")
        for extension in self.extensions:
            built = Path(self.get_ext_fullpath(extension.name)).exists()
            print(f"    {extension.name:16} {'built' if built else 'NOT BUILT: the compiler says why above'}")


ParallelCompile("MAX_JOBS").install()  # as many compilers at once as it says, or as there are cores

setup(
    ext_modules=[
        Extension(
            "spade_fast._cpu",
            sources=sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc/cpu").glob("*.h"))),
            include_dirs=[*include_paths(), pybind11.get_include()],
            library_dirs=library_paths(),
            extra_compile_args=CPU_FLAGS,
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"],
            language="c++",
            optional=True,  # the package works without it
        )
    ],
    cmdclass={"build_ext": BuildAndReport},
)
