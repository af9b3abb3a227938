"""The CUDA kernels without a GPU: compiled as C++ for the host (cuda_on_host.h) and run, and
compiled by nvcc and read.

On a GPU they are a backend of the whole suite.
"""

import itertools
import shutil
import zlib
from types import SimpleNamespace

import cuda_library
import pytest
import torch
from modulations import (
    LAYOUTS,
    channels_last,
    contiguous,
    disagreements,
    results,
    sample,
    sliced,
    sliced_channels,
    transposed,
)

import spade_fast
from spade_fast import kernels
from spade_fast.kernels import cuda_backend, numbering, torch_backend
from spade_fast.ops import norms

NAMESPACE = "spade_fast_cuda_on_host"
ORDERS = ["forward", "reverse", "1", "2"]  # of the threads and blocks
ACTIVATIONS = [None, "relu", "leaky_relu", "silu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

needs_compiler = pytest.mark.skipif(
    cuda_library.COMPILER is None, reason="there is no C++ compiler"
)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return cuda_library.build(tmp_path_factory.mktemp("cuda_on_host"), NAMESPACE)


@pytest.fixture
def library(built):
    """The kernels as a library whose operators run on the CPU."""
    return built[0]


@pytest.fixture
def on_host(built, monkeypatch, request):
    """A backend that runs them on the CPU; each test in one of the orders, its name says which."""
    order = ORDERS[zlib.crc32(request.node.name.encode()) % len(ORDERS)]
    monkeypatch.setenv("SPADE_FAST_HOST_ORDER", order)
    monkeypatch.setattr(kernels, "BEST_FIRST", (built[1],))
    return built[1]


@pytest.fixture(params=["one pass", "two passes"])
def passes(request, on_host, monkeypatch):
    if request.param == "two passes":
        monkeypatch.setenv("SPADE_FAST_HOST_SHARED", "0")
    return request.param


@needs_compiler
@pytest.mark.parametrize("shared", [14000, 40000])
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "activation,rows,mean", [("silu", None, 0), ("relu", 7, 0), ("leaky_relu", None, 1000)]
)
def test_planes_that_a_cluster_holds(
    activation, rows, mean, dtype, layout, shared, on_host, library, monkeypatch
):
    shared = (
        min(8 * shared, 227 << 10) if layout is channels_last else shared
    )  # of more channels than three
    monkeypatch.setenv("SPADE_FAST_HOST_SHARED", str(shared))
    arguments, dy = sample(
        (1, 3, 120, 171), "instance", activation, dtype=dtype, layout=layout, rows=rows, mean=mean
    )
    library.host_largest_cluster()
    assert not disagreements(arguments, dy, arguments | {"x": arguments["x"].double() - mean})
    assert library.host_largest_cluster() > 1
    monkeypatch.setenv("SPADE_FAST_HOST_CLUSTERS", "0")
    spade_fast.spade_modulate(**arguments)
    assert library.host_largest_cluster() == 1


@needs_compiler
@pytest.mark.parametrize("out,rows", [("x", None), ("gamma", None), ("x", 7)])
def test_written_over_what_it_reads(out, rows, on_host):
    arguments, _ = sample((2, 6, 9, 7), "instance", "leaky_relu", rows=rows)
    expected = spade_fast.spade_modulate(**arguments)
    assert spade_fast.spade_modulate(**arguments, out=arguments[out]) is arguments[out]
    assert torch.allclose(arguments[out], expected, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_dtype_and_layout(activation, dtype, layout, rows, passes):
    arguments, dy = sample(
        (2, 6, 9, 7), "instance", activation, dtype=dtype, layout=layout, rows=rows
    )
    assert not disagreements(arguments, dy)


@needs_compiler
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
@pytest.mark.parametrize("norm", ["batch", "group", None])
def test_the_other_norms(norm, activation, layout, rows, on_host):
    arguments, dy = sample(
        (2, 16, 8, 12),
        norm,
        activation,
        dtype=torch.bfloat16,
        layout=layout,
        affine=norm is not None,
        rows=rows,
    )
    assert not disagreements(arguments, dy)


@needs_compiler
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("shape", [(2, 4, 11), (2, 4, 13, 1), (3, 2, 3, 4, 5), (1, 8, 33, 31)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_one_to_three_dimensions(shape, layout, rows, on_host):
    arguments, dy = sample(shape, "instance", "leaky_relu", layout=layout, rows=rows)
    assert not disagreements(arguments, dy)


@needs_compiler
@pytest.mark.parametrize(
    "layouts", list(itertools.permutations([contiguous, channels_last, sliced, transposed], 3))[::3]
)
def test_layouts_that_differ(layouts, passes):
    layout, gamma_layout, dy_layout = layouts
    arguments, dy = sample(
        (2, 5, 6, 7),
        "instance",
        "relu",
        layout=layout,
        gamma_layout=gamma_layout,
        dy_layout=dy_layout,
    )
    assert not disagreements(arguments, dy)


@needs_compiler
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 65])
@pytest.mark.parametrize("pixels", [(1, 3), (4, 4), (17, 1), (9, 20)])
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced_channels])
def test_odd_sizes(channels, pixels, layout, on_host):
    arguments, dy = sample(
        (2, channels, *pixels), "instance", "leaky_relu", layout=layout, dtype=torch.bfloat16
    )
    assert not disagreements(arguments, dy)


