"""`spade_modulate`: all outputs and gradients against the float64 reference."""

import itertools

import pytest
import torch
from agree import assert_agree
from conftest import use_threads
from modulations import (
    LAYOUTS,
    channels_last,
    contiguous,
    disagreements,
    eager_modulate,
    excess_without_gradients,
    results,
    running_statistics,
    sample,
    sliced,
    transposed,
)

import spade_fast
from spade_fast import reference

NORMS = ["instance", "batch", "syncbatch", "group", None]
ACTIVATIONS = [None, "relu", "leaky_relu", "silu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("backend_and_instruction_set")


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_activation_dtype_and_layout(norm, activation, dtype, layout, rows, plus_one):
    arguments, dy = sample(
        (2, 6, 9, 7),
        norm,
        activation,
        dtype=dtype,
        layout=layout,
        affine=norm is not None,
        rows=rows,
        plus_one=plus_one,
    )
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("norm", ["instance", "batch", "syncbatch", "group"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_training_and_affine(norm, affine, training, plus_one):
    arguments, dy = sample(
        (3, 4, 5, 6),
        norm,
        "leaky_relu",
        affine=affine,
        training=training,
        plus_one=plus_one,
    )
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("statistics_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics_without_gradients(dtype, statistics_dtype, affine, plus_one):
    arguments = running_statistics(dtype, statistics_dtype, affine) | {"plus_one": plus_one}
    assert excess_without_gradients(arguments) <= 1


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_without_the_one_and_without_gradients(norm, rows):
    arguments, _ = sample((2, 6, 9, 7), norm, "silu", rows=rows, plus_one=False)
    assert excess_without_gradients(arguments) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_the_one_gamma_is_not_rounded(dtype):
    arguments, _ = sample((2, 6, 9, 7), None, dtype=dtype, plus_one=False)
    x, gamma = arguments["x"], arguments["gamma"] * 2**-9  # 1 + γ would round it
    arguments |= {"gamma": gamma, "beta": torch.zeros_like(gamma)}
    assert torch.equal(spade_fast.spade_modulate(**arguments), x * gamma)


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 11), (2, 4, 1, 13), (2, 4, 13, 1), (1, 1, 3, 3), (3, 2, 3, 4, 5), (1, 10, 33, 31)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_every_layout_in_one_to_three_dimensions(shape, layout, norm, rows):
    arguments, dy = sample(shape, norm, "leaky_relu", layout=layout, num_groups=1, rows=rows)
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize(
    "layouts", list(itertools.permutations([contiguous, channels_last, sliced, transposed], 3))
)
def test_layouts_that_differ(layouts):
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


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("norm", ["instance", "batch", None])
@pytest.mark.parametrize(
    "out,rows",
    [("x", None), ("gamma", None), ("beta", None), ("another", None), ("x", 7), ("another", 7)],
)
def test_out_may_be_an_input(out, rows, norm, layout, activation, plus_one):
    arguments, _ = sample(
        (2, 6, 9, 7),
        norm,
        activation,
        layout=layout,
        rows=rows,
        training=False,
        plus_one=plus_one,
    )
    expected = eager_modulate(
        **{
            name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
    )
    out = arguments.get(out, layout(torch.empty(2, 6, 9, 7)))
    assert spade_fast.spade_modulate(**arguments, out=out) is out
    assert_agree(out, expected)


def test_backward_raises_if_a_tensor_that_it_needs_was_overwritten():
    weight = torch.ones(1, requires_grad=True)
    x, gamma, beta = torch.randn(3, 2, 4, 5, 6)
    product = (x * weight).sum()
    spade_fast.spade_modulate(x, gamma, beta, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        x = torch.randn(2, 4, 5, 6)
        spade_fast.spade_modulate(x, gamma, beta, out=x)


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 16, 64, 65])
@pytest.mark.parametrize("pixels", [(1, 3), (3, 5), (4, 4), (16, 16), (17, 1)])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_odd_sizes(channels, pixels, layout, rows):
    arguments, dy = sample(
        (2, channels, *pixels), "instance", "leaky_relu", layout=layout, rows=rows
    )
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma_dtype", DTYPES, ids=str)
def test_gamma_of_another_dtype(dtype, gamma_dtype, rows):
    arguments, dy = sample(
        (2, 4, 5, 6), "instance", "leaky_relu", dtype=dtype, gamma_dtype=gamma_dtype, rows=rows
    )
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("pixels", [(9, 7), (128, 96)])
def test_mean_1000_deviation_1(norm, dtype, layout, pixels):
    arguments, dy = sample(
        (2, 4, *pixels), norm, "leaky_relu", dtype=dtype, layout=layout, mean=1000.0
    )
    # No norm depends on a constant added to x. Without the constant, PyTorch's float64 is accurate
    # enough; with it, x·a + b loses three digits.
    centred = arguments | {"x": arguments["x"].double() - 1000}
    for name in {"running_mean", "running_var"} & arguments.keys():
        del arguments[name], centred[name]
    assert not disagreements(arguments, dy, centred)


@pytest.mark.parametrize("norm", ["instance", "batch", "group", None])
def test_constant_planes(norm):
    arguments, dy = sample((2, 4, 5, 6), norm, "leaky_relu")
    arguments["x"] = torch.full((2, 4, 5, 6), 3.0)
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "gamma", "beta", "dy"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm,training", [("instance", True), ("batch", False), (None, True)])
def test_nan_and_infinity_go_where_torch_has_them(special, where, activation, norm, training):
    arguments, dy = sample((2, 3, 4, 5), norm, activation, training=training)
    (dy if where == "dy" else arguments[where])[0, 1, 2, 3] = special
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("norm", ["instance", "batch", "group", None])
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6)])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_empty_inputs(norm, shape, layout, rows):
    arguments, dy = sample(
        shape, norm, "leaky_relu", layout=layout, affine=norm is not None, rows=rows
    )
    found = results(spade_fast.spade_modulate, arguments, dy)
    for name in ("y", "dx"):
        assert found[name].shape == shape
    for name in ("dgamma", "dbeta"):
        assert torch.equal(found[name], torch.zeros(arguments["gamma"].shape))
    for name in {"dweight", "dbias"} & found.keys():
        assert torch.equal(found[name], torch.zeros(4))
    for name in {"running_mean", "running_var"} & found.keys():
        assert torch.equal(found[name], arguments[name])


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_a_single_value_raises_the_same_error_as_torch(norm):
    arguments, dy = sample((1, 2, 1, 1), norm)
    messages = []
    for modulate in (spade_fast.spade_modulate, reference.spade_modulate):
        with pytest.raises(ValueError) as error:
            results(modulate, arguments, dy)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_one_pixel_is_enough_for_the_other_norms():
    for norm in ("batch", "group", None):
        arguments, dy = sample((3, 4, 1, 1), norm, "leaky_relu")
        assert not disagreements(arguments, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_and_dx_have_the_strides_of_x(layout):
    arguments, dy = sample((2, 5, 6, 7), "instance", "leaky_relu", layout=layout)
    found = results(spade_fast.spade_modulate, arguments, dy)
    expected = torch.empty_like(arguments["x"]).stride()
    assert found["y"].stride() == expected and found["dx"].stride() == expected


def test_momentum_eps_and_slope_are_used():
    arguments, dy = sample((2, 4, 5, 6), "batch", "leaky_relu")
    for setting in (
        {"momentum": 0.7},
        {"eps": 0.5},
        {"negative_slope": -0.3},
        {"negative_slope": 0.0},
    ):
        assert not disagreements(arguments | setting, dy)


@pytest.mark.float64
@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_and_second_derivatives_in_float64(
    norm, activation, training, rows, plus_one, backend_and_instruction_set
):
    arguments, _ = sample(
        (2, 4, 2, 3),
        norm,
        activation,
        dtype=torch.float64,
        training=training,
        affine=norm is not None,
        rows=rows,
        plus_one=plus_one,
    )
    names = [name for name in ("x", "gamma", "beta", "weight", "bias") if name in arguments]

    def modulate(*tensors):
        fresh = {
            name: arguments[name].clone()
            for name in ("running_mean", "running_var")
            if name in arguments
        }
        return spade_fast.spade_modulate(**arguments | fresh | dict(zip(names, tensors)))

    tensors = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(modulate, tensors)
    if backend_and_instruction_set == "cpu":  # these go through plain PyTorch with any backend
        assert torch.autograd.gradgradcheck(modulate, tensors)


@pytest.mark.float64
@pytest.mark.parametrize("plus_one", [True, False])
def test_second_derivatives_if_gamma_is_computed_from_x(plus_one):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def penalty(modulate):
        y = modulate(x, x.square(), x.sin(), activation="silu", plus_one=plus_one)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    ours, theirs = penalty(spade_fast.spade_modulate), penalty(reference.spade_modulate)
    assert_agree(ours, theirs)


@pytest.mark.float64
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize(
    "frozen", [("x",), ("gamma", "beta"), ("x", "gamma", "beta"), ("weight", "bias")]
)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("plus_one", [True, False])
def test_only_what_needs_a_gradient_gets_one(frozen, create_graph, rows, plus_one):
    arguments, dy = sample(
        (2, 4, 5, 6),
        "instance",
        "leaky_relu",
        affine=True,
        dtype=torch.float64,
        rows=rows,
        plus_one=plus_one,
    )
    wanted = {
        name: arguments[name].requires_grad_()
        for name in ("x", "gamma", "beta", "weight", "bias")
        if name not in frozen
    }
    found = []
    for modulate in (spade_fast.spade_modulate, eager_modulate):
        y = modulate(**arguments)
        found.append(torch.autograd.grad(y, list(wanted.values()), dy, create_graph=create_graph))
    assert_agree(*found)


def test_given_moments_are_used():
    arguments, dy = sample((2, 4, 5, 6), "batch", "leaky_relu", affine=True)
    moments = spade_fast.plane_moments(arguments["x"])

    def modulate(*tensors, **settings):
        return spade_fast.spade_modulate(*tensors, **settings, moments=moments)

    ours, plain = (
        results(function, arguments, dy) for function in (modulate, spade_fast.spade_modulate)
    )
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    arguments["moments"] = moments + 1
    assert not torch.equal(spade_fast.spade_modulate(**arguments), plain["y"])


@pytest.mark.large
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_every_run_gives_the_same_bits_on_any_number_of_threads(
    norm, layout, rows, backend_and_instruction_set
):
    arguments, dy = sample((2, 70, 65, 66), norm, "leaky_relu", layout=layout, rows=rows)
    found = []
    for threads in (1, 2, 2, 7) if backend_and_instruction_set != "torch" else (2, 2):
        with use_threads(threads):
            found.append(results(spade_fast.spade_modulate, arguments, dy))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.large
@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 300, 301), (2, 600, 9, 11)])
def test_several_tasks_to_a_plane_and_several_blocks_to_a_row(layout, shape, rows, plus_one):
    arguments, dy = sample(
        shape, "instance", "leaky_relu", layout=layout, rows=rows, plus_one=plus_one
    )
    assert not disagreements(arguments, dy)


