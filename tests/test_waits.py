"""The waits of csrc/cuda: no memory access lacks one, and none is superfluous. The kernels run on
the host, and their accesses are watched (cuda_on_host.h).

A missing wait is found by the accesses that it fails to order, in whatever order threads run.
"""

import ctypes
import re
from pathlib import Path

import cuda_library
import pytest
import torch
from agree import ONCE, agrees
from label_maps import patches
from modulations import channels_last, contiguous, disagreements, sample
from numbered import condition
from torch.utils._pytree import tree_leaves, tree_map
from window_lists import convolution, in_double, listed

from spade_fast import kernels
from spade_fast.kernels import numbering, torch_backend

KERNELS = cuda_library.CSRC / "cuda"
WAIT = re.compile(
    r"(?<!void )\b(?:__sync\w+|__threadfence\w*|wait_for_\w+(?:<.*?>)?)\(.*?\)(?=.*;)"
)
PLACES = 64  # in a block that numbers pieces; few, so that a few pixels need many blocks
NAMESPACE = "spade_fast_cuda_watched"
# in a block that sums a row; few, so that a few images exceed what a block reads at once
ROW_THREADS = 64
HELD = 64  # values of a weight that a block holds; few, so that a few channels exceed them


def modulation(shared, layout, rows=None, clusters=False, shape=(2, 8, 48, 48)):
    """A case: forward and backward with at most `shared` bytes of shared memory per block."""

    def run(library, backend, monkeypatch):
        monkeypatch.setattr(kernels, "BEST_FIRST", (backend,))
        monkeypatch.setenv("SPADE_FAST_HOST_SHARED", str(shared))
        arguments, dy = sample(shape, "instance", "leaky_relu", layout=layout, rows=rows)
        assert rows is None or dy[:, 0].numel() > PLACES**2 or len(dy) > ROW_THREADS
        library.host_largest_cluster()
        found = disagreements(arguments, dy)
        assert found or (library.host_largest_cluster() > 1) == clusters
        return found

    return run


def numbers(name, *asked, **settings):
    """A case: the backend finds the same as plain PyTorch."""

    def run(library, backend, monkeypatch):
        found = tree_leaves(getattr(backend, name)(*asked, **settings))
        pairs = zip(found, tree_leaves(getattr(numbering, name)(*asked)), strict=True)
        return [number for number, pair in enumerate(pairs) if not torch.equal(*pair)]

    return run


def refused(name, *asked):
    """A case: codes that are not rows of the palette are refused."""

    def run(library, backend, monkeypatch):
        with pytest.raises(ValueError, match="codes has numbers that are not rows"):
            getattr(backend, name)(*asked)

    return run


def gathers(name, sample):
    """A case: the operator's result in its dtype matches PyTorch's in float64."""

    def run(library, backend, monkeypatch):
        given = sample()
        found = getattr(getattr(torch.ops, NAMESPACE), name)(*given)
        truth = getattr(torch_backend, name)(*tree_map(in_double, given))
        return [] if agrees(found, truth, ONCE) else [name]

    return run


def joint_convolution(*asked):
    rows, weights, biases, lists, *_ = convolution(*asked)
    return rows, weights, biases, *lists


# Together the cases reach every wait. Each returns the wrong results that it found.
CASES = {
    "vectors whose hashes collide": numbers(
        "find_codes", condition((1, 9, 9, 7), torch.float32), hash_mask=1
    ),
    "windows, sorted in tiles": numbers(
        "find_windows", patches((1, 17, 13), 5).int(), [(17, 13), (8, 9)], 3, 5
    ),
    "patches": numbers("find_patches", patches((2, 9, 7), 5).int(), 3, 1, 1, 5),
    "codes that are not rows": refused(
        "find_windows", torch.full((1, 9, 9), 5).int(), [(9, 9)], 3, 5
    ),
    "long lists of few columns": gathers(
        "sum_lists", lambda: (torch.randn(9, 8), *listed([3, 200, 0, 40], 9))
    ),
    "long lists of many columns": gathers(
        "sum_lists", lambda: (torch.randn(9, 132), *listed([3, 200, 0, 40], 9))
    ),
    "a convolution of two weights": gathers(
        "convolve_windows", lambda: joint_convolution((6, 24), (3, 3), 7, 5, torch.float16)
    ),
    "planes in one block": modulation(100_000, contiguous),
    "planes of odd sizes": modulation(100_000, contiguous, shape=(2, 3, 7, 9)),
    "planes in clusters, forward": modulation(9_000, contiguous, clusters=True),
    "planes in clusters, backward": modulation(17_000, contiguous, clusters=True),
    "two passes": modulation(0, contiguous),
    "a table, with pieces of many blocks": modulation(0, contiguous, rows=7),
    "a table of many images": modulation(0, contiguous, rows=7, shape=(ROW_THREADS + 2, 8, 2, 2)),
    "channels last, in one block": modulation(227 << 10, channels_last),
    "channels last, in clusters": modulation(80_000, channels_last, clusters=True),
    "channels last, two passes": modulation(0, channels_last),
    "channels last, a table": modulation(0, channels_last, rows=7),
}
WATCHED_KERNELS = Path(__file__).parent / "watched_kernels.cu"
NAMES = re.findall(r"^    KERNEL\((\w+)", WATCHED_KERNELS.read_text(), re.M)

