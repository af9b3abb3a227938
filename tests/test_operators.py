"""The operators themselves: schemas, fakes, and the compiled kernels that are available."""

import itertools

import pytest
import torch
from agree import ONCE, assert_agree
from conftest import INSTRUCTION_SETS, use_instruction_set, use_threads
from modulations import LAYOUTS, channels_last, contiguous, sample
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map
from window_lists import CHOICES, CONVOLUTIONS, convolution, in_double

import spade_fast
from spade_fast.kernels import contract, cpu_backend, cuda_backend, numbering, torch_backend
from spade_fast.ops import norms

needs_library = pytest.mark.skipif(cpu_backend.library is None, reason=str(cpu_backend.failure))


def operands(shape, activation, dtype=torch.float32, layout=contiguous, affine=True, rows=None):
    """The kernels' operands for this sample: x, planes, γ, β, index, order, dy, signs, terms."""
    arguments, dy = sample(
        shape,
        "instance",
        activation,
        dtype=dtype,
        layout=layout,
        dy_layout=layout,
        affine=affine,
        rows=rows,
    )
    x, gamma, beta = arguments["x"], arguments["gamma"], arguments["beta"]
    statistics = norms.measure(
        norms.Norm("instance"), torch_backend.plane_moments(x), x.shape[2:].numel()
    )
    planes = norms.planes(statistics, x.shape[:2], arguments["weight"], arguments["bias"])
    index = arguments["index"].int() if rows else None
    order = numbering.sort_pixels(index) if rows else None
    _, signs = torch_backend.apply(x, planes, gamma, beta, index, activation, 0.2, True)
    return x, planes, gamma, beta, index, order, dy, signs, torch.randn_like(planes[:2])