@needs_compiler
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(
    "dtypes", [pair for pair in itertools.product(DTYPES, DTYPES) if pair[0] != pair[1]], ids=str
)
def test_gamma_of_another_dtype(dtypes, layout, rows, on_host):
    arguments, dy = sample(
        (2, 8, 6, 8),
        "instance",
        "leaky_relu",
        dtype=dtypes[0],
        gamma_dtype=dtypes[1],
        layout=layout,
        rows=rows,
    )
    assert not disagreements(arguments, dy)


@needs_compiler
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("pixels", [(9, 7), (128, 96)])
def test_mean_1000_deviation_1(norm, layout, pixels, passes, monkeypatch):
    monkeypatch.setenv("SPADE_FAST_HOST_PROCESSORS", "16")  # several splits
    arguments, dy = sample((2, 4, *pixels), norm, "leaky_relu", layout=layout, mean=1000.0)
    centred = arguments | {"x": arguments["x"].double() - 1000}  # as in test_modulate.py
    for name in {"running_mean", "running_var"} & arguments.keys():
        del arguments[name], centred[name]
    assert not disagreements(arguments, dy, centred)


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (2, 20, 1000), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_plane_moments(shape, layout, on_host, monkeypatch):
    monkeypatch.setenv("SPADE_FAST_HOST_PROCESSORS", "64")
    for dtype in DTYPES:
        x = layout(torch.randn(shape).to(dtype) + 1000)
        mean, squares = on_host.plane_moments(x)
        true_mean, true_squares = torch_backend.plane_moments(x.double())
        assert torch.allclose(mean.double(), true_mean, rtol=1e-7, atol=0)
        assert torch.allclose(squares.double(), true_squares, rtol=1e-5, atol=0)


@needs_compiler
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "gamma", "beta", "dy"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_nan_and_infinity_go_where_torch_has_them(special, where, activation, passes):
    arguments, dy = sample((2, 3, 4, 5), "instance", activation)
    (dy if where == "dy" else arguments[where])[0, 1, 2, 3] = special
    assert not disagreements(arguments, dy)


@needs_compiler
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6)])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_nothing_in_nothing_out(norm, shape, layout, rows, on_host):
    arguments, dy = sample(
        shape, norm, "leaky_relu", layout=layout, affine=norm == "batch", rows=rows
    )
    found = results(spade_fast.spade_modulate, arguments, dy)
    assert found["y"].shape == found["dx"].shape == shape
    assert not any(found[name].any() for name in ("dgamma", "dbeta"))


