"""Shared by all tests: the backends that the suite runs on, and fixed random numbers."""

import contextlib
import importlib.util
import itertools
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # xdist already runs a process per core

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before the kernels are defined, because without a GPU they run in the interpreter

# Otherwise a GPU rounds the factors of float32 products to ten bits, in eager, too.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

import spade_fast
from benchmarks.covering import covering
from spade_fast.kernels import cpu_backend, cuda_backend

BACKENDS = {
    "cpu": "cpu",
    "triton": "cuda" if torch.cuda.is_available() else "cpu",
    "torch": "cpu",
}  # the backends of the suite, and the device of their tensors
if importlib.util.find_spec("triton") is None:
    del BACKENDS["triton"]
if cuda_backend.why_not() is None:
    BACKENDS["cuda"] = "cuda"
INSTRUCTION_SETS = cpu_backend.library.instruction_sets() if cpu_backend.library else []
# Those for which the kernels of the modulation are compiled again.
LESSER = [name for name in ("avx2", "base") if name in INSTRUCTION_SETS[1:]]
BACKEND_FIXTURES = ("backend", "backend_and_instruction_set")


def hasten_interpreter():
    """Makes Triton's interpreter replace the functions of its language once per launch and device
    function. By itself it does so in each call of one, which took 43% of a test's time.
    """
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set()

    def replace_once(function):
        # A launch gives the rewritten function, and undoes at its end what was replaced for it.
        if function not in interpreter.InterpretedFunction.rewritten_fn:
            replaced.clear()
            return replace(function)
        if function not in replaced:
            replace(function)
            replaced.add(function)

    interpreter._patch_lang = replace_once


if BACKENDS.get("triton") == "cpu":
    hasten_interpreter()


@contextlib.contextmanager
def use_instruction_set(name):
    before = cpu_backend.library.instruction_set()
    cpu_backend.library.use_instruction_set(name)
    try:
        yield
    finally:
        cpu_backend.library.use_instruction_set(before)


@contextlib.contextmanager
def use_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend of the whole suite. Tensors are created on the backend's device."""
    with spade_fast.use_backend(request.param), tensors_on(BACKENDS[request.param]):
        yield request.param


@pytest.fixture(params=[*BACKENDS, *(f"cpu {name}" for name in LESSER)])
def backend_and_instruction_set(request):
    """Each backend, and the CPU backend again with each lesser instruction set of the processor."""
    name, *instruction_set = request.param.split()
    with contextlib.ExitStack() as stack:
        stack.enter_context(spade_fast.use_backend(name))
        stack.enter_context(tensors_on(BACKENDS[name]))
        if instruction_set:
            stack.enter_context(use_instruction_set(*instruction_set))
        yield request.param


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory):
    """The CUDA kernels compiled for the CPU: a library, and a backend of its operators."""
    import cuda_library

    folder = cuda_library.shared_folder(tmp_path_factory, "cuda_on_host")
    return cuda_library.build(folder, cuda_library.NAMESPACE)


def tensors_on(device):
    """Inside, tensors are created on this device. For the CPU there is no context, which saves
    overhead.
    """
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)


def can_run(item):
    """Whether a case's backend can run it. The kernels for GPUs have no float64, which cases have
    as a parameter or as the mark "float64". Triton's interpreter takes minutes for tests marked
    "large", which test_triton.py has at a smaller size.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    chosen = {str(parameters.get(name)) for name in BACKEND_FIXTURES}
    if chosen.isdisjoint({"cuda", "triton"}):
        return True
    if BACKENDS.get("triton") == "cpu" and item.get_closest_marker("large"):
        return False  # interpreted
    in_float64 = any(value is torch.float64 for value in parameters.values())
    return not (in_float64 or item.get_closest_marker("float64"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keeps the cases that their backend can run, and marks the cases of a test's matrix that a run
    leaves out. The ordinary run covers all pairs of values of two parameters, and the full run
    ("full") all triples, unless a test is marked "pairs"; the remaining combinations are marked
    "product". For a test marked "slow", the ordinary run keeps the cases of one backend.
    """
    items[:] = filter(can_run, items)
    matrices = {}
    for item in items:
        if hasattr(item, "callspec"):
            matrices.setdefault((item.path, item.originalname), []).append(item)
    for matrix in matrices.values():
        pairs, triples = (
            covering([values_that_meet(item, count) for item in matrix]) for count in (2, 3)
        )
        if matrix[0].get_closest_marker("pairs"):
            triples = pairs
        for number, item in enumerate(matrix):
            if number not in pairs:
                item.add_marker("full" if number in triples else "product")
            elif item.get_closest_marker("slow") and item.callspec.params["backend"] != "cpu":
                item.add_marker("full")


def values_that_meet(item, count):
    """All sets of `count` values of a case's parameters. Values are compared by identity, since all
    cases share the objects of one parameter list.
    """
    values = [(name, id(value)) for name, value in item.callspec.params.items()]
    return set(itertools.combinations(values, count))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    require(*(name for mark in item.iter_markers("needs") for name in mark.args))


def require(*packages):
    """Skips a test if a package that it needs is missing, or fails it if all of them should be
    installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        end = pytest.fail if os.environ.get("SPADE_FAST_TEST_ALL") == "1" else pytest.skip
        end(f"not installed, and in the extra test-all: {', '.join(missing)}")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
