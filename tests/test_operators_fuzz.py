"""The native operators and functions with random arguments, valid and invalid: a call either
raises, or agrees with plain PyTorch.

FUZZ_EXAMPLES is the number of examples of each; by default there are a few, always the same. A
wrong read or write is most likely to show under AddressSanitizer: docs/pages/design.md.
"""

import os

import numpy as np
import pytest
import torch
from agree import assert_agree
from conftest import INSTRUCTION_SETS, use_instruction_set
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

from spade_fast.kernels import contract, cpu_backend, numbering, torch_backend

pytestmark = pytest.mark.skipif(cpu_backend.library is None, reason=str(cpu_backend.failure))

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
choices = given(st.randoms(use_true_random=False))

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]
NUMBERS = [-(2**31), -2, -1, 0, 1, 2, 5, 100, 2**20, 2**31 - 1]
SIZES = [0, 1, 1, 2, 2, 3, 3, 5, 8, 9, 17]
LARGE = [*SIZES, 33, 257, 300]


def laid_out(choose, tensor):
    """The same values with the dimensions in another order in memory, and NaNs between them."""
    if choose.random() < 0.4:
        return tensor
    order = choose.sample(range(tensor.dim()), tensor.dim())
    steps = [choose.choice([1, 1, 1, 2]) for _ in order]
    before = [choose.choice([0, 0, 1]) for _ in order]
    sizes = [tensor.shape[dim] * step + pad for dim, step, pad in zip(order, steps, before)]
    filling = float("nan") if tensor.is_floating_point() else 77
    larger = torch.full(sizes, filling, dtype=tensor.dtype)
    inside = larger[tuple(slice(pad, None, step) for step, pad in zip(steps, before))]
    return inside.permute([order.index(dim) for dim in range(tensor.dim())]).copy_(tensor)


def random(choose, shape, dtype):
    return laid_out(choose, torch.randn(shape).to(dtype))


def modulation(choose):
    """Operands of the modulation's operators, by name."""
    spatial = [choose.choice(SIZES) for _ in range(choose.choice([1, 2, 2, 3]))]
    shape = (choose.choice(SIZES), choose.choice(LARGE), *spatial)
    x_dtype, dtype = choose.choice(FLOATS), choose.choice(FLOATS)
    x = random(choose, shape, x_dtype)
    index = order = None
    if choose.random() < 0.5:
        rows = choose.randint(1, 9)
        index = laid_out(choose, torch.randint(rows, (shape[0], *spatial), dtype=torch.int32))
        order = laid_out(choose, numbering.sort_pixels(index))
        gamma, beta = random(choose, (rows, 2 * shape[1]), dtype).split([shape[1]] * 2, dim=1)
    else:
        gamma, beta = random(choose, shape, dtype), random(choose, shape, dtype)
    activation = choose.choice([None, "relu", "leaky_relu", "silu"])
    wide = contract.sum_dtype(x_dtype)
    planes = random(choose, (3, *shape[:2]), wide)
    plus_one = choose.random() < 0.5
    y, signs = torch_backend.apply(x, planes, gamma, beta, index, activation, 0.2, True, plus_one)
    out = y.movedim(1, -1) if contract.is_channels_last(x) else y
    out = torch.empty(out.shape, dtype=y.dtype)
    channels = {
        name: random(choose, shape[1:2], choose.choice(FLOATS))
        for name in ("mean", "variance", "weight", "bias")
    }
    channels["variance"] = channels["variance"].abs()
    for name in ("weight", "bias"):
        channels[name] = choose.choice([None, channels[name]])
    return channels | {
        "x": x,
        "planes": planes,
        "moments": laid_out(choose, torch.randn(2, *shape[:2]).to(wide).abs()),
        "sums": random(choose, (2, *shape[:2]), wide),
        "inverse_deviation": random(choose, (1, shape[1]), wide),
        "gamma": gamma,
        "beta": beta,
        "index": index,
        "order": order,
        "dy": random(choose, shape, torch.promote_types(x_dtype, dtype)),
        "signs": laid_out(choose, signs) if signs.numel() else signs,
        "terms": choose.choice([None, random(choose, (2, *shape[:2]), wide)]),
        "eps": 1e-2,
        "activation": activation,
        "negative_slope": 0.2,
        "plus_one": plus_one,
        "keep_signs": choose.random() < 0.5,
        "out": out.movedim(-1, 1) if contract.is_channels_last(x) else out,
    }