@pytest.mark.pairs
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
@pytest.mark.parametrize(
    "dtype,shape", [(torch.float32, (2, 5, 3, 4)), (torch.bfloat16, (1, 9, 7))], ids=str
)
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("plus_one", [True, False])
def test_opcheck(layout, activation, dtype, shape, rows, plus_one):
    ops = torch.ops.spade_fast
    x, planes, gamma, beta, index, order, dy, signs, terms = operands(
        shape, activation, dtype, layout, rows=rows
    )
    kept_beta = beta if activation == "silu" else None
    opcheck(ops.plane_moments, (x,))
    channels = torch.rand(2, x.shape[1])
    opcheck(ops.running_planes, (x, *channels, None, None, 1e-5))
    opcheck(ops.running_planes, (x, *channels, *channels, 1e-5))
    moments = torch_backend.plane_moments(x)
    opcheck(ops.batch_planes, (x, moments, None, None, 1e-5))
    opcheck(ops.batch_planes, (x, moments, *channels, 1e-5))
    opcheck(ops.batch_terms, (x, terms, channels[:1], None))
    opcheck(ops.batch_terms, (x, terms, channels[:1], channels[1]))
    forward, settings = (
        (x, planes, gamma, beta, index, activation, 0.2),
        (activation, 0.2, plus_one),
    )
    opcheck(ops.apply, (*forward, True, plus_one))
    opcheck(ops.apply, (*forward, False, plus_one))
    opcheck(ops.apply_out, (*forward, torch.empty_like(x), plus_one))
    backward = (dy, x, planes, gamma, kept_beta, index)
    opcheck(ops.backward_sums, (*backward, order, signs, *settings))
    opcheck(ops.backward_input, (*backward, signs, terms, *settings))
    opcheck(ops.backward_input, (*backward, signs, None, *settings))
    opcheck(ops.instance_forward, (x, gamma, beta, index, 1e-5, activation, 0.2, True, plus_one))
    opcheck(ops.instance_backward, (*backward, order, signs, *settings))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_signs_are_the_documented_bits(layout):
    x, planes, gamma, beta, _, _, _, signs, _ = operands((2, 5, 3, 4), "leaky_relu", layout=layout)
    y, _ = torch_backend.apply(x, planes, gamma, beta, None, None, 0.0, False)
    rows = y.flatten(2) if layout is contiguous else y.flatten(2).transpose(1, 2)
    assert signs.shape == (*rows.shape[:2], (rows.shape[2] + 7) // 8)
    for element in range(rows.shape[2]):
        bit = signs[:, :, element // 8] >> (element % 8) & 1
        assert torch.equal(bit.bool(), rows[:, :, element] > 0)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", contract.FLOATING, ids=str)
def test_compiled_convolutions_at_windows(sizes, dtype, instruction_set):
    """In half precision, each result is rounded once, however many terms it has."""
    rows, weights, biases, lists, back_lists, gradients = convolution(*sizes, dtype)
    for chosen in CHOICES:
        own, of_results = weights[chosen], gradients[chosen]
        for name, arguments in [
            ("convolve_windows", (rows, own, biases[chosen], *lists)),
            ("convolve_windows", (rows, own, [None] * len(own), *lists)),
            ("convolve_windows", (rows, own, biases[chosen], *lists, True)),
            ("convolve_windows_weights", (of_results, rows, own, *back_lists)),
            ("convolve_windows_rows", (of_results, own, *back_lists)),
        ]:
            truth = getattr(torch_backend, name)(*tree_map(in_double, arguments))
            with use_instruction_set(instruction_set):
                found = getattr(torch.ops.spade_fast, name)(*arguments)
            assert_agree(found, truth, name=name)
            for result in tree_leaves(found):
                assert result.dtype == dtype and result.is_contiguous()


def behind_a_relu(shape, kernel, rows, windows, dtype):
    """Operands as of `convolution`, with half of the rows' numbers zero."""
    hidden, *others = convolution(shape, kernel, rows, windows, dtype)
    return hidden.relu(), *others


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [((33, 130), (3, 3), 71, 90), ((16, 3), (3, 3, 3), 300, 40)])
def test_zeros_left_out_change_no_bit(sizes, dtype, instruction_set):
    """Beside them, rows that no window sees and that have no zeros make the kernels multiply all
    numbers.
    """
    rows, weights, biases, lists, back_lists, gradients = behind_a_relu(*sizes, dtype)
    ops, all_rows = torch.ops.spade_fast, torch.cat([rows, torch.ones_like(rows)])
    offsets, listed = back_lists
    more_offsets = torch.cat([offsets, offsets[-1:].expand(len(offsets) - 1)])
    with use_instruction_set(instruction_set):
        dense = ops.convolve_windows(all_rows, weights, biases, *lists)
        of_weights = ops.convolve_windows_weights(
            gradients, all_rows, weights, more_offsets, listed
        )
        for threads in (1, 2, 7):
            with use_threads(threads):
                assert torch.equal(ops.convolve_windows(rows, weights, biases, *lists), dense)
                found = ops.convolve_windows_weights(gradients, rows, weights, offsets, listed)
                assert all(map(torch.equal, found, of_weights))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", contract.FLOATING, ids=str)
def test_threads_and_other_weights_change_no_bit(dtype, instruction_set):
    """Only the gradient of the rows depends on all weights."""
    rows, weights, biases, lists, back_lists, gradients = behind_a_relu(
        (70, 33), (3, 3), 71, 90, dtype
    )
    found = []
    with use_instruction_set(instruction_set):
        for threads in (1, 2, 7):
            with use_threads(threads):
                found.append(all_of(rows, weights, biases, lists, back_lists, gradients))
        each = [
            all_of(rows, *(given[chosen] for given in (weights, biases)), lists, back_lists, own)
            for chosen in CHOICES[:2]
            for own in [gradients[chosen]]
        ]
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    result, _, *of_weights = found[0]
    assert torch.equal(result, torch.cat([one for one, *_ in each], dim=1))
    assert all(map(torch.equal, of_weights, [one for *_, one in each]))


def all_of(rows, weights, biases, lists, back_lists, gradients):
    """The results of the convolutions, with ReLU, the gradient of the rows and those of the
    weights.
    """
    ops = torch.ops.spade_fast
    return (
        ops.convolve_windows(rows, weights, biases, *lists, True),
        ops.convolve_windows_rows(gradients, weights, *back_lists),
        *ops.convolve_windows_weights(gradients, rows, weights, *back_lists),
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_gradients_of_many_terms_round_little(instruction_set):
    """As one chain of 18,432 additions, the rows' gradient was up to 4e-6 off, and as one of 5,000
    the weights' up to 2e-6.
    """
    of_channels = convolution((2048, 16), (3, 3), 36, 36, torch.float32)
    of_rows = convolution((16, 16), (3, 3), 5000, 5000, torch.float32)
    for (rows, weights, _, _, back_lists, gradients), name in [
        (of_channels, "convolve_windows_rows"),
        (of_rows, "convolve_windows_weights"),
    ]:
        given = (rows,) if name == "convolve_windows_weights" else ()
        arguments = (gradients, *given, weights, *back_lists)
        truth = getattr(torch_backend, name)(*tree_map(in_double, arguments))
        with use_instruction_set(instruction_set):
            found = getattr(torch.ops.spade_fast, name)(*arguments)
        for own, exact in zip(tree_leaves(found), tree_leaves(truth)):
            assert (own - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("number", [float("inf"), float("nan"), 3e38])
def test_zeros_times_infinity_are_not_left_out(number, instruction_set):
    """3e38 is finite, but the sum of two is not."""
    rows, weights, _, lists, back_lists, gradients = behind_a_relu(
        (20, 70), (3, 3), 40, 60, torch.float32
    )
    weights[0][3, 69, 1, 1] = weights[1][2, 68, 0, 1] = number
    gradients[0][7:40, 17] = gradients[1][7:40, 3] = number
    for name, arguments in [
        ("convolve_windows", (rows, weights, [None, None], *lists)),
        ("convolve_windows", (rows, weights, [None, None], *lists, True)),
        ("convolve_windows_weights", (gradients, rows, weights, *back_lists)),
    ]:
        truth = getattr(torch_backend, name)(*arguments)
        for own in tree_leaves(truth):
            assert own.isnan().any() or (name, number) == ("convolve_windows", 3e38)
        with use_instruction_set(instruction_set):
            assert_agree(getattr(torch.ops.spade_fast, name)(*arguments), truth, name=name)


@pytest.mark.parametrize("piece", [1, 3, 256])
@pytest.mark.parametrize("rows,windows", [(7, 400), (70, 4)])  # long lists, and many empty ones
def test_long_lists_are_summed_in_pieces(rows, windows, piece, monkeypatch):
    monkeypatch.setattr(torch_backend, "PIECE", piece)
    *_, (offsets, listed), (gradient, _) = convolution((5, 3), (3, 3), rows, windows)
    truth = torch.stack(
        [gradient[one.long()].sum(0) for one in listed.split(offsets.diff().tolist())]
    )
    assert_agree(
        torch_backend._sum_pieces(gradient, *torch_backend._in_pieces(offsets, listed)), truth
    )


@pytest.mark.parametrize("sizes", [*CONVOLUTIONS, ((3, 4), (7, 7, 8), 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_convolutions_at_windows_as_on_a_gpu(sizes, dtype):
    """In half precision, each result is rounded once, however many terms it has."""
    rows, weights, biases, lists, _, _ = convolution(*sizes, dtype)
    for chosen in CHOICES:
        for relu in (False, True):
            given = (rows, weights[chosen], biases[chosen], *lists, relu)
            found = cuda_backend.convolve_windows(*given)
            assert found.dtype == dtype
            assert_agree(found, torch_backend.convolve_windows(*tree_map(in_double, given)))


def test_opcheck_of_the_convolutions_at_windows():
    rows, weights, biases, lists, back_lists, gradients = convolution((5, 3), (3, 3), 7, 20)
    ops = torch.ops.spade_fast
    for chosen in CHOICES:
        own, of_results = weights[chosen], gradients[chosen]
        opcheck(ops.convolve_windows, (rows, own, biases[chosen], *lists))
        opcheck(ops.convolve_windows, (rows, own, biases[chosen], *lists, True))
        opcheck(ops.convolve_windows_weights, (of_results, rows, own, *back_lists))
        opcheck(ops.convolve_windows_rows, (of_results, own, *back_lists))
    opcheck(ops.sum_lists, (gradients[0], *back_lists))


@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("products", [1, torch_backend.PRODUCTS])
def test_gradients_from_sums_of_listed_rows(sizes, products, monkeypatch):
    """As on a GPU, in one part and in several."""
    monkeypatch.setattr(torch_backend, "PRODUCTS", products)
    rows, weights, _, lists, back_lists, gradients = convolution(*sizes)
    inputs = [rows.requires_grad_(), *(weight.requires_grad_() for weight in weights)]
    windows = torch.arange(len(gradients[0])).repeat_interleave(lists[0].diff())
    results = []
    for weight, gradient in zip(weights, gradients):
        by_tap = weight.flatten(2).permute(2, 0, 1)
        seen = torch.einsum("toi,ri->rto", by_tap, rows).flatten(0, 1)[lists[1].long()]
        results.append(torch.zeros_like(gradient).index_add(0, windows, seen))
    truths = torch.autograd.grad(results, inputs, gradients)
    with torch.no_grad():
        of_rows, of_weights = cuda_backend.convolve_windows_gradients(
            gradients, rows, weights, *back_lists
        )
        assert_agree((of_rows, *of_weights), truths)
        only = cuda_backend.convolve_windows_gradients(
            gradients[:1], rows, weights[:1], *back_lists, False
        )
        assert_agree(only, (None, truths[1:2]))


@pytest.mark.parametrize("rows", [0, 57, 3001, 12345, 10**9])
def test_parts_of_a_convolution_have_a_multiple_of_16_channels(rows):
    channels = torch_backend._channels_at_a_time(rows, torch.empty(4, 5, 3, 3, device="meta"))
    assert channels % 16 == 0 and channels >= 16
    assert channels == 16 or channels * rows * 9 * 4 <= torch_backend.PRODUCTS


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 3, 7),
        (3, 70, 5000),
        (2, 65, 67, 64),
        (2, 3, 4, 5, 6),
        (1, 1, 2, 1),
        (0, 3, 4, 4),
        (2, 3, 0, 4),
    ],
)
def test_compiled_plane_moments(layout, dtype, shape):
    x = layout(torch.randn(shape).to(dtype) + 1000)
    mean, squares = torch.ops.spade_fast.plane_moments(x)
    true_mean, true_squares = torch_backend.plane_moments(x.double())
    assert mean.dtype == torch.promote_types(dtype, torch.float32)
    # Combined in double precision: a rounding of the result, or in float64 one for each run of the
    # plane.
    assert_agree(mean, true_mean, 16 if dtype == torch.float64 else ONCE)
    assert_agree(squares, true_squares, 64)  # float32 sums of up to 2048 terms


def test_nan_stays_in_its_plane():
    x = torch.randn(2, 3, 4, 5)
    x[1, 2, 3, 4] = float("nan")
    for moments in (torch.ops.spade_fast.plane_moments(x), torch_backend.plane_moments(x)):
        assert torch.equal(moments[0].isnan().nonzero(), torch.tensor([[1, 2]]))
        assert torch.equal(moments[1].isnan().nonzero(), torch.tensor([[1, 2]]))


BAD = {
    "order": torch.full((1, 12), 99, dtype=torch.int32),
    "index": torch.full((1, 3, 4), 4, dtype=torch.int32),
    "gamma": torch.randn(4, 1),
    "dy": torch.randn(1, 2, 3, 4, dtype=torch.float64),
    "planes": torch.randn(3, 1, 1),
    "signs": torch.zeros(1, 2, 1, dtype=torch.uint8),
}


@needs_library
@pytest.mark.parametrize("name", BAD)
def test_a_bad_operand_is_refused_and_named(name):
    x, table = torch.randn(1, 2, 3, 4), torch.randn(4, 2)
    index = torch.arange(12, dtype=torch.int32).view(1, 3, 4) % 4
    arguments = {
        "dy": torch.randn_like(x),
        "x": x,
        "planes": torch.randn(3, 1, 2),
        "gamma": table,
        "beta": None,
        "index": index,
        "order": numbering.sort_pixels(index),
        "signs": torch.zeros(1, 2, 2, dtype=torch.uint8),
        "activation": "relu",
        "negative_slope": 0.2,
    }
    ops = torch.ops.spade_fast
    ops.backward_sums(*arguments.values())
    for operator in (ops.backward_sums, ops.instance_backward):
        with pytest.raises(RuntimeError, match=f"spade_fast: {name} "):
            operator(*(arguments | {name: BAD[name]}).values())


@needs_library
def test_bad_operands_of_the_convolutions_at_windows_are_refused_and_named():
    """By the check in Python and by the kernel's."""
    rows, weights, biases, lists, back_lists, gradients = convolution((6, 4), (3, 3), 7, 5)
    number, three = torch.tensor(1.0).double(), weights[1][:, 1:]
    forward = [
        ("rows has shape", (number, weights, biases, *lists)),
        ("rows has shape", (rows[:, 1:], weights, biases, *lists)),
        ("rows has dtype", (rows.int(), weights, biases, *lists)),
        ("weights has dtype", (rows.float(), weights, biases, *lists)),
        ("weights has dtype", (rows, [weights[0], weights[1].half()], biases, *lists)),
        ("weights has shape", (rows, [weights[0], three], biases, *lists)),
        ("weights has shape", (rows, [weights[0], rows], biases, *lists)),
        ("weights has shape", (rows, [weights[0][..., :0]], [None], *lists)),
        ("biases has length 0 and weights has length 0", (rows, [], [], *lists)),
        ("biases has length 1 and weights has length 2", (rows, weights, biases[:1], *lists)),
        ("biases has shape", (rows, weights, [None, biases[0]], *lists)),
        ("biases has dtype", (rows, weights, [biases[0].half(), None], *lists)),
        ("offsets has dtype", (rows, weights, biases, lists[0].long(), lists[1])),
    ]
    of_rows = [
        ("gradients has length 0", ([], weights, *back_lists)),
        ("gradients has length 1 and weights has length 2", (gradients[:1], weights, *back_lists)),
        ("gradients has shape", ([number, number], weights, *back_lists)),
        ("gradients has shape", (gradients[::-1], weights, *back_lists)),
        ("gradients has shape", ([gradients[0], gradients[1][1:]], weights, *back_lists)),
        ("gradients has dtype", ([gradients[0], gradients[1].half()], weights, *back_lists)),
        ("weights has shape", (gradients, [weights[0], three], *back_lists)),
        ("listed has dtype", (gradients, weights, back_lists[0], back_lists[1].long())),
    ]
    of_weights = [
        ("gradients has shape", (gradients[::-1], rows, weights, *back_lists)),
        ("rows has shape", (gradients, rows[1:], weights, *back_lists)),
        ("rows has shape", (gradients, number, weights, *back_lists)),
        ("rows has dtype", (gradients, rows.half(), weights, *back_lists)),
    ]
    for name, calls in [
        ("convolve_windows", forward),
        ("convolve_windows_rows", of_rows),
        ("convolve_windows_weights", of_weights),
    ]:
        for message, operands in calls:
            with pytest.raises((ValueError, TypeError), match=f"^{message}"):
                contract.CONVOLUTION[name].check(*operands)
            with pytest.raises(RuntimeError, match=f"spade_fast: {message}"):
                getattr(torch.ops.spade_fast, name)(*operands)


def test_an_order_that_is_not_sorted_is_refused():
    x, table = torch.randn(1, 2, 3, 4), torch.randn(4, 2, requires_grad=True)
    index = torch.randint(4, (1, 3, 4), dtype=torch.int32)
    order = numbering.sort_pixels(index)
    with spade_fast.use_backend("cpu"):
        for bad in (order.flip(1), torch.zeros_like(order), order + 2**20):
            y = spade_fast.spade_modulate(x, table, table, index=index, order=bad)
            with pytest.raises(RuntimeError, match="spade_fast: order "):
                y.sum().backward()


# Tiles have 16 channels (8 in float64) and 1024 pixels, tasks 2048, bands of sorted pixels 256.
@needs_library
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    "shape", [(2, 17, 33, 63), (1, 40, 1025), (3, 16, 1), (2, 1, 257)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("plus_one", [True, False])
def test_tables_are_looked_up_and_summed_in_tiles(
    instruction_set, dtype, shape, activation, plus_one
):
    x, planes, _, _, _, _, dy, signs, terms = operands(shape, activation, dtype)
    gamma, beta = torch.randn(301, 2 * shape[1]).to(dtype).chunk(2, dim=1)
    runs = torch.randint(300, (shape[0], x[0, 0].numel() // 7 + 1), dtype=torch.int32)
    index = runs.repeat_interleave(7, dim=1)[:, : x[0, 0].numel()]
    index = torch.where(torch.rand(index.shape) < 0.3, 5, index).view(shape[0], *shape[2:])
    order = numbering.sort_pixels(index)
    table, settings = (planes, gamma, beta, index), (activation, 0.2, plus_one)
    forward = (x, *table, activation, 0.2, True, plus_one)
    with use_instruction_set(instruction_set):
        y, signs = torch.ops.spade_fast.apply(*forward)
        expected, _ = torch_backend.apply(*forward)
        assert_agree(y, expected)
        backward, found = (dy, x, planes, gamma, beta, index), []
        for threads in (1, 2, 7):
            with use_threads(threads):
                found.append(
                    (
                        torch.ops.spade_fast.backward_input(*backward, signs, terms, *settings),
                        *torch.ops.spade_fast.backward_sums(*backward, order, signs, *settings),
                    )
                )
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    assert_agree(
        found[0],
        (
            torch_backend.backward_input(*backward, signs, terms, *settings),
            *torch_backend.backward_sums(*backward, order, signs, *settings),
        ),
    )


def permuted(order):
    """A function that stores x with its dimensions in this order in memory."""
    inverse = [order.index(dim) for dim in range(len(order))]
    return lambda x: x.permute(order).contiguous().permute(inverse)


ODD_LAYOUTS = {
    **{f"permuted {order}": permuted(order) for order in itertools.permutations(range(4))},
    "every second": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "sliced, channels last": lambda x: channels_last(torch.cat([x, x], dim=1))[:, : x.shape[1]],
    "one image expanded": lambda x: x[:1].expand_as(x),
    "one pixel expanded": lambda x: x[..., :1, :1].expand_as(x),
}


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 1, 3, 1), (1, 5, 1, 3)], ids=str)
def test_results_have_the_strides_of_the_fakes(shape):
    ops = torch.ops.spade_fast
    for layout in ODD_LAYOUTS.values():
        x, gamma, beta = layout(torch.randn(shape)), torch.randn(shape), torch.randn(shape)
        y, signs, planes = ops.instance_forward(x, gamma, beta, None, 1e-5, "relu", 0.2, True)
        assert torch._prims_common.check_significant_strides(y, torch.empty_like(x))[0]
        forward = (x, planes, gamma, beta, None, "relu", 0.2, True)
        backward = (torch.randn(shape), x, planes, gamma, None, None)
        utils = {"test_utils": ("test_faketensor",)}
        opcheck(ops.apply, forward, **utils)
        opcheck(ops.instance_forward, (x, gamma, beta, None, 1e-5, "relu", 0.2, True), **utils)
        opcheck(ops.backward_input, (*backward, signs, None, "relu", 0.2), **utils)
        opcheck(ops.instance_backward, (*backward, None, signs, "relu", 0.2), **utils)


@pytest.mark.parametrize("name", ["permuted (0, 3, 2, 1)", "permuted (2, 3, 0, 1)"])
def test_a_compiled_modulation_of_an_odd_layout(name):
    x = ODD_LAYOUTS[name](torch.randn(2, 5, 3, 4)).requires_grad_()
    gamma, beta = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)

    def function(x):
        return spade_fast.spade_modulate(x, gamma, beta, activation="silu") * 2

    y, compiled = function(x), torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, compiled) and y.stride() == compiled.stride() == x.stride()
    (expected,), (found,) = (torch.autograd.grad(one.sum(), x) for one in (y, compiled))
    assert torch.equal(expected, found)
