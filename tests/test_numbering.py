"""Numbering in plain PyTorch, which GPUs use: the same numbers as the CPU's library, even if hashes
collide, with a single synchronisation.
"""

import warnings

import pytest
import torch
from conftest import tensors_on, use_threads
from label_maps import SHAPES, patches
from numbered import (
    CONDITIONS,
    DEVICE,
    HAS_LIBRARY,
    NothingWaits,
    condition,
    differences,
    patches_differ,
    random_codes,
    random_patches,
)

from spade_fast import SemanticLayout, kernels
from spade_fast.kernels import cpu_backend, numbering


@pytest.fixture
def reads(monkeypatch):
    """A list that gets an entry for each wait of the host in `_read`. Any other wait raises."""
    found, read = [], numbering._read

    def counted(*numbers):
        found.append(len(numbers))
        with torch.utils._python_dispatch._disable_current_modes():
            return read(*numbers)

    monkeypatch.setattr(numbering, "_read", counted)
    with NothingWaits(), tensors_on(DEVICE):
        yield found


def test_the_guard_finds_waits():
    for waits in (
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: int(x[0]),
        lambda x: x.unique(),
        lambda x: bool((x == 0).all()),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
            waits(torch.arange(3))


@HAS_LIBRARY
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 4), (2, 0, 4)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("classes", [1, 4, 300])
def test_the_same_numbers_and_lists_as_the_librarys(shape, kernel_size, classes):
    codes = (
        patches(shape, classes).int() if 0 not in shape else torch.zeros(shape, dtype=torch.int32)
    )
    asked = ([shape[1:]], kernel_size, classes)
    assert not differences(numbering.find_windows, codes, *asked)


@HAS_LIBRARY
@pytest.mark.parametrize("seed", range(20))
def test_all_sizes_together(seed):
    codes, sizes, kernel_size, classes, dtype = random_codes(seed)
    dtype = torch.float32 if DEVICE == "cuda" else dtype  # the dtype in which GPUs compute
    find_windows = kernels.select(codes.to(DEVICE)).find_windows
    for find in (numbering.find_windows, find_windows):
        assert not differences(find, codes, sizes, kernel_size, classes, dtype)


@HAS_LIBRARY
@pytest.mark.parametrize("shape", CONDITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_codes_as_the_librarys(shape, dtype):
    segmap = condition(shape, dtype)
    theirs = cpu_backend.find_codes(segmap)
    for find_codes in (numbering.find_codes, kernels.select(segmap.to(DEVICE)).find_codes):
        for one, other in zip(find_codes(segmap.to(DEVICE)), theirs, strict=True):
            assert one.dtype == other.dtype and torch.equal(one.cpu(), other)


@HAS_LIBRARY
@pytest.mark.parametrize("size", [(3, 9_000), (1, 36, 31, 33)])
def test_the_same_codes_and_windows_on_any_number_of_threads(size):
    codes = patches(size, 300).int()
    segmap = torch.randn(300, 2)[codes.long()].movedim(-1, 1).contiguous()
    sizes = [size[1:], tuple(length // 3 for length in size[1:])]
    truth = numbering.find_codes(segmap)
    for threads in (1, 2, 7):
        with use_threads(threads):
            found = cpu_backend.find_codes(segmap)
            assert not differences(numbering.find_windows, codes, sizes, 3, 300)
        assert all(map(torch.equal, found, truth))


def test_windows_with_one_synchronisation(reads):
    codes = patches((2, 40, 33), 7).int().to(DEVICE)
    numbering.find_windows(codes, [(40, 33), (20, 20), (80, 5)], 3, 7)
    assert len(reads) == 1


@HAS_LIBRARY
@pytest.mark.parametrize("seed", range(10))
def test_the_same_patches_as_the_librarys(seed):
    codes, *asked = random_patches(seed)
    for find in (numbering.find_patches, kernels.select(codes.to(DEVICE)).find_patches):
        assert not patches_differ(find, codes, *asked)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU to wait for")
def test_each_operation_waits_for_a_gpu_at_most_once():
    labels, instances = (patches((2, 40, 33), 7, seed).to(DEVICE) for seed in range(2))
    segmap = torch.eye(7, device=DEVICE)[labels].movedim(-1, 1).contiguous()
    layout = SemanticLayout.from_segmap(segmap)
    for waits in (
        lambda: SemanticLayout.from_labels(labels, 8, instances, dont_care=6),
        lambda: SemanticLayout.from_segmap(segmap),
        lambda: layout.prepare([(8, 8), (40, 33), (20, 16)], 3),
        lambda: layout.patches(4, 2, 2),
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            waits()
            torch.cuda.set_sync_debug_mode("default")
        assert len([one for one in found if "called a synchronizing" in str(one.message)]) <= 1


def test_codes_with_one_synchronisation_besides_the_check_for_dense_features(reads, monkeypatch):
    monkeypatch.setattr(numbering, "_are_dense", lambda bits, hash_vectors: False)
    segmap = torch.eye(7, device=DEVICE)[patches((2, 40, 33), 7).to(DEVICE)].movedim(-1, 1)
    assert numbering.find_codes(segmap) is not None
    assert len(reads) == 1


def test_colliding_hashes_are_found_and_change_nothing(monkeypatch):
    codes = patches((2, 30, 21), 7).int().to(DEVICE)
    segmap = torch.eye(7, device=DEVICE)[codes.long()].movedim(-1, 1)
    plain, attempts, multiplier = (
        [*numbering.find_windows(codes, [(30, 21)], 3, 7), numbering.find_codes(segmap)],
        [],
        numbering.multiplier,
    )

    def collides(attempt, axis=0):
        attempts.append(attempt)
        return 0 if attempt < 2 else multiplier(attempt, axis)  # then a hash is the last tap's code

    monkeypatch.setattr(numbering, "multiplier", collides)
    collided = [*numbering.find_windows(codes, [(30, 21)], 3, 7), numbering.find_codes(segmap)]
    assert max(attempts) == 2
    flat = [
        [*windows[0], *windows[1], *windows[2:], *vectors] for windows, vectors in (plain, collided)
    ]
    assert all(torch.equal(*pair) for pair in zip(*flat))


@HAS_LIBRARY
@pytest.mark.parametrize("hash_mask", [0, 1, 255])
def test_colliding_hashes_change_nothing_in_the_library(hash_mask):
    codes = patches((2, 20, 20), 5).int()
    plain = cpu_backend.number_windows(codes, 3)
    collided = [
        torch.from_numpy(array)
        for array in cpu_backend.library.number_windows(codes.numpy(), 3, hash_mask)
    ]
    assert torch.equal(plain[0], collided[0]) and torch.equal(plain[1], collided[1])


def test_dense_features_have_no_codes():
    assert numbering.find_codes(torch.randn(2, 5, 40, 40, device=DEVICE)) is None
    late = torch.zeros(1, 3, 64, 64, device=DEVICE)  # not noticed by the sample
    late[:, :, 32:] = torch.randn(1, 3, 32, 64)
    assert numbering.find_codes(late) is None


def test_signs_of_two_channels():
    """The sign bits of doubles used to cancel in the hash, whatever the multiplier."""
    segmap = torch.ones(1, 2, 1, 2, dtype=torch.float64)
    segmap[..., 1] = -1
    codes, places = numbering.find_codes(segmap)
    assert codes.tolist() == [[[0, 1]]] and places.tolist() == [0, 1]