def convolution(choose):
    """Operands of the operators of the convolutions at windows, by name."""
    kernel = choose.choice([(1,), (3,), (2, 3), (3, 3), (2, 1, 2)])
    outputs = [choose.choice(LARGE[:-2]) for _ in range(choose.choice([1, 2, 2, 3]))]
    channels, rows, windows = (choose.choice(LARGE[:-2]) for _ in range(3))
    dtype, taps = choose.choice(FLOATS), torch.Size(kernel).numel()
    contents = torch.randint(-1, max(rows, 1), (windows, taps), dtype=torch.int32)
    contents = contents if rows else torch.full_like(contents, -1)
    lists = numbering.list_windows(contents, rows, int((contents >= 0).sum()))
    hidden = random(choose, (rows, channels), dtype)
    if choose.random() < 0.5:
        hidden.relu_()
    names = ("offsets", "listed", "back_offsets", "back_listed")
    return {
        "rows": hidden,
        "weights": [random(choose, (out, channels, *kernel), dtype) for out in outputs],
        "biases": [choose.choice([None, random(choose, (out,), dtype)]) for out in outputs],
        "gradients": [random(choose, (windows, out), dtype) for out in outputs],
        "relu": choose.random() < 0.5,
    } | {name: laid_out(choose, numbers) for name, numbers in zip(names, lists)}


def spoiled(choose, name, value):
    """An argument's value, replaced by another that is probably invalid."""
    if name == "activation":
        return choose.choice(["gelu", "relu", "silu", None])
    if value is None:
        return random(choose, (2, 3), choose.choice(FLOATS)).to(choose.choice(DTYPES))
    if isinstance(value, list):
        return spoiled_list(choose, name, value)
    if not isinstance(value, torch.Tensor):
        return value
    ways = ["dtype", "size", "size", "dims", "larger"]
    if not value.is_floating_point() and value.numel():
        ways += ["number"] * 8
    way = choose.choice(ways)
    if way == "number":
        value = value.clone(memory_format=torch.contiguous_format)
        for _ in range(choose.randint(1, 3)):
            number = choose.choice(NUMBERS)
            value.view(-1)[choose.randrange(value.numel())] = (
                number % 256 if value.dtype == torch.uint8 else number
            )
        return value
    if way == "dtype":
        return value.to(choose.choice(DTYPES))
    if way == "dims":
        return choose.choice([value[None], value.flatten(), value.sum().to(value.dtype)])
    sizes = list(value.shape)
    for dim in choose.sample(range(len(sizes)), min(len(sizes), 1 if way == "larger" else 2)):
        change = 2**40 if way == "larger" else choose.choice([-1, 1, 2, -1000])
        sizes[dim] = max(0, sizes[dim] + change)
    return value.new_ones(()).expand(sizes) if way == "larger" else value.new_ones(sizes)


def spoiled_list(choose, name, values):
    """The list with one value less or more, or with one of them spoiled."""
    way = choose.choice(["less", "more", "one", "one", "one"])
    if way == "less" or not values:
        return values[1:]
    if way == "more":
        return [*values, choose.choice(values)]
    place = choose.randrange(len(values))
    return [*values[:place], spoiled(choose, name, values[place]), *values[place + 1 :]]


