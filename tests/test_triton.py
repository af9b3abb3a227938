"""Tests of Triton only: how it divides its work, scaled down for the interpreter, and what its
compiler makes of each kernel.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from agree import ONCE, assert_agree
from conftest import BACKENDS
from modulations import (
    channels_last,
    contiguous,
    disagreements,
    results,
    sample,
    sliced,
    sliced_channels,
)
from torch.utils._pytree import tree_map, tree_map_only
from window_lists import CHOICES, CONVOLUTIONS, convolution, in_double

import spade_fast
from benchmarks import proofs
from benchmarks.proofs import ACTIVATIONS, CAPABILITIES, DTYPES
from spade_fast.kernels import numbering, torch_backend, triton_backend

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


@pytest.fixture
def watch():
    """Watches the memory accesses of a test's kernels in the interpreter. Asserts at the end that
    there were no faults.
    """
    if BACKENDS["triton"] != "cpu":
        yield None
        return
    from triton_watch import Watch

    with Watch() as watch:
        yield watch
    assert not watch.faults


@pytest.fixture
def small_tiles(watch, monkeypatch):
    """Small planes have several tiles and splits and do not fit in one pass, and rows of a table
    have several pieces.
    """
    from spade_fast.kernels.triton_kernels import plan, table_sums

    monkeypatch.setattr(plan, "TILE", 32)
    monkeypatch.setattr(plan, "TABLE_TILE", (16, 8))
    monkeypatch.setattr(plan, "PIECE_TILE", (4, 16))
    monkeypatch.setattr(plan, "PLANES_PIECE_TILE", (4, 8))
    monkeypatch.setattr(plan, "PIECE_UNDER_WAY", 2)
    monkeypatch.setattr(plan, "ROW_TILE", (4, 8))
    monkeypatch.setattr(plan, "ONE_PASS", 0)
    monkeypatch.setattr(table_sums, "PIECE", 16)
    with spade_fast.use_backend("triton"), torch.device(BACKENDS["triton"]):
        yield


@pytest.mark.pairs
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced, sliced_channels])
@pytest.mark.parametrize(
    "norm,activation", [("instance", "leaky_relu"), ("group", None), ("batch", "silu")]
)
@pytest.mark.parametrize("plus_one", [True, False])
def test_several_tiles_splits_and_pieces(norm, activation, layout, rows, plus_one, small_tiles):
    arguments, dy = sample(
        (2, 10, 7, 9),
        norm,
        activation,
        layout=layout,
        affine=norm != "instance",
        rows=rows,
        plus_one=plus_one,
    )
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize(
    "layout,plus_one", [(contiguous, True), (channels_last, False), (sliced, True)]
)
def test_planes_in_one_pass(layout, plus_one, watch):
    arguments, dy = sample((2, 5, 7, 9), "instance", "leaky_relu", layout=layout, plus_one=plus_one)
    with spade_fast.use_backend("triton"), torch.device(BACKENDS["triton"]):
        assert not disagreements(arguments, dy)
    assert watch is None or watch.kernels == {"forward_kernel", "backward_kernel"}


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_two_runs_give_the_same_bits(layout, rows, small_tiles):
    arguments, dy = sample((1, 10, 7, 9), "instance", "leaky_relu", layout=layout, rows=rows)
    one, other = (results(spade_fast.spade_modulate, arguments, dy) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_mean_1000_in_several_splits(layout, small_tiles):
    arguments, dy = sample((1, 4, 21, 17), "instance", "leaky_relu", layout=layout, mean=1000.0)
    assert not disagreements(arguments, dy, arguments | {"x": arguments["x"].double() - 1000})


def test_more_splits_than_are_combined_at_once():
    """Including splits without pixels, and planes with a large mean."""
    from spade_fast.kernels.triton_kernels import per_plane

    with torch.device(BACKENDS["triton"]):
        x = torch.randn(1, 3, 600) + 1000
        splits = x.double().unflatten(2, (300, 2))
        mean = splits.mean(3)
        squares = (splits - mean[..., None]).square().sum(3)
        found = torch.stack([splits[..., 0], mean - splits[..., 0], squares, mean * 0 + 2])
        parts = torch.cat([found.permute(3, 0, 1, 2), torch.zeros(4, 4, 1, 3)]).float()
        expected = torch.stack([x.double().mean(2), x.double().var(2, correction=0) * 600])
        moments = per_plane.combine_moments(parts, x)
        assert_agree(moments, expected, 8)
        sums = per_plane.combine_sums(parts[:, 1:3].contiguous(), x)
        assert_agree(sums, parts[:, 1:3].double().sum(0).float())


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_planes_whose_first_value_is_far_from_the_others(layout, small_tiles):
    from spade_fast.kernels.triton_kernels import plane_moments

    x = layout(torch.randn(2, 9, 31, 13))
    x[:, :, 0, 0] = 1e4
    x[1, 3] = 7.3  # a plane whose values are all the same
    planes = x.double().flatten(2)
    mean = planes.mean(2, keepdim=True)
    squares = (planes - mean).square().sum(2)
    moments = plane_moments(x)
    deviation = (squares / planes.shape[2]).sqrt()
    away = (moments[0] - mean[..., 0]) / deviation.clamp(min=1e-6)  # a constant plane has 0
    assert_agree(away.float(), torch.zeros_like(away), largest=1.0)
    assert_agree(moments[1], squares, 128)  # of numbers 10,000 from the others: up to 53


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_table_of_which_all_pixels_have_one_row(layout, small_tiles):
    arguments, dy = sample((2, 9, 8, 9), "instance", "relu", layout=layout, rows=40)
    arguments["index"] = torch.full_like(arguments["index"], 39)
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize(
    "layout,activation,held", [(contiguous, "leaky_relu", False), (channels_last, "silu", True)]
)
def test_numbers_outside_the_table_are_its_last_row(
    layout, activation, held, small_tiles, watch, monkeypatch
):
    """Nothing is read or written outside the table, forward and backward, in one pass and in
    several; not even if the order is nonsense, which gives meaningless sums.
    """
    from spade_fast.kernels import triton_kernels

    if held:
        monkeypatch.setattr(triton_kernels.plan, "ONE_PASS", 4096)
    arguments, dy = sample((2, 5, 4, 6), None, activation, layout=layout, rows=3)
    x, gamma, beta, index = (arguments[name] for name in ("x", "gamma", "beta", "index"))
    wrong = index.clone().flatten()
    wrong[::7] = 2
    last, wrong = wrong.clone(), wrong.clone()
    wrong[::7] = torch.tensor([3, -1, 2**31 - 1, -(2**31), 10**6, -5, 3, 7, 4])[: len(wrong[::7])]
    last, wrong = (numbers.view(index.shape).int() for numbers in (last, wrong))
    planes, order = torch.randn(3, 2, 5), numbering.sort_pixels(last)
    kept = beta if activation == "silu" else None
    found = []
    for numbers in (last, wrong):
        y, signs = triton_kernels.apply(x, planes, gamma, beta, numbers, activation, 0.2, True)
        operands = (gamma, kept, numbers)
        found.append(
            [
                y,
                *triton_kernels.instance_forward(
                    x, gamma, beta, numbers, 1e-5, activation, 0.2, True
                ),
                *triton_kernels.backward_sums(
                    dy, x, planes, *operands, order, signs, activation, 0.2
                ),
                triton_kernels.backward_input(
                    dy, x, planes, *operands, signs, None, activation, 0.2
                ),
                *triton_kernels.instance_backward(
                    dy, x, planes, *operands, order, signs, activation, 0.2
                ),
            ]
        )
        for nonsense in (order.flip(1), wrong.flatten(1)):
            sums = triton_kernels.backward_sums(
                dy, x, planes, *operands, nonsense.contiguous(), signs, activation, 0.2
            )
            assert [result.shape for result in sums] == [(3, 5), (3, 5), (2, 2, 5)]
    assert all(torch.equal(*pair) for pair in zip(*found))
    # With a nonsensical order, pieces may share places.
    watch.faults = [fault for fault in watch.faults if "outside of its arguments" in fault]


def test_lists_of_rows_that_do_not_exist():
    """A convolution at windows skips them."""
    with torch.device(BACKENDS["triton"]):
        rows, weight = torch.randn(2, 16).half(), torch.randn(4, 16, 3, 3).half()
        offsets = torch.tensor([0, 1, 3, 10**9, -(2**31), 2**31 - 1], dtype=torch.int32)
        listed = torch.tensor([0, 18, 10**9, -1, 17], dtype=torch.int32)
        found = triton_backend.convolve_windows(rows, [weight], [None], offsets, listed)
        expected = weight[:, :, 0, 0].float() @ rows[0].float()
    assert_agree(found[0], expected, ONCE)
    assert not found[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
def test_hashes_of_vectors_and_their_comparison(layout, dtype, small_tiles):
    """As in plain PyTorch, to the bit."""
    from spade_fast.kernels.triton_kernels import hash_vectors, vectors_differ

    segmap = layout(torch.randint(3, (2, 5, 7, 9)).to(dtype))
    bits, factor = (
        segmap.view(numbering.BITS[segmap.element_size()]).flatten(2),
        numbering.multiplier(3),
    )
    assert torch.equal(hash_vectors(bits, factor), numbering.hash_vectors(bits, factor))
    itself = torch.arange(2 * 63)
    assert not vectors_differ(bits, itself)
    for place in (0, 40, 125):
        other = itself.clone()
        other[place] = (place + 1) % 126
        assert vectors_differ(bits, other) == numbering.vectors_differ(bits, other)
    assert not vectors_differ(bits[:0], itself[:0]) and hash_vectors(bits[:0], factor).shape == (
        0,
        63,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes,tile",
    [*((sizes, 128) for sizes in CONVOLUTIONS), (((33, 17), (3, 3), 20, 35), 16)],
    ids=str,
)
def test_convolution_at_windows_in_half_precision(sizes, tile, dtype, monkeypatch):
    """The result in float64 from the same inputs, rounded once; also without a bias, with
    channels-last weights, and behind a ReLU.
    """
    from spade_fast.kernels.triton_kernels import plan

    monkeypatch.setattr(plan, "PRODUCT_TILES", ((tile, tile, 8),))
    with torch.device(BACKENDS["triton"]):
        rows, weights, biases, lists, *_ = convolution(*sizes, dtype)
        last = [*map(channels_last, weights)]
        cases = [
            *((weights[chosen], biases[chosen]) for chosen in CHOICES),
            (last[:1], [None]),
            (last, biases),
        ]
        for given, relu in zip(cases, itertools.cycle((False, True))):
            operands = (rows, *given, *lists, relu)
            found = triton_backend.convolve_windows(*operands)
            assert found.dtype == dtype
            truth = torch_backend.convolve_windows(*tree_map(in_double, operands))
            assert_agree(found, truth, ONCE)


def test_more_pixels_than_int32_counts_are_refused():
    from spade_fast.kernels.triton_kernels import backward_sums

    x, table = torch.zeros(()).expand(1, 1, 2**16, 2**15), torch.zeros(1, 1)
    planes, index = torch.zeros(3, 1, 1), torch.zeros((), dtype=torch.int32).expand(1, 2**16, 2**15)
    with pytest.raises(ValueError, match="index has shape .* fewer than 2"):
        backward_sums(x, x, planes, table, None, index, index.flatten(1), table[:0], None, 0.0)


def gapped(x):
    """The same values, with others between them in memory."""
    return torch.stack([x, x.flip(0)], dim=-1)[..., 0]


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("one_pass", [0, 4096])
def test_signs_and_planes_with_gaps(one_pass, layout, rows, small_tiles, monkeypatch):
    from spade_fast.kernels import triton_kernels

    monkeypatch.setattr(triton_kernels.plan, "ONE_PASS", one_pass)
    arguments, dy = sample((1, 10, 7, 9), "instance", layout=layout, rows=rows)
    x, gamma, beta, index = (arguments.get(name) for name in ("x", "gamma", "beta", "index"))
    index = None if index is None else index.int()
    order = None if index is None else numbering.sort_pixels(index)
    settings = ("relu", 0.2, True)
    _, signs, planes = triton_kernels.instance_forward(x, gamma, beta, index, 1e-5, *settings)

    def gradients(planes, signs):
        operands = (dy, x, planes, gamma, None, index)
        return (
            triton_kernels.backward_input(*operands, signs, None, *settings),
            *triton_kernels.backward_sums(*operands, order, signs, *settings),
            *triton_kernels.instance_backward(*operands, order, signs, *settings),
        )

    found, expected = gradients(gapped(planes), gapped(signs)), gradients(planes, signs)
    assert all(map(torch.equal, found, expected))


def test_a_convolution_of_operands_with_gaps():
    with torch.device(BACKENDS["triton"]):
        *tensors, lists, _, _ = convolution((5, 3), (3, 3), 7, 20, torch.float16)
        operands = (*tensors, *lists)
        expected = triton_backend.convolve_windows(*operands)
        found = triton_backend.convolve_windows(*tree_map_only(torch.Tensor, gapped, operands))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", CONVOLUTIONS[1:3], ids=str)
def test_convolution_accesses_only_its_arguments(sizes, watch):
    with torch.device(BACKENDS["triton"]):
        *tensors, lists, _, _ = convolution(*sizes, torch.bfloat16)
        assert triton_backend.convolve_windows(*tensors, *lists).isfinite().all()
    assert watch is None or watch.kernels == {"convolve_windows_kernel"}


def test_float64_is_refused_with_a_reason():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=BACKENDS["triton"])
    assert "float64" in triton_backend.why_not(x)
    with (
        spade_fast.use_backend("triton"),
        pytest.raises(
            RuntimeError, match="triton was requested but cannot run: x or gamma is float64"
        ),
    ):
        spade_fast.spade_modulate(x, x, x)


@pytest.mark.full
def test_kernels_compile_without_spills_or_doubles_and_with_wide_loads(tmp_path):
    """`python -m benchmarks proofs` without --pairs proves every configuration, which takes some
    minutes longer.
    """
    path = tmp_path / "proofs.json"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "proofs", "--pairs", "--json", str(path)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    proved = json.loads(path.read_text())
    found = {(proof["capability"], proof["dtype"]) for proof in proved}
    assert found == set(itertools.product(CAPABILITIES, DTYPES))
    kernels = {
        "apply",
        "plane_moments",
        "running_planes",
        "batch_planes",
        "batch_terms",
        "backward_sums",
        "backward_input",
        "forward",
        "backward",
        "sum_pieces",
        "sum_rows",
        "sum_planes",
        "hash",
        "differ",
        "convolve_windows",
    }
    for capability in CAPABILITIES:
        found = {proof["kernel"] for proof in proved if proof["capability"] == capability}
        assert {f"{name}_kernel" for name in kernels} <= found


def test_few_configurations_have_all_pairs():
    """And every shape in every form."""
    every = proofs.configurations(CAPABILITIES, DTYPES, ACTIVATIONS)
    few = proofs.configurations(CAPABILITIES, DTYPES, ACTIVATIONS, pairs=True)
    pairs, own = (
        {pair for names in some for pair in itertools.combinations(enumerate(names), 2)}
        for some in (every, few)
    )
    assert own == pairs and len(few) == len(proofs.FORMS) * len(proofs.SHAPES + proofs.ONES)
    assert len(few) < len(every) / 20