@pytest.mark.large
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_large_enough_to_bypass_the_caches(layout, dtype):
    # Among millions of elements of y, rounding may decide the sign of a few. With the CPU's random
    # numbers, there are none.
    activation = "leaky_relu" if torch.get_default_device().type == "cpu" else "silu"
    shape = (4 // dtype.itemsize, 3, 1201, 701)
    arguments, dy = sample(shape, "instance", activation, layout=layout, dtype=dtype)
    assert not disagreements(arguments, dy)


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize(
    "activation,floats,bits", [(None, 2, 0), ("relu", 2, 1), ("leaky_relu", 2, 1), ("silu", 3, 0)]
)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_memory_kept_for_backward(activation, floats, bits, layout, rows):
    arguments, _ = sample((1, 16, 32, 32), "instance", activation, layout=layout, rows=rows)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    for name in ("x", "gamma", "beta"):
        arguments[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = spade_fast.spade_modulate(**arguments)
    planes = 16 * 4 * 8  # a few values per plane
    # or γ and, for SiLU, β, which are small as a table; the index takes four bytes per pixel
    gammas = floats - 1
    dense = gammas if rows is None else 0
    table = 0 if rows is None else 4 * (32 * 32 + gammas * rows * 16)
    assert sum(kept.values()) <= y.numel() * (4 * (1 + dense) + bits / 8) + planes + table


def test_gradients_after_x_was_changed_in_place_are_an_error():
    arguments, dy = sample((2, 4, 5, 6))
    gamma = arguments["gamma"].requires_grad_()
    y = spade_fast.spade_modulate(arguments["x"], gamma, arguments["beta"])
    arguments["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)