@needs_compiler
@pytest.mark.parametrize("rows", [None, 3, 40])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 60, 101), (2, 70, 9, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_splits_and_long_pieces_and_the_same_bits_in_every_order(
    layout, shape, rows, dtype, on_host, monkeypatch
):
    monkeypatch.setenv("SPADE_FAST_HOST_PROCESSORS", "64")
    monkeypatch.setenv("SPADE_FAST_HOST_SHARED", "0")
    arguments, dy = sample(shape, "instance", "leaky_relu", layout=layout, rows=rows, dtype=dtype)
    assert not disagreements(arguments, dy)
    found = []
    for order in ("reverse", "3"):
        monkeypatch.setenv("SPADE_FAST_HOST_ORDER", order)
        found.append(results(spade_fast.spade_modulate, arguments, dy))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@needs_compiler
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_as_the_fakes_say(layout, rows, passes):
    arguments, dy = sample(
        (2, 5, 3, 4), "instance", "relu", layout=layout, rows=rows, dtype=torch.bfloat16
    )
    x, gamma, beta = arguments["x"], arguments["gamma"], arguments["beta"]
    index = arguments["index"].int() if rows else None
    order = numbering.sort_pixels(index) if rows else None
    statistics = norms.measure(norms.Norm("instance"), torch_backend.plane_moments(x), 12)
    planes = norms.planes(statistics, x.shape[:2], None, None)
    signs = torch_backend.apply(x, planes, gamma, beta, index, "relu", 0.2, True)[1]
    ops = getattr(torch.ops, NAMESPACE)
    for name, given in {
        "plane_moments": (x,),
        "apply": (x, planes, gamma, beta, index, "relu", 0.2, True),
        "backward_sums": (dy, x, planes, gamma, None, index, order, signs, "relu", 0.2),
        "backward_input": (dy, x, planes, gamma, None, index, signs, None, "relu", 0.2),
        "instance_forward": (x, gamma, beta, index, 1e-5, "relu", 0.2, True),
        "instance_backward": (dy, x, planes, gamma, None, index, order, signs, "relu", 0.2),
    }.items():
        torch.library.opcheck(
            getattr(ops, name), given, test_utils=("test_schema", "test_faketensor")
        )
    assert torch.equal(ops.apply(x, planes, gamma, beta, index, "relu", 0.2, True)[1], signs)


@needs_compiler
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_what_is_out_of_range_stays_within_the_table(layout, passes, on_host):
    x, table = layout(torch.randn(2, 5, 3, 4)), torch.randn(7, 10)
    gamma, beta = table.chunk(2, dim=1)
    index = torch.randint(-9, 16, (2, 3, 4), dtype=torch.int32)
    last = index.clone()
    last[(index < 0) | (index >= 7)] = 6
    settings = (1e-5, "relu", 0.2, True)
    y, signs, planes = on_host.instance_forward(x, gamma, beta, index, *settings)
    expected, _, _ = on_host.instance_forward(x, gamma, beta, last, *settings)
    assert torch.equal(y, expected)
    order = torch.randint(-9, 30, (2, 12), dtype=torch.int32)  # nor is it sorted
    rest = (signs, "relu", 0.2)
    found = on_host.instance_backward(x, x, planes, gamma, None, index, order, *rest)
    assert all(gradient.isfinite().all() for gradient in found)


@needs_compiler
def test_errors_name_the_argument(on_host):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="gamma should be float32, bfloat16 or float16"):
        on_host.instance_forward(x, x.double(), x.double(), None, 1e-5, None, 0.2, False)
    with pytest.raises(RuntimeError, match="activation is gelu"):
        on_host.instance_forward(x, x, x, None, 1e-5, "gelu", 0.2, False)
    with pytest.raises(RuntimeError, match="beta is None, silu's derivative needs it"):
        on_host.instance_backward(
            x,
            x,
            torch.ones(3, 2, 3),
            x,
            None,
            None,
            None,
            x.new_empty(0, dtype=torch.uint8),
            "silu",
            0.2,
        )


def test_why_it_does_not_run(monkeypatch):
    x = torch.randn(2, 3, 4, 4)
    if torch.version.cuda is None:
        assert cuda_backend.why_not(x) == "this PyTorch is built without CUDA"
    monkeypatch.setattr(cuda_backend, "failure", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_backend.why_not(x) == "there is no CUDA GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_backend.why_not(x) == "x is on cpu, these kernels run on CUDA GPUs"
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7, minor=5)
    )
    assert cuda_backend.why_not() == "the GPU has compute capability 7.5, these kernels need 8.0"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_what_nvcc_makes_of_them():
    from benchmarks import cuda_proofs

    proofs = cuda_proofs.prove(capabilities=(80, 90))
    assert {proof.kernel for proof in proofs} >= {
        "apply_kernel",
        "forward_kernel",
        "backward_kernel",
        "sum_pieces_kernel",
    }
    assert not [(proof, proof.failures) for proof in proofs if proof.failures]