pytestmark = pytest.mark.skipif(
    cuda_library.COMPILER is None or not cuda_library.CAN_WATCH,
    reason="there is no C++ compiler, or another sanitizer than the watch",
)


def waits():
    """The place of each wait, as a test's parameter. Its id also has the code of the wait."""
    found = []
    for path in sorted(KERNELS.iterdir()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            place = f"{path.name}:{number}"
            found += [pytest.param(place, id=f"{place} {wait}") for wait in WAIT.findall(code)]
    return found


@pytest.fixture(scope="session")
def watched_build(tmp_path_factory):
    folder = cuda_library.shared_folder(tmp_path_factory, "watched")
    numbers = {"kPlaces": PLACES, "kRowThreads": ROW_THREADS, "kHeld": HELD}
    return cuda_library.build(folder, NAMESPACE, watched=True, numbers=numbers)


@pytest.fixture
def fault_of(watched_build, monkeypatch):
    """The fault that a case shows, in words, or None if there is none."""

    def run(case):
        try:
            found = CASES[case](*watched_build, monkeypatch)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return f"other results: {found}" if found else None

    return run


@pytest.mark.parametrize("order", ["forward", "5"])
@pytest.mark.parametrize("case", CASES)
def test_no_access_lacks_a_wait(case, order, fault_of, monkeypatch):
    monkeypatch.setenv("SPADE_FAST_HOST_ORDER", order)
    assert fault_of(case) is None


@pytest.mark.parametrize("place", waits())
def test_leaving_out_a_wait_is_noticed(place, fault_of, monkeypatch):
    """One case that notices a missing wait suffices: `pytest -rP` shows which case, and how."""
    monkeypatch.setenv("SPADE_FAST_HOST_WITHOUT", place)
    for case in CASES:
        if (fault := fault_of(case)) is not None:
            print(f"{place}: {case} notices that it is left out: {fault}")
            return
    pytest.fail(f"no case notices that the wait at {place} is left out")


def test_kernels_beside_watched_ones_are_not_watched(watched_build, cuda_on_host, monkeypatch):
    """Otherwise the watch, which does not see their writes to shared memory, would report that
    nothing has written it.
    """
    assert not CASES["planes in clusters, forward"](*cuda_on_host, monkeypatch)


def test_each_wait_has_its_own_line():
    """Otherwise two waits would be left out at once."""
    places = [wait.values[0] for wait in waits()]
    assert len(places) == len(set(places)) > 0


@pytest.fixture(scope="session")
def wrong_kernels(tmp_path_factory):
    folder = cuda_library.shared_folder(tmp_path_factory, "wrong")
    library = cuda_library.build_one(WATCHED_KERNELS, folder)
    library.run_kernel.restype = ctypes.c_char_p
    return lambda name, wrong: library.run_kernel(name.encode(), wrong).decode()


@pytest.mark.parametrize("order", ["forward", "reverse", "1"])
@pytest.mark.parametrize("name", NAMES)
def test_deliberate_faults_are_found(name, order, wrong_kernels, monkeypatch):
    monkeypatch.setenv("SPADE_FAST_HOST_ORDER", order)
    assert wrong_kernels(name, False) == ""
    assert wrong_kernels(name, True) != ""
