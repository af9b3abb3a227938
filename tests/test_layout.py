"""SemanticLayout: from labels, back to the condition, its windows, and every error."""

import copy
import itertools
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agree import assert_agree
from label_maps import SHAPES, patches

import spade_fast
from spade_fast import SemanticLayout
from spade_fast.layout import resize_codes
from spade_fast.ops.convolve_windows import convolve_windows

pytestmark = pytest.mark.usefixtures("backend")


def contents_of(codes, kernel_size):
    """The codes in each pixel's window, [N, *spatial, taps], with −1 beyond the border: numbering
    must distinguish them.
    """
    half, axes = kernel_size // 2, codes.dim() - 1
    padded = F.pad(codes, (half, half) * axes, value=-1)
    for axis in range(1, axes + 1):
        padded = padded.unfold(axis, kernel_size, 1)
    return padded.reshape(*codes.shape, -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("classes", [1, 3, 300])
def test_equal_windows_have_equal_numbers_and_different_ones_do_not(shape, kernel_size, classes):
    codes = patches(shape, classes).int()
    numbers, contents = spade_fast.kernels.select(codes).number_windows(codes, kernel_size)
    assert numbers.dtype == contents.dtype == torch.int32
    assert torch.equal(
        contents[numbers.long()], contents_of(codes, kernel_size)
    )  # equal numbers: equal windows
    assert len(contents.unique(dim=0)) == len(contents)  # different numbers: different windows
    assert torch.equal(
        numbers.unique(), torch.arange(len(contents), dtype=torch.int32)
    )  # every number occurs


def test_all_missing_sizes_are_numbered_at_once(monkeypatch):
    asked, number = [], spade_fast.layout.number

    def counted(codes, sizes, *rest):
        asked.append(sizes)
        return number(codes, sizes, *rest)

    monkeypatch.setattr(spade_fast.layout, "number", counted)
    layout = SemanticLayout(patches((1, 8, 8), 4).int(), torch.eye(4))
    kept = layout.windows((4, 4), 3)
    layout.prepare([(2, 2), (4, 4), (8, 8), [2, 2]], 3)
    assert asked == [[(4, 4)], [(2, 2), (8, 8)]] and layout.windows((4, 4), 3) is kept
    repeated = layout.repeat(2).prepare(((8, 8), (3, 5)), 3)
    assert asked[2:] == [[(3, 5)]] and repeated.windows((3, 5), 3).index.shape == (2, 3, 5)
    with pytest.raises(ValueError, match="size is"):
        layout.prepare([(7, 7), (7,)], 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_lists_of_sums_match_the_windows_contents(shape, kernel_size):
    codes = patches(shape, 4).int()
    backend = spade_fast.kernels.select(codes)
    _, contents = backend.number_windows(codes, kernel_size)
    windows, taps = contents.shape
    ((sums, _, _, _),) = backend.find_windows(codes, [shape[1:]], kernel_size, 4)
    assert all(tensor.dtype == torch.int32 for tensor in sums)
    offsets, rows, back_offsets, back_rows = (tensor.tolist() for tensor in sums)
    assert len(offsets) == windows + 1 and len(back_offsets) == 4 * taps + 1
    for window in range(windows):
        seen = [row * taps + tap for tap, row in enumerate(contents[window].tolist()) if row >= 0]
        assert rows[offsets[window] : offsets[window + 1]] == seen
    for row, tap in itertools.product(range(4), range(taps)):
        seen = (contents[:, tap] == row).nonzero()[:, 0].tolist()
        assert (
            back_rows[back_offsets[row * taps + tap] : back_offsets[row * taps + tap + 1]] == seen
        )


@pytest.mark.parametrize("given", [1, 2, 7, 16, 33])
def test_codes_are_resized_like_interpolate(given):
    codes = torch.arange(given, dtype=torch.int32)[None]
    for wanted in range(1, 41):
        expected = F.interpolate(codes[None].float(), size=wanted, mode="nearest")[0].int()
        assert torch.equal(resize_codes(codes, (wanted,)), expected)


@pytest.mark.parametrize("dont_care", [None, 255])
@pytest.mark.parametrize("shape", [(2, 13), (2, 9, 14), (1, 4, 5, 6)])
@pytest.mark.parametrize("has_instances", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_from_labels_and_back(shape, dont_care, has_instances, dtype):
    labels = patches(shape, 6)
    if dont_care is not None:
        labels[labels == 5] = dont_care
    instances = patches(shape, 3, seed=1) if has_instances else None
    layout = SemanticLayout.from_labels(labels.to(dtype), 6, instances, dont_care)
    classes = torch.where(labels == 255, 6, labels)
    expected = [F.one_hot(classes, 6 + (dont_care is not None)).movedim(-1, 1).float()]
    if has_instances:
        edges = torch.zeros(shape, dtype=torch.bool)
        for dim, step in itertools.product(range(1, len(shape)), (-1, 1)):
            shifted = instances.roll(step, dim)
            shifted.select(dim, 0 if step == 1 else -1).copy_(
                instances.select(dim, 0 if step == 1 else -1)
            )
            edges |= shifted != instances
        expected.append(edges[:, None].float())
    expected = torch.cat(expected, dim=1)
    assert layout.label_nc == expected.shape[1] and len(layout) == shape[0]
    assert torch.equal(layout.to_segmap(), expected)
    arrays = labels.cpu().numpy(), None if instances is None else instances.cpu().numpy()
    assert torch.equal(
        SemanticLayout.from_labels(arrays[0], 6, arrays[1], dont_care).codes, layout.codes.cpu()
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("shape", [(2, 40), (2, 17, 31), (1, 4, 5, 6)])
def test_from_segmap_finds_piecewise_constant_conditions(shape, dtype):
    labels = patches(shape, 9)
    multi_hot = torch.randint(2, (9, 13)).to(dtype)
    multi_hot[0, 0], multi_hot[1, 0], multi_hot[2, 0] = (
        -0.0,
        0.0,
        float("nan"),
    )  # distinguished by their bits
    per_image = (
        torch.randn(shape[0], 4, *[1] * len(shape[1:])).to(dtype).expand(shape[0], 4, *shape[1:])
    )
    segmap = torch.cat([multi_hot[labels].movedim(-1, 1), per_image], dim=1)
    for given in (
        segmap,
        segmap.movedim(1, -1).contiguous().movedim(-1, 1),
        torch.cat([segmap, segmap], -1)[..., : shape[-1]],
    ):
        layout = SemanticLayout.from_segmap(given)
        assert layout.palette.dtype == dtype and len(layout.palette) <= 9 * shape[0]
        assert torch.equal(
            layout.to_segmap(dtype).view(torch.uint8), segmap.contiguous().view(torch.uint8)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_segmap_of_dense_features_is_none(dtype):
    assert SemanticLayout.from_segmap(torch.randn(2, 16, 40, 40).to(dtype)) is None
    mixed = torch.zeros(1, 3, 64, 64)
    mixed[:, :, 32:] = torch.randn(3, 32, 64)
    assert SemanticLayout.from_segmap(mixed.to(dtype)) is None


def test_from_segmap_of_empty_and_invalid_conditions():
    assert SemanticLayout.from_segmap(torch.zeros(0, 3, 4, 4)).to_segmap().shape == (0, 3, 4, 4)
    assert SemanticLayout.from_segmap(torch.zeros(2, 3, 0, 4)).to_segmap().shape == (2, 3, 0, 4)
    for wrong in (torch.zeros(3, 4), torch.zeros(1, 3, 4, dtype=torch.long), [1]):
        with pytest.raises(ValueError, match="segmap is .*; it should be a tensor"):
            SemanticLayout.from_segmap(wrong)


def test_a_layout_survives_pickling_with_its_windows():
    layout = SemanticLayout.from_labels(patches((2, 16, 16), 5), 5).prepare([(8, 8), (16, 16)], 3)
    copy = pickle.loads(pickle.dumps(layout))
    assert torch.equal(copy.codes, layout.codes) and copy.stats() == layout.stats() != {}
    for ours, theirs in zip(copy.windows((8, 8), 3), layout.windows((8, 8), 3)):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs))
    on = f"on {layout.device}"
    assert repr(layout) == f"SemanticLayout(2 of 16 × 16, 5 codes for 5 channels, {on})"


def test_a_worker_sends_a_layout_with_everything_derived_from_it():
    """Sending moves tensors into shared memory one after another. (CUDA does not let a process open
    what it sends itself.)
    """
    labels = patches((2, 16, 16), 5).cpu()
    layout = SemanticLayout.from_labels(labels, 5).prepare([(8, 8)], 3)
    pooled = layout.avg_pool(3, 2, 1, False)
    wanted = {id(one): one.patches(4, 2, 2) for one in (layout, pooled)}
    copy = pickle.loads(ForkingPickler.dumps(layout))
    for own, other in ((copy, layout), (copy.avg_pool(3, 2, 1, False), pooled)):
        assert list(own._patches) == list(other._patches) and (4, 2, 2) in own._patches
        assert own.patches(4, 2, 2) is own._patches[4, 2, 2]
        assert torch.equal(own.patches(4, 2, 2).index, other.patches(4, 2, 2).index)
        assert other.patches(4, 2, 2) is wanted[id(other)]  # the sender keeps its own
    assert set(copy._windows) == set(layout._windows) == {((8, 8), 3)}
    assert copy.avg_pool(3, 2, 1, False) is copy._pooled[3, 2, 1, False][0]
    layout.codes.data = layout.codes.flip(2)
    assert layout.patches(4, 2, 2) is not wanted[id(layout)]


@pytest.mark.float64
def test_a_stack_is_the_batch_of_all_layouts_and_keeps_windows():
    layouts = [
        SemanticLayout.from_labels(patches((n, 12, 9), 5, seed=n), 7).prepare([(12, 9), (6, 5)], 3)
        for n in (1, 2, 1)
    ]
    layouts[0].windows((3, 3), 3)  # the other layouts do not have these windows
    stack = SemanticLayout.stack(layouts)
    assert torch.equal(stack.to_segmap(), torch.cat([layout.to_segmap() for layout in layouts]))
    assert set(stack._windows) == {((12, 9), 3), ((6, 5), 3)}
    fresh = SemanticLayout(stack.codes, stack.palette)
    rows = torch.randn(len(stack.palette), 4, dtype=torch.float64)
    for size in ((12, 9), (6, 5)):
        found = []
        for layout in (stack, fresh):  # numbered differently, but each pixel has the same window
            windows, maps = layout.windows(size, 3), rows
            for sums in windows[:2]:
                weight = (
                    torch.arange(4 * 4 * 9, dtype=torch.float64)
                    .view(4, 4, 3, 3)
                    .cos()
                    .requires_grad_()
                )
                maps = convolve_windows(maps, weight, None, sums, weight.dtype)
            pixels = maps[windows.index.long()]
            (gradient,) = torch.autograd.grad(pixels.square().sum(), weight)
            found.append((pixels, gradient))
            assert windows.index.flatten(1).gather(1, windows.order.long()).diff().min() >= 0
        assert_agree(*found)


def test_layouts_that_cannot_be_stacked():
    one, other = (SemanticLayout.from_labels(patches((1, size, 8), 5), 5) for size in (8, 9))
    for layouts in ([one, other], []):
        with pytest.raises(ValueError, match="layouts is .*; it should have one or more"):
            SemanticLayout.stack(layouts)


@pytest.mark.parametrize(
    "labels,settings,message",
    [
        (
            torch.tensor([[0, 1, 7, 7]]),
            {},
            r"labels has a 7 in 2 pixels, first at \[0, 2\]; it should have 0 to 4 \(2 pixels are"
            r" out",
        ),
        (torch.tensor([[0, -1]]), {}, r"labels has a -1 in 1 pixels, first at \[0, 1\]"),
        (torch.tensor([[0, 7]]), {"dont_care": 255}, "should have 0 to 4, or 255 for don't care"),
        (torch.zeros(1, 4), {}, "labels has dtype torch.float32; it should hold whole numbers"),
        (torch.zeros(1, 4, dtype=torch.complex64), {}, "labels has dtype torch.complex64"),
        (np.zeros((1, 4), dtype=np.float32), {}, "labels has dtype torch.float32"),
        ([[1]], {}, "labels is a list; it should be a torch.Tensor or a numpy.ndarray"),
        (
            torch.zeros(4, dtype=torch.long),
            {},
            r"labels has shape \[4\]; it should be \[N, \*spatial\]",
        ),
        (
            torch.zeros(1, 4, dtype=torch.long),
            {"instances": torch.zeros(1, 5, dtype=torch.long)},
            r"instances has shape \[1, 5\]; it should",
        ),
    ],
)
def test_bad_labels(labels, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SemanticLayout.from_labels(labels, 5, **settings)


def test_bad_layouts_and_sizes():
    codes, palette = torch.zeros(1, 4, 4, dtype=torch.int32), torch.zeros(1, 3)
    for arguments, message in [
        ((codes.long(), palette), "codes is torch.int64"),
        ((codes[0, 0], palette), r"int32 \[4\]; it should be"),
        ((codes, palette[0]), "palette is"),
        ((codes, palette.long()), "palette is torch.int64"),
        (
            (codes.cpu() + 1, palette.cpu()),  # checking that would wait for a GPU
            "codes has numbers from 1 to 1; they should be rows of the palette, 0 to 0",
        ),
        ((codes.cpu() - 1, palette.cpu()), "codes has numbers from -1 to -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            SemanticLayout(*arguments)
    layout = SemanticLayout(codes, palette)
    for arguments, message in [
        (((4,), 3), "size is"),
        (((4, 4), 2), "kernel_size is 2"),
        (((4, 4), 9), "kernel_size is 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            layout.windows(*arguments)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4)])
def test_an_empty_map(shape):
    layout = SemanticLayout.from_labels(torch.zeros(shape, dtype=torch.long), 3)
    assert layout.to_segmap().shape == (shape[0], 3, *shape[1:])
    assert layout.windows(shape[1:], 3).count == 0


@pytest.mark.parametrize("shape", [(2, 17), (2, 16, 13), (1, 7, 8, 9)])
@pytest.mark.parametrize(
    "kernel_size,stride,padding",
    [(3, 2, 1), (2, None, 0), (1, 1, 0), (4, 3, 1), (7, 1, 3), (5, 2, 0)],
)
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool(shape, kernel_size, stride, padding, count_include_pad):
    layout = SemanticLayout.from_labels(patches(shape, 5), 5, patches(shape, 3, seed=1))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(shape) - 2]
    pooled = layout.avg_pool(kernel_size, stride, padding, count_include_pad)
    expected = pool(layout.to_segmap(), kernel_size, stride, padding, False, count_include_pad)
    assert_agree(pooled.to_segmap(), expected)
    assert pooled.label_nc == 6
    assert len(pooled.palette) <= pooled.codes.numel()


def test_avg_pool_is_differentiable_in_the_palette():
    layout = SemanticLayout.from_labels(patches((2, 8, 8), 5), 5)
    palette = layout.palette.double().requires_grad_()
    found = SemanticLayout(layout.codes, palette).avg_pool(3, 2, 1, False).to_segmap(torch.float64)
    segmap = palette[layout.codes.long()].movedim(-1, 1)
    # Contiguous, because torch 2.11's gradient for channels-last on a GPU is wrong.
    expected = F.avg_pool2d(segmap.contiguous(), 3, 2, 1, False, False)
    (ours,) = torch.autograd.grad(found.square().sum(), palette)
    (theirs,) = torch.autograd.grad(expected.square().sum(), palette)
    assert_agree(ours, theirs)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((8,), "kernel_size is 8, stride 8, padding 0"),
        ((3, 0), "stride 0"),
        ((3, 1, 2), "padding 2"),
        (
            (7,),
            r"the layout has size \[4, 9\]; with a padding of 0 it should be at least kernel_size,",
        ),
    ],
)
def test_invalid_arguments_of_avg_pool(arguments, message):
    with pytest.raises(ValueError, match=message):
        SemanticLayout.from_labels(torch.zeros(1, 4, 9, dtype=torch.long), 2).avg_pool(*arguments)


@pytest.mark.parametrize(
    "dont_care,labels,classes",
    [
        (0, [[0, 1, 2]], [[3, 1, 2]]),  # within the classes: label 0 counts as unlabelled
        (3, [[0, 1, 3]], [[0, 1, 3]]),
        (-1, [[0, -1, 2]], [[0, 3, 2]]),
        (255, [[255, 1, 2]], [[3, 1, 2]]),
        (10**12, [[10**12, 1, 2]], [[3, 1, 2]]),
        (np.int64(255), [[255, 1, 2]], [[3, 1, 2]]),
    ],
)
def test_labels_and_unlabelled_pixels(dont_care, labels, classes):
    layout = SemanticLayout.from_labels(torch.tensor(labels), np.int32(3), dont_care=dont_care)
    expected = F.one_hot(torch.tensor(classes), 4).movedim(-1, 1).float()
    assert torch.equal(layout.to_segmap(), expected)


@pytest.mark.parametrize("dont_care", [0, -1, 255])
def test_a_label_that_is_the_number_of_classes_is_out_of_range(dont_care):
    with pytest.raises(
        ValueError,
        match=rf"labels has a 3 in 2 pixels, first at \[0, 1\]; it should have 0 to 2, or"
        rf" {dont_care} for don't care",
    ):
        SemanticLayout.from_labels(torch.tensor([[1, 3, 3]]), 3, dont_care=dont_care)


def as_given(numbers, kind):
    """The same whole numbers, [N, *spatial], as another kind of array."""
    if kind == "read-only":
        numbers = numbers.copy()
        numbers.flags.writeable = False
        return numbers
    if kind == "negative strides":
        return np.ascontiguousarray(numbers[:, ::-1, ::-1])[:, ::-1, ::-1]
    if kind == "expanded":
        return torch.as_tensor(numbers)[:, :, :1].expand(*numbers.shape)
    if kind.startswith("torch."):
        return torch.from_numpy(numbers).to(getattr(torch, kind.removeprefix("torch.")))
    return numbers.astype(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *(">i2", ">u4", ">i8", "<i4", "u1", "i1", "u2", "u8", "read-only", "negative strides"),
        *("expanded", "torch.uint16", "torch.uint32", "torch.uint64", "torch.int8"),
    ],
)
def test_whole_numbers_of_any_kind(kind):
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = np.random.default_rng(0).integers(0, 3, (2, 4, 5))
        labels, instances = as_given(numbers, kind), as_given(numbers.copy() // 2, kind)
        numbers = np.asarray(labels).astype(np.int64)
        layout = SemanticLayout.from_labels(labels, 4, instances, dont_care=2)
        expected = SemanticLayout.from_labels(
            torch.from_numpy(numbers), 4, torch.from_numpy(np.asarray(instances).astype(int)), 2
        )
        assert layout.equal(expected) and layout.label_nc == 6


@pytest.mark.parametrize(
    "labels,num_classes,settings,message",
    [
        (np.zeros((1, 4), bool), 2, {}, "labels has dtype .*bool; it should hold whole numbers"),
        (np.array([["a"]]), 2, {}, "labels has dtype <U1; it should hold whole numbers"),
        (np.array([[None]]), 2, {}, "labels has dtype object"),
        (np.ma.masked_equal([[0, 1]], 1), 2, {}, "labels is a masked array"),
        (np.array([[2**63]], np.uint64), 2, {"dont_care": -(2**63)}, "labels has numbers of 2"),
        (torch.zeros(1, 4, dtype=torch.bool), 2, {}, "labels has dtype torch.bool"),
        (torch.zeros(1, 4, dtype=torch.long, device="meta"), 2, {}, "on meta; it should be a den"),
        (torch.eye(3).long().to_sparse(), 2, {}, "torch.sparse_coo.*it should be a dense tensor"),
        (torch.zeros(1, 4).long(), 0, {}, "num_classes is 0; it should be 1 or more"),
        (torch.zeros(1, 4).long(), -2, {}, "num_classes is -2; it should be 1 or more"),
        (torch.zeros(1, 4).long(), 2.0, {}, "num_classes is 2.0; it should be a whole number"),
        (torch.zeros(1, 4).long(), True, {}, "num_classes is True; it should be a whole number"),
        (torch.zeros(1, 4).long(), 2, {"dont_care": 1.5}, "dont_care is 1.5; it should be a whole"),
        (torch.zeros(1, 4).long(), 2, {"dont_care": False}, "dont_care is False; it should be a"),
        (torch.zeros(1, 4).long(), 2, {"instances": np.zeros((1, 4))}, "instances has dtype"),
    ],
)
def test_invalid_labels(labels, num_classes, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SemanticLayout.from_labels(labels, num_classes, **settings)


@pytest.mark.parametrize("shape", [(1, 3, 0, 5), (0, 3, 4, 4), (2, 3, 0), (1, 0, 4, 4)])
def test_a_condition_of_nothing(shape):
    layout = SemanticLayout.from_segmap(torch.zeros(shape))
    assert layout.to_segmap().shape == shape
    assert layout.windows(shape[2:], 3).index.shape == (shape[0], *shape[2:])
    with pytest.raises(ValueError, match="size is .*it should have 1 pixel or more"):
        layout.resize([0 if length else 2 for length in shape[2:]])


def test_conditions_without_a_layout():
    learned = torch.zeros(1, 3, 4, 4, requires_grad=True)
    for segmap, message in [
        (learned, "segmap requires a gradient; it should not"),
        (torch.zeros(1, 3, 4, 4, device="meta"), "on meta; it should be a dense tensor"),
        (
            torch.zeros(1, 3, 4, 4).to(torch.float8_e4m3fn),
            "segmap is torch.float8_e4m3fn .*; it should be a tensor",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            SemanticLayout.from_segmap(segmap)
    with torch.no_grad():
        assert SemanticLayout.from_segmap(learned).label_nc == 3


def test_tensors_of_other_classes():
    class Other(torch.Tensor):
        pass

    labels = patches((1, 6, 6), 3)
    layout = SemanticLayout.from_labels(labels, 3)
    for other in (
        SemanticLayout.from_labels(labels.as_subclass(Other), 3),
        SemanticLayout.from_segmap(layout.to_segmap().as_subclass(Other)),
        SemanticLayout.from_segmap(torch.nn.Parameter(layout.to_segmap(), requires_grad=False)),
    ):
        assert torch.equal(other.to_segmap(), layout.to_segmap())
        assert type(other.codes) is type(other.palette) is torch.Tensor


def everything(layout):
    """Everything derived from a layout, as maps that do not depend on the numbering."""
    windows, found = layout.windows((6, 5), 3), layout.patches(3, 2, 1)
    counts = layout.palette.double().cumsum(1)
    maps = [counts]
    for sums in windows[:2]:
        weight = torch.arange(maps[-1].shape[1] * 9, dtype=torch.float64).cos().view(1, -1, 3, 3)
        maps.append(convolve_windows(maps[-1], weight, None, sums, torch.float64))
    seen = torch.cat([counts, counts.new_zeros(1, counts.shape[1])])[found.contents.long()]
    return [
        maps[-1][windows.index.long()],
        seen[found.index.long()],
        layout.avg_pool(2).to_segmap(torch.float64),
        layout.to_segmap(),
    ]


EDITS = {
    "codes in place": lambda layout: layout.codes.fill_(1),
    "codes through a view": lambda layout: layout.codes[:, 1:3].fill_(0),
    "other codes": lambda layout: setattr(layout, "codes", layout.codes.flip(1)),
    "others twice": lambda layout: [
        setattr(layout, "codes", (layout.codes + step) % 3) for step in (1, 1)
    ],
    "other memory": lambda layout: setattr(layout.codes, "data", layout.codes.flip(1)),
    "palette in place": lambda layout: layout.palette.mul_(2),
    "another palette": lambda layout: setattr(layout, "palette", layout.palette.flip(0)),
    "a longer palette": lambda layout: setattr(layout, "palette", layout.palette.repeat(2, 1)),
}


@pytest.mark.float64
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("in_inference", [False, True])
def test_everything_derived_from_an_edited_layout(edit, in_inference):
    with torch.inference_mode(in_inference):
        codes = patches((2, 12, 10), 3).int()
        codes[0, 0, :3] = torch.arange(3, dtype=torch.int32)
        layout = SemanticLayout(codes, torch.randn(3, 4))
        repeated, content = layout.repeat(2), layout.content
        before = [everything(layout), everything(repeated)]
        assert layout.content is content and repeated.source is layout
        EDITS[edit](layout)
        assert layout.content is not content
        for one in (layout, repeated, layout.repeat(2)):
            fresh = SemanticLayout(one.codes.clone(), one.palette.clone())
            assert_agree(everything(one), everything(fresh))
        if "palette in place" not in edit:  # otherwise both have the same palette
            assert_agree(before[1], everything(repeated))


@pytest.mark.float64
def test_a_repetition_that_is_edited():
    layout = SemanticLayout(patches((1, 12, 10), 3).int(), torch.randn(3, 4))
    expected = everything(layout)
    for edit in EDITS.values():
        repeated = layout.repeat(2)
        everything(repeated)
        palette = layout.palette.clone()
        edit(repeated)
        fresh = SemanticLayout(repeated.codes.clone(), repeated.palette.clone())
        assert_agree(everything(repeated), everything(fresh))
        layout.palette.copy_(palette)
        assert_agree(everything(layout), expected)


def test_a_pooled_layout_that_is_edited_is_not_kept():
    layout = SemanticLayout.from_labels(patches((1, 8, 8), 3), 3)
    pooled = layout.avg_pool(2)
    assert layout.avg_pool(2) is pooled
    expected = pooled.to_segmap()
    pooled.palette.zero_()
    assert torch.equal(layout.avg_pool(2).to_segmap(), expected)


@pytest.mark.parametrize("wrong", [10**6, -1])
def test_codes_that_were_edited_out_of_range(wrong):
    layout = SemanticLayout.from_labels(patches((1, 8, 8), 3), 3).prepare([(8, 8)], 3)
    repeated = layout.repeat(2)
    if not layout.codes.is_cpu:
        pytest.skip("not checked on a GPU, which would have to be waited for")
    layout.codes[0, 0, 0] = wrong
    for use in (
        lambda: layout.windows((8, 8), 3),
        lambda: layout.patches(4, 2, 1),
        lambda: layout.avg_pool(2),
        lambda: layout.to_segmap(),
        lambda: layout.resize((4, 4)),
        lambda: layout.repeat(2),
        lambda: layout.to("meta"),
        lambda: SemanticLayout.stack([layout, repeated]),
        lambda: layout[0],
        lambda: layout.flip(-1),
        lambda: layout.crop((0, 0), (2, 2)),
        lambda: layout.content,
        lambda: pickle.dumps(layout),
    ):
        with pytest.raises(ValueError, match="codes has numbers from .* rows of the palette"):
            use()
    assert repeated.windows((8, 8), 3).count > 1  # it has its own codes
    layout.codes = layout.codes.clamp(0, 2).long()
    with pytest.raises(ValueError, match="codes is torch.int64"):
        layout.windows((8, 8), 3)
    layout.codes = [[1]]
    with pytest.raises(TypeError, match="codes is a list; it should be a torch.Tensor"):
        layout.windows((8, 8), 3)


@pytest.mark.float64
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_are_edited_apart(duplicate):
    layout = SemanticLayout.from_labels(patches((1, 12, 10), 3), 3).prepare([(6, 5)], 3)
    other, expected = duplicate(layout), everything(layout)
    assert other.stats() == layout.stats() != {}
    other.codes = other.codes.flip(1)
    fresh = SemanticLayout(other.codes, other.palette)
    assert_agree(everything(other), everything(fresh))
    assert_agree(everything(layout), expected)


@pytest.mark.large
def test_layouts_made_in_inference_mode_may_be_trained_with():
    labels, spade, x = patches((2, 12, 10), 3), spade_fast.SPADE(4, 3, 4), torch.randn(2, 4, 6, 5)
    with torch.inference_mode():
        layout = SemanticLayout.from_labels(labels, 3).prepare([(6, 5)], 3)
        made = [layout, SemanticLayout.stack([layout]), layout[[0, 1]], layout.resize((6, 5))]
        made += [SemanticLayout(layout.codes.clone(), layout.palette.clone())]
        made += [copy.deepcopy(layout), layout[0].repeat(2), layout.avg_pool(1)]
        for one in made:
            one.windows((6, 5), 3)
    for one in made:
        one.palette = one.palette.float()
        with spade_fast.window_mode("always"):
            spade(x, one).sum().backward()


def test_images_of_a_batch():
    layout = SemanticLayout.from_labels(patches((4, 6, 5), 30), 30)
    segmap = layout.to_segmap()
    for images, expected in [
        (1, segmap[1:2]),
        (-1, segmap[3:]),
        (np.int64(2), segmap[2:3]),
        (torch.tensor(2), segmap[2:3]),
        (slice(1, 3), segmap[1:3]),
        (slice(None, None, -2), segmap[[3, 1]]),
        ([2, 0, 2], segmap[[2, 0, 2]]),
        (torch.tensor([-1, 0]), segmap[[3, 0]]),
        (np.array([3]), segmap[3:]),
        ([True, False, False, True], segmap[[0, 3]]),
        (torch.tensor([False] * 4), segmap[:0]),
        ([], segmap[:0]),
    ]:
        found = layout[images]
        assert torch.equal(found.to_segmap(), expected), images
        assert len(found.palette) == len(found.codes.unique())
    assert [len(one) for one in layout] == [1] * 4
    assert torch.equal(SemanticLayout.stack(layout).to_segmap(), segmap)


@pytest.mark.parametrize(
    "images,error,message",
    [
        (4, IndexError, "images has 4; it should name one of the batch's 4 images"),
        ([0, -5], IndexError, "images has -5"),
        ([True], IndexError, "images is a mask of 1; it should have 4, one for each image"),
        (1.0, TypeError, "images is 1.0; it should be numbers of images"),
        ((0, slice(2)), TypeError, r"images is \(0, slice.*crop\(\) is for parts of an image"),
        (None, TypeError, "images is None"),
        ("0", TypeError, "images is '0'"),
    ],
)
def test_images_that_are_not_in_the_batch(images, error, message):
    with pytest.raises(error, match=message):
        SemanticLayout.from_labels(patches((4, 6, 5), 3), 3)[images]


@pytest.mark.parametrize("shape", [(2, 7), (2, 7, 5), (2, 7, 5, 4)])
def test_flips_and_crops(shape):
    layout = SemanticLayout.from_labels(patches(shape, 30), 30, patches(shape, 2, seed=1))
    segmap, spatial = layout.to_segmap(), len(shape) - 1
    for dims in [(-1,), (2,), (-spatial,), tuple(range(2, spatial + 2))]:
        assert torch.equal(layout.flip(*dims).to_segmap(), segmap.flip(dims))
        assert torch.equal(layout.flip(dims).to_segmap(), segmap.flip(dims))
    start, size = (1, 2, np.int64(0))[:spatial], (5, 3, 2)[:spatial]
    part = segmap[(..., *(slice(begin, begin + one) for begin, one in zip(start, size)))]
    cropped = layout.crop(start, size)
    assert torch.equal(cropped.to_segmap(), part)
    assert len(cropped.palette) == len(cropped.codes.unique())
    assert torch.equal(layout.to_segmap(), segmap)


@pytest.mark.parametrize(
    "use,message",
    [
        (lambda layout: layout.flip(1), "dims has 1; it should have spatial axes, 2 to 3 or -2 to"),
        (lambda layout: layout.flip(-3), "dims has -3"),
        (lambda layout: layout.flip(-1, 3), r"dims is \(-1, 3\); it should have each axis once"),
        (lambda layout: layout.flip("left"), "dims is 'left'; it should be a whole number"),
        (lambda layout: layout.crop((0, 1), (4, 5)), r"start is \(0, 1\) and size \(4, 5\); they"),
        (lambda layout: layout.crop((-1, 0), (4, 5)), r"start is \(-1, 0\)"),
        (lambda layout: layout.crop((0, 0), (0, 5)), r"size \(0, 5\)"),
        (lambda layout: layout.crop((0,), (4, 5)), "start is .* should have the layout's 2 dimens"),
        (lambda layout: layout.resize((4.0, 5)), "size is 4.0; it should be a whole number"),
        (lambda layout: layout.resize((4, -5)), "size is .*it should have 1 pixel or more"),
        (lambda layout: layout.resize((4,)), "size is .* should have the layout's 2 dimensions"),
        (lambda layout: layout.windows((4, 0), 3), "size is .*it should have 1 pixel or more"),
        (lambda layout: layout.windows((4, 5), 3.0), "kernel_size is 3.0; it should be a whole"),
        (lambda layout: layout.prepare((4, 5), 3), "size is .* should have the layout's 2 dimens"),
        (lambda layout: layout.patches(0, 1, 0), "kernel_size is 0, stride 1, padding 0"),
        (lambda layout: layout.patches(3, 0, 0), "kernel_size is 3, stride 0, padding 0"),
        (lambda layout: layout.patches(3, 1, -1), "kernel_size is 3, stride 1, padding -1"),
        (lambda layout: layout.repeat(0), "times is 0; it should be 1 or more"),
        (lambda layout: layout.repeat(1.5), "times is 1.5; it should be a whole number"),
        (lambda layout: layout.to(torch.float16), "device is torch.float16; it should be a device"),
        (lambda layout: SemanticLayout.stack([layout, layout.codes]), "layouts has a Tensor"),
        (lambda layout: layout.windows((4, 5), 3) and layout[:0].avg_pool(9), "kernel_size is 9"),
    ],
)
def test_invalid_uses_of_a_layout(use, message):
    with pytest.raises((ValueError, TypeError), match=message):
        use(SemanticLayout.from_labels(patches((2, 4, 5), 3), 3))


def test_slices_that_would_mistake_rows_for_images():
    layout = SemanticLayout.from_labels(torch.zeros(4, 5, dtype=torch.long), 3)
    with pytest.raises(ValueError, match=r"1 dimensions; a single map .* labels\[None\]"):
        layout.windows((4, 5), 3)


def test_sizes_of_numpy():
    layout = SemanticLayout.from_labels(patches((2, 8, 8), 3), 3)
    size = np.array([4, 6])
    assert layout.windows(size, np.int64(3)) is layout.windows((4, 6), 3)
    assert layout.windows(list(torch.tensor(size)), 3) is layout.windows((4, 6), 3)
    assert type(next(iter(layout.stats()))[0][0]) is int
    assert layout.resize(size).codes.shape == (2, 4, 6)
    assert layout.avg_pool(np.int32(2)) is layout.avg_pool(2)
    assert layout.patches(np.int8(4), 2, np.uint8(1)) is layout.patches(4, 2, 1)


@pytest.mark.parametrize("kernel_size", [2, 4])
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool_with_pytorchs_largest_padding(kernel_size, count_include_pad):
    layout = SemanticLayout.from_labels(patches((1, 9, 8), 3), 3)
    settings = dict(stride=2, padding=kernel_size // 2, count_include_pad=count_include_pad)
    expected = F.avg_pool2d(layout.to_segmap(), kernel_size, **settings)
    assert_agree(layout.avg_pool(kernel_size, **settings).to_segmap(), expected)


class Maps(torch.utils.data.Dataset):
    """A data set of layouts, each a batch of one."""

    def __len__(self):
        return 5

    def __getitem__(self, number):
        layout = SemanticLayout.from_labels(patches((1, 6, 5), 3, seed=number), 3)
        return {"segmap": layout.prepare([(6, 5)], 3), "number": number}


def test_a_data_loader_stacks_layouts():
    with torch.device("cpu"), spade_fast.use_backend("torch"):  # as in a data loader's workers
        batches = list(torch.utils.data.DataLoader(Maps(), batch_size=2))
        expected = torch.cat([Maps()[number]["segmap"].to_segmap() for number in (2, 3)])
    assert [len(batch["segmap"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(batches[0]["number"], torch.arange(2, device="cpu"))
    assert torch.equal(batches[1]["segmap"].to_segmap(), expected)
    assert set(batches[1]["segmap"].stats()) == {((6, 5), 3)}


def test_moving_a_layout():
    layout = SemanticLayout.from_labels(patches((2, 8, 8), 3), 3).prepare([(8, 8)], 3)
    here = layout.device
    assert layout.to(here) is layout and layout.to(str(here), non_blocking=True) is layout
    assert layout.to(None) is layout
    if here.type == "cuda":
        assert layout.to("cuda") is layout and layout.cuda() is layout
    there = layout.to("meta", non_blocking=True)
    assert there.device.type == "meta" and there.stats() == layout.stats() != {}
    assert layout.cpu().device.type == "cpu"
