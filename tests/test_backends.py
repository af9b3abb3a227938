"""Which backend runs, and why another does not: the choice, the environment variable, missing
parts, `spade-fast info`.
"""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fresh import python
from typer.testing import CliRunner

import spade_fast
from spade_fast import kernels
from spade_fast.cli import app
from spade_fast.kernels import cpu_backend, triton_backend


@pytest.fixture
def answers(monkeypatch):
    """Reasons why backends do not run, by name, which a test can set. Other backends give their
    own.
    """
    given = {}

    def answering(backend):
        def why_not(*tensors):
            return given[backend.name] if backend.name in given else backend.why_not(*tensors)

        return replace(backend, why_not=why_not)

    monkeypatch.setattr(kernels, "BEST_FIRST", tuple(map(answering, kernels.BEST_FIRST)))
    return given


def test_every_backend_runs_or_gives_a_reason():
    statuses = spade_fast.backends()
    assert [status.name for status in statuses] == ["cuda", "cpu", "triton", "torch"]
    assert all(status.runs == (status.reason == "") for status in statuses)
    assert statuses[-1].runs


def test_reasons_for_a_tensor():
    on_meta = {
        status.name: status
        for status in spade_fast.backends(torch.randn(1, 2, 3, 3, device="meta"))
    }
    assert not on_meta["cpu"].runs and on_meta["torch"].runs


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match="x is a str; it should be a torch.Tensor"):
        spade_fast.backends("x")
    with pytest.raises(TypeError, match="gamma is a list; it should be a torch.Tensor"):
        spade_fast.backends(torch.ones(1, 2, 3), [1])


def test_the_first_backend_that_runs_is_chosen(answers):
    x = torch.randn(2, 3, 4, 4)
    answers["cpu"] = None
    assert kernels.select(x).name == "cpu"
    answers.update(cpu="a reason", triton="a reason")
    assert kernels.select(x).name == "torch"


def test_forcing_a_backend_that_cannot_run_is_an_error(answers):
    answers["cpu"] = "it is Sunday"
    x = torch.randn(2, 3, 4, 4)
    with (
        spade_fast.use_backend("cpu"),
        pytest.raises(RuntimeError, match="cpu was requested but cannot run: it is Sunday"),
    ):
        spade_fast.spade_modulate(x, x, x)
    spade_fast.spade_modulate(x, x, x)


def test_use_backend_ends_with_its_block():
    x = torch.randn(1, 2, 3, 3)
    best = kernels.select(x).name
    with pytest.raises(KeyError), spade_fast.use_backend("torch"):
        assert kernels.select(x).name == "torch"
        with spade_fast.use_backend(None):
            assert kernels.select(x).name == best
        assert kernels.select(x).name == "torch"
        raise KeyError
    assert kernels.select(x).name == best
    with pytest.raises(
        ValueError, match="name is 'gpu'; it should be one of cuda, cpu, triton, torch"
    ):
        spade_fast.use_backend("gpu").__enter__()


def test_backward_uses_the_backend_of_forward(monkeypatch):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with spade_fast.use_backend("torch"):
        y = spade_fast.spade_modulate(x, x, x)
    monkeypatch.setattr(kernels, "select", None)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_the_environment_variable():
    code = "import spade_fast; print(spade_fast.kernels.FORCED)"
    assert python(code, SPADE_FAST_BACKEND="torch")[0].strip() == "torch"
    assert python(code, SPADE_FAST_BACKEND="")[0].strip() == "None"
    assert (
        "SPADE_FAST_BACKEND is 'gpu'; it should be one of cuda, cpu, triton, torch"
        in python(code, SPADE_FAST_BACKEND="gpu")[1]
    )


MISSING = """
import sys
sys.modules["{module}"] = None  # as if it were not installed, or could not be loaded
import torch, spade_fast
x = torch.randn(2, 3, 4, 4, requires_grad=True)
spade_fast.spade_modulate(x, x, x, activation="relu").sum().backward()
print(x.grad.isfinite().all().item(), *spade_fast.backends(), sep="\\n")
"""


@pytest.mark.parametrize("module", ["spade_fast._cpu", "triton"])
def test_the_package_works_without_a_module(module):
    output, error = python(MISSING.format(module=module))
    assert output.startswith("True\n"), error
    if module == "spade_fast._cpu":
        assert "the library spade_fast._cpu is missing" in output


def test_the_instruction_set():
    code = "import spade_fast._cpu as library; print(library.instruction_set())"
    assert python(code, SPADE_FAST_ISA="base")[0].strip() == "base"
    assert (
        "SPADE_FAST_ISA is sse9; it should be base, avx2, avx512 or avx512_bf16"
        in python("import spade_fast", SPADE_FAST_ISA="sse9")[1]
    )


def test_an_instruction_set_that_the_processor_lacks():
    library = SimpleNamespace(instruction_sets=lambda: ["avx2", "base"])
    with pytest.raises(ValueError, match="SPADE_FAST_ISA is avx512, which this processor does not"):
        cpu_backend._use_instruction_set("avx512", library)


def test_a_library_that_is_missing_or_cannot_be_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "spade_fast._cpu", None)
    assert "not built when the package was installed. It takes a C++" in cpu_backend._load()[1]

    def fails(name, package):
        raise ImportError("undefined symbol: aoti")

    monkeypatch.setattr(cpu_backend.importlib, "import_module", fails)
    assert "_cpu cannot be loaded: undefined symbol: aoti. If another" in cpu_backend._load()[1]


def test_a_triton_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(triton_backend, "INSTALLED", True)
    monkeypatch.setattr(triton_backend, "INTERPRETED", True)
    monkeypatch.setattr(triton_backend, "_failures", [])
    monkeypatch.delattr(kernels, "triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "spade_fast.kernels.triton_kernels", None)
    assert triton_backend.why_not().startswith("Triton is installed but cannot be imported: ")
    assert triton_backend.why_not(torch.randn(1, 2, 3)) == triton_backend.why_not()


def test_info():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    for word in (
        "torch",
        torch.__version__,
        "cpu",
        "instruction sets",
        "base",
        spade_fast.__version__,
        "GPUs",
    ):
        assert word in result.output


def test_python_without_assertions():
    assert python(
        "import spade_fast, torch; x = torch.randn(2, 3, 4, 4); print(spade_fast.spade_modulate(x,"
        " x, x).shape)"
    )[0]
    run = subprocess.run(
        [
            sys.executable,
            "-O",
            "-c",
            "import torch, spade_fast; x = torch.randn(2, 3, 4, 4);"
            "spade_fast.spade_modulate(x, x[:1], x)",
        ],
        capture_output=True,
        text=True,
    )
    assert "ValueError: gamma has shape" in run.stderr
