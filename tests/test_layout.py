"""SemanticLayout: from labels, back to the condition, its windows, and every error."""

import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import spade_fast
from spade_fast import SemanticLayout
from spade_fast.layout import resize_codes
from spade_fast.ops.convolve_windows import convolve_windows

pytestmark = pytest.mark.usefixtures("backend")


def patches(shape, classes, seed=0):
    """Labels that are constant over patches, with some noise: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        coarse = torch.randint(
            classes, (shape[0], 1, *(max(1, size // 4) for size in shape[1:])), generator=generator
        )
        labels = F.interpolate(coarse.float(), size=shape[1:], mode="nearest")[:, 0].long()
        noise = torch.rand(shape, generator=generator) < 0.03
        labels = torch.where(noise, torch.randint(classes, shape, generator=generator), labels)
    return labels.to(torch.get_default_device())


def contents_of(codes, kernel_size):
    """Each place's window, [N, *spatial, taps], −1 beyond the border: what numbering must tell
    apart.
    """
    half, axes = kernel_size // 2, codes.dim() - 1
    padded = F.pad(codes, (half, half) * axes, value=-1)
    for axis in range(1, axes + 1):
        padded = padded.unfold(axis, kernel_size, 1)
    return padded.reshape(*codes.shape, -1)


SHAPES = [(2, 17), (1, 1), (2, 9, 14), (1, 1, 6), (3, 4, 1), (2, 5, 4, 6), (1, 40, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("classes", [1, 3, 300])
def test_windows_have_the_same_number_just_where_they_are_the_same(shape, kernel_size, classes):
    codes = patches(shape, classes).int()
    numbers, contents = spade_fast.kernels.select(codes).number_windows(codes, kernel_size)
    assert numbers.dtype == contents.dtype == torch.int32
    assert torch.equal(
        contents[numbers.long()], contents_of(codes, kernel_size)
    )  # equal numbers: equal windows
    assert len(contents.unique(dim=0)) == len(contents)  # different numbers: different windows
    assert torch.equal(
        numbers.unique(), torch.arange(len(contents), dtype=torch.int32)
    )  # and each occurs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_sums_list_what_each_window_sees_and_where_each_row_is_seen(shape, kernel_size):
    codes = patches(shape, 4).int()
    backend = spade_fast.kernels.select(codes)
    _, contents = backend.number_windows(codes, kernel_size)
    windows, taps = contents.shape
    sums, _, _, _ = backend.find_windows(codes, kernel_size, 4)
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
def test_codes_are_resized_as_interpolate_does(given):
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
def test_from_segmap_finds_what_is_piecewise_constant(shape, dtype):
    labels = patches(shape, 9)
    multi_hot = torch.randint(2, (9, 13)).to(dtype)
    multi_hot[0, 0], multi_hot[1, 0], multi_hot[2, 0] = (
        -0.0,
        0.0,
        float("nan"),
    )  # told apart by their bits
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


def test_from_segmap_of_nothing_and_of_what_is_no_condition():
    assert SemanticLayout.from_segmap(torch.zeros(0, 3, 4, 4)).to_segmap().shape == (0, 3, 4, 4)
    assert SemanticLayout.from_segmap(torch.zeros(2, 3, 0, 4)).to_segmap().shape == (2, 3, 0, 4)
    for wrong in (torch.zeros(3, 4), torch.zeros(1, 3, 4, dtype=torch.long), [1]):
        with pytest.raises(ValueError, match="segmap should be a floating-point tensor"):
            SemanticLayout.from_segmap(wrong)


def test_a_layout_survives_pickling_with_its_windows():
    layout = SemanticLayout.from_labels(patches((2, 16, 16), 5), 5).prepare([(8, 8), (16, 16)], 3)
    copy = pickle.loads(pickle.dumps(layout))
    assert torch.equal(copy.codes, layout.codes) and copy.stats() == layout.stats() != {}
    for ours, theirs in zip(copy.windows((8, 8), 3), layout.windows((8, 8), 3)):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs))
    assert repr(layout) == "SemanticLayout(2 of 16 × 16, 5 codes for 5 channels, on cpu)"


def test_a_stack_is_the_batch_of_all_and_keeps_their_windows():
    layouts = [
        SemanticLayout.from_labels(patches((n, 12, 9), 5, seed=n), 7).prepare([(12, 9), (6, 5)], 3)
        for n in (1, 2, 1)
    ]
    layouts[0].windows((3, 3), 3)  # the others have not got it
    stack = SemanticLayout.stack(layouts)
    assert torch.equal(stack.to_segmap(), torch.cat([layout.to_segmap() for layout in layouts]))
    assert set(stack._windows) == {((12, 9), 3), ((6, 5), 3)}
    fresh = SemanticLayout(stack.codes, stack.palette)
    rows = torch.randn(len(stack.palette), 4, dtype=torch.float64)
    for size in ((12, 9), (6, 5)):
        found = []
        for layout in (stack, fresh):  # numbered otherwise, but every pixel sees the same
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
        assert all(torch.allclose(*pair) for pair in zip(*found))


def test_layouts_that_do_not_stack():
    one, other = (SemanticLayout.from_labels(patches((1, size, 8), 5), 5) for size in (8, 9))
    for layouts in ([one, other], []):
        with pytest.raises(ValueError, match="layouts should be one or more of one size"):
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
        (torch.zeros(1, 4), {}, "labels has dtype torch.float32, it should hold whole numbers"),
        (torch.zeros(1, 4, dtype=torch.complex64), {}, "labels has dtype torch.complex64"),
        (np.zeros((1, 4), dtype=np.float32), {}, "labels has dtype torch.float32"),
        ([[1]], {}, "labels is a list, it should be a torch.Tensor or a numpy.ndarray"),
        (
            torch.zeros(4, dtype=torch.long),
            {},
            r"labels has shape \[4\], it should be \[N, \*spatial\]",
        ),
        (
            torch.zeros(1, 4, dtype=torch.long),
            {"instances": torch.zeros(1, 5, dtype=torch.long)},
            r"instances has shape \[1, 5\], it should",
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
        ((codes[0, 0], palette), r"int32 \[4\], it should be"),
        ((codes, palette[0]), "palette is"),
        ((codes, palette.long()), "palette is torch.int64"),
        (
            (codes + 1, palette),
            "codes has numbers from 1 to 1, they should be rows of the palette, 0 to 0",
        ),
        ((codes - 1, palette), "codes has numbers from -1 to -1"),
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
    assert torch.allclose(pooled.to_segmap(), expected, atol=1e-7) and pooled.label_nc == 6
    assert len(pooled.palette) <= pooled.codes.numel()


def test_avg_pool_is_differentiable_in_the_palette():
    layout = SemanticLayout.from_labels(patches((2, 8, 8), 5), 5)
    palette = layout.palette.double().requires_grad_()
    found = SemanticLayout(layout.codes, palette).avg_pool(3, 2, 1, False).to_segmap(torch.float64)
    expected = F.avg_pool2d(palette[layout.codes.long()].movedim(-1, 1), 3, 2, 1, False, False)
    (ours,) = torch.autograd.grad(found.square().sum(), palette)
    (theirs,) = torch.autograd.grad(expected.square().sum(), palette)
    assert torch.allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((8,), "kernel_size is 8, stride 8, padding 0"),
        ((3, 0), "stride 0"),
        ((3, 1, 2), "padding 2"),
        ((7,), r"the layout is \[4, 9\], it should be no smaller than kernel_size, 7"),
    ],
)
def test_avg_pool_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        SemanticLayout.from_labels(torch.zeros(1, 4, 9, dtype=torch.long), 2).avg_pool(*arguments)