def call(choose, name, operands):
    """The arguments of a call, by name, and how many of them are spoiled."""
    schema = getattr(torch.ops.spade_fast, name).default._schema
    arguments = {argument.name: operands[argument.name] for argument in schema.arguments}
    if "dy" in arguments and arguments["activation"] != "silu":
        arguments["beta"] = choose.choice([None, arguments["beta"]])
    bad = choose.sample(sorted(arguments), min(len(arguments), choose.choice([0, 1, 1, 2])))
    for argument in bad:
        arguments[argument] = spoiled(choose, argument, arguments[argument])
    return arguments, len(bad)


def on_meta(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def attempt(function, arguments):
    """A call's results as a tuple, or the error that it raises."""
    try:
        found = function(*arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
        return error
    return found if isinstance(found, tuple) else (found,)


def widened(value):
    """The same values in float64, with the same strides."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    once = value[tuple(slice(None) if step else slice(1) for step in value.stride())]
    wide = torch.empty_strided(once.shape, once.stride(), dtype=torch.float64).copy_(once)
    return wide.expand(value.shape)


@pytest.mark.parametrize("name", contract.MODULATION | contract.CONVOLUTION)
@fuzz
@choices
def test_an_operator_raises_or_agrees(name, choose):
    torch.manual_seed(choose.randrange(2**16))
    operands = modulation(choose) if name in contract.MODULATION else convolution(choose)
    arguments, bad = call(choose, name, operands)
    operator = getattr(torch.ops.spade_fast, name)
    with use_instruction_set(choose.choice(INSTRUCTION_SETS)):
        found = attempt(operator, arguments.values())
    fake = attempt(operator, tree_map(on_meta, [*arguments.values()]))
    if isinstance(found, Exception):
        assert bad, found
        ours = any(words in str(found) for words in ("spade_fast: ", "API call failed", "alloc"))
        assert ours, f"not in our own words: {found}"
        return
    assert not isinstance(fake, Exception), f"the fake refuses what the kernel takes: {fake}"
    truth = attempt(getattr(torch_backend, name), tree_map(widened, [*arguments.values()]))
    assert not isinstance(truth, Exception), f"plain PyTorch refuses what was taken: {truth}"
    results = zip(*map(tree_leaves, (found, fake, truth)), strict=True)
    for which, (one, other, true) in enumerate(results):
        if one is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype), which
            assert torch._prims_common.check_significant_strides(one, other)[0], which
            assert one.shape == true.shape, which
            if one.is_floating_point():  # signs near zero differ with the dtype
                sums = (
                    128 if one.dtype in (torch.float32, torch.float64) else None
                )  # of hundreds of terms
                assert_agree(one, true, sums, largest=1.0, name=f"result {which}")


def strange_array(choose, least_dims, most_dims):
    """Integers of any value, strides and dtype, mostly as in a map of codes."""
    shape = [choose.choice(SIZES) for _ in range(choose.randint(least_dims, most_dims))]
    numbers = laid_out(choose, torch.randint(choose.choice([1, 2, 5, 50]), shape)).numpy()
    dtype = choose.choice(["int32"] * 9 + ["int16", "int64", ">i4", "float32", "uint8"])
    numbers = numbers.astype(dtype, order="K")
    if numbers.size and choose.random() < 0.3:
        numbers = numbers.copy()
        number = choose.choice([-1, -2, 3, 120])
        numbers[np.unravel_index(choose.randrange(numbers.size), shape)] = (
            number % 128 if numbers.dtype == np.uint8 else number
        )
    return numbers


def raises_or_agrees(function, arguments, plain):
    """Calls the function, and says whether it raises; otherwise compares the result with `plain`,
    which gets the first argument as a tensor.
    """
    found = attempt(function, arguments)
    if isinstance(found, Exception):
        return True
    array, *others = arguments
    truth = plain(torch.from_numpy(np.ascontiguousarray(array).astype("int32")), *others)
    truth = truth if isinstance(truth, tuple) else (truth,)
    for one, other in zip(found, truth, strict=True):
        assert one.shape == other.shape and np.array_equal(one, other.numpy())
    return False


def is_whole(array, least):
    whole = array.dtype in (np.int32, np.int16, np.uint8, np.dtype(">i4"))
    return whole and (array.size == 0 or array.min() >= least)


@fuzz
@choices
def test_numbering_raises_or_agrees(choose):
    codes, size = strange_array(choose, 0, 5), choose.choice([1, 2, 3, 3, 5, 0, -1, 2**40])
    raises = raises_or_agrees(
        cpu_backend.library.number_windows, (codes, size), numbering.number_windows
    )
    assert raises == (
        not is_whole(codes, 0) or not 2 <= codes.ndim <= 4 or size not in (1, 2, 3, 5)
    )


@fuzz
@choices
def test_lists_of_windows_raise_or_agree(choose):
    contents, rows = strange_array(choose, 1, 3), choose.choice([0, 1, 5, 50, 120, -1, 2**40])
    raises = raises_or_agrees(
        cpu_backend.library.window_sums, (contents, rows), numbering.window_sums
    )
    most = contents.max() if contents.size else -1
    good = is_whole(contents, -1) and contents.ndim == 2 and 0 <= rows < 2**31 and most < rows
    assert raises == (not good or (contents.size == 0 and raises))


@fuzz
@choices
def test_windows_of_maps_raise_or_agree(choose):
    maps = [strange_array(choose, 0, 5) for _ in range(choose.choice([0, 1, 2]))]
    size, rows = choose.choice([1, 3, 3, 5, 0, -1, 2**40]), choose.choice([0, 5, 121, -1, 2**40])
    found = attempt(cpu_backend.library.find_windows, (maps, size, rows))
    good = all(
        is_whole(codes, 0) and 2 <= codes.ndim <= 4 and not (codes.size and codes.max() >= rows)
        for codes in maps
    ) and (not maps or (size in (1, 3, 5) and 0 <= rows < 2**31))
    assert isinstance(found, Exception) != good
    for codes, arrays in zip(maps, found[0] if good else []):
        codes = torch.from_numpy(np.ascontiguousarray(codes).astype("int32"))
        ((hidden, table, *places),) = numbering.find_windows(codes, [codes.shape[1:]], size, rows)
        for one, other in zip(arrays, (*hidden, *table, *places), strict=True):
            assert one.shape == other.shape and np.array_equal(one, other.numpy())


@fuzz
@choices
def test_sorted_pixels_raise_or_agree(choose):
    index, bound = strange_array(choose, 1, 3), choose.choice([0, 1, 5, 50, 121, -1, 2**40])
    raises = raises_or_agrees(
        lambda index, bound: cpu_backend.library.sort_pixels(index, bound),
        (index, bound),
        lambda index, bound: numbering.sort_pixels(index),
    )
    most = index.max() if index.size else -1
    assert raises == (not is_whole(index, 0) or index.ndim != 2 or not most < bound <= 2**31)


@fuzz
@choices
def test_codes_raise_or_agree(choose):
    shape = [choose.choice([0, 1, 2, 3, 7, 9]) for _ in range(choose.randint(1, 5))]
    palette = choose.choice([1, 3, 60])
    segmap = torch.randint(palette, shape).to(choose.choice([*FLOATS, torch.int64, torch.uint8]))
    segmap = laid_out(choose, segmap)
    raw = segmap.view(numbering.BITS.get(segmap.element_size(), torch.uint8)).numpy()
    found = attempt(cpu_backend.library.find_codes, (raw,))
    good = segmap.dim() >= 3 and segmap.element_size() > 1 and segmap.is_contiguous()
    assert isinstance(found, Exception) != good
    if segmap.dim() >= 3 and segmap.element_size() > 1:
        found, truth = cpu_backend.find_codes(segmap), numbering.find_codes(segmap)
        # dense features are recognised by different samples
        if found is not None and truth is not None:
            assert all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))
