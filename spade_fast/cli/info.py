"""The command `spade-fast info`."""

import platform
from importlib import metadata

from rich.console import Console
from rich.markup import escape

from .. import __version__
from .tables import table_of


def info() -> None:
    """Print which backends run here, why the others do not, and what machine this is."""
    from ..kernels import backends

    console = Console()
    table = table_of("backend", "runs", "why not", title="Backends, best first")
    for status in backends():
        table.add_row(status.name, "yes" if status.runs else "no", escape(status.reason))
    console.print(table)
    table = table_of("", "", title="This machine", show_header=False)
    for name, fact in facts().items():
        table.add_row(name, escape(fact))
    console.print(table)


def facts() -> dict[str, str]:
    """Facts about the machine and its software, by name."""
    import torch

    from ..kernels import cpu_backend

    found = {
        "spade_fast": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch's CUDA"] = torch.version.cuda or "none: this torch is built for the CPU"
    found["processor"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    library = cpu_backend.library
    found["instruction sets"] = "unknown: spade_fast._cpu is not there"
    if library is not None:
        found["instruction sets"] = (
            f"{', '.join(library.instruction_sets())}; {library.instruction_set()} is used"
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found[f"cuda:{index}"] = (
            f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.cuda.device_count() == 0:
        found["GPUs"] = "none"
    return found
