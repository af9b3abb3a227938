"""From folders of label maps and photographs to batches."""

import io
import itertools
import os
import pickle
import random
import signal
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from agree import assert_agree
from drawn_data import CLASSES, DONT_CARE, drawn, on_its_side, save
from PIL import Image
from refusals import refusal

import spade_fast.layout
from spade_fast import MultiscaleDiscriminator, SemanticLayout, SPADEGenerator
from spade_fast.data import (
    CONVENTIONS,
    MODES,
    Folder,
    Pair,
    Preparation,
    Sampler,
    Stream,
    collate,
    find_pairs,
    loader,
    read_labels,
    read_palette,
    read_photograph,
)
from spade_fast.data.files import read_orientation


@pytest.fixture
def folder(tmp_path):
    """Seven pairs of 40 × 36 pixels."""
    for number in range(7):
        labels, photograph, instances = drawn(36, 40, number)
        save(labels, tmp_path / "labels" / f"{number}.png")
        save(photograph, tmp_path / "images" / f"{number}.png")
        save(instances, tmp_path / "instances" / f"{number}.png")
    return tmp_path


def data_set(folder, **settings):
    settings = {"crop_size": 32, "load_size": 36} | settings
    pairs = find_pairs(*(folder / kind for kind in ("labels", "images", "instances")))
    return Folder(pairs, Preparation(CLASSES, DONT_CARE, **settings), seed=3)


def labels_in(layout):
    """The label of each pixel, [height, width]; "don't care" is CLASSES."""
    return layout.to_segmap()[0, : CLASSES + 1].argmax(0)


# Files


@pytest.mark.parametrize("largest, dtype", [(255, np.uint8), (65535, np.uint16)])
def test_labels_of_8_and_16_bits(tmp_path, largest, dtype):
    labels = np.random.default_rng(0).integers(0, largest + 1, (5, 7)).astype(dtype)
    read = read_labels(save(labels, tmp_path / "map.png"))
    assert read.dtype == np.int64 and (read == labels).all()


def test_labels_of_32_bits(tmp_path):
    labels = np.array([[0, 70000], [24001, 3]], np.int32)
    assert (read_labels(save(labels, tmp_path / "map.tif")) == labels).all()


def test_labels_of_one_bit_and_of_palette_indices(tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    Image.fromarray(labels * 255).convert("1").save(tmp_path / "one.png")
    assert (read_labels(tmp_path / "one.png") == labels).all()
    image = Image.fromarray(labels * 7 + 2).convert("L")
    image.putpalette([value for index in range(256) for value in (255 - index, 0, index)])
    image.save(tmp_path / "indices.png")
    with Image.open(tmp_path / "indices.png") as file:
        assert file.mode == "P"
    assert (read_labels(tmp_path / "indices.png") == labels * 7 + 2).all()
    # With a palette, only colours count, however the writer stored them.
    palette = {(253, 0, 2): 5, (246, 0, 9): 4}
    assert (read_labels(tmp_path / "indices.png", palette) == np.array([5, 4])[labels]).all()


def grey_png(rows, bits):
    """The bytes of a PNG of grey with fewer than 8 bits, which Pillow does not write."""

    def chunk(kind, content):
        sum_of_it = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sum_of_it

    packed = b""
    for row in rows:
        digits = "".join(f"{number:0{bits}b}" for number in row)
        packed += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    header = struct.pack(">IIBBBBB", rows.shape[1], len(rows), bits, 0, 0, 0, 0)
    contents = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(packed)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(contents)


def pgm(numbers, most, plain=False):
    """The bytes of a PGM whose header says that its largest number is `most`."""
    dtype = ">u1" if most < 256 else ">u2"
    words = " ".join(map(str, numbers.ravel())).encode() + b"\n"
    header = f"P{2 if plain else 5} {numbers.shape[1]} {len(numbers)} {most}\n"
    return header.encode() + (words if plain else numbers.astype(dtype).tobytes())


SHADES = np.arange(16).reshape(2, 8) % 12


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("most", [11, 254, 300, 65534])
def test_a_pgm_whose_numbers_are_stretched_is_refused(tmp_path, most, plain):
    path = tmp_path / "map.pgm"
    path.write_bytes(pgm(SHADES, most, plain))
    words = f"{path} has numbers up to {most}, which some programs stretch: it should be a PNG"
    assert words in refusal(read_labels, path)
    for right in (255, 65535):
        path.write_bytes(pgm(SHADES, right, plain))
        assert np.array_equal(read_labels(path), SHADES)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_refused(tmp_path, bits):
    path, numbers = tmp_path / "map.png", SHADES % 2**bits
    path.write_bytes(grey_png(numbers, bits))
    words = f"{path} has grey of {bits} bits, which some programs stretch: it should be a PNG"
    assert words in refusal(read_labels, path)
    # As colours or as indices nothing is stretched.
    palette = {(number * 255 // (2**bits - 1),) * 3: number for number in range(2**bits)}
    assert np.array_equal(read_labels(path, palette), numbers)
    indices = Image.fromarray(numbers.astype(np.uint8))
    indices.putpalette([value for index in range(2**bits) for value in (9, 9, index)])
    indices.save(path, bits=bits)
    assert np.array_equal(read_labels(path), numbers)
    path.write_bytes(grey_png(SHADES % 2, 1))
    assert np.array_equal(read_labels(path), SHADES % 2)


@pytest.mark.parametrize(
    "name, mode, settings, words",
    [
        ("map.gif", "L", {}, "is a GIF, whose labels some programs renumber"),
        ("map.pgm", "1", {}, "has 0 for white, which some programs invert"),
        ("map.tif", "1", {"tiffinfo": {262: 0}}, "has 0 for white, which some programs invert"),
        ("map.tif", "L", {"tiffinfo": {262: 0}}, "has 0 for white, which some programs invert"),
        ("map.tif", "L", {"compression": "jpeg"}, "is a TIFF whose compression changes labels"),
        ("map.bmp", "1", {}, "is a BMP in black and white, which Pillow misreads"),
    ],
)
def test_formats_that_change_numbers_are_refused(tmp_path, name, mode, settings, words):
    path = tmp_path / name
    Image.fromarray((SHADES * 20).astype(np.uint8)).convert(mode).save(path, **settings)
    assert f"{path} {words}" in refusal(read_labels, path)
    assert "it should be a PNG of 8 or 16 bits" in refusal(read_labels, path)
    assert read_photograph(path).mode == "RGB"


@pytest.mark.parametrize(
    "name, settings",
    [
        ("map.bmp", {}),
        ("map.pgm", {}),
        ("map.tif", {}),
        ("map.tif", {"compression": "tiff_lzw"}),
        ("map.tif", {"compression": "packbits"}),
    ],
)
def test_formats_that_keep_numbers(tmp_path, name, settings):
    numbers = np.arange(256, dtype=np.uint8).reshape(8, 32)
    assert np.array_equal(read_labels(save(numbers, tmp_path / name, **settings)), numbers)


def test_labels_in_colours(tmp_path):
    (tmp_path / "palette.txt").write_text(
        "# made by hand\n\n128 64 128 3 road\n0 0 142 1 car # blue\n0 0 70 1 truck\n0 0 0 255\n"
    )
    palette = read_palette(tmp_path / "palette.txt")
    assert palette == {(128, 64, 128): 3, (0, 0, 142): 1, (0, 0, 70): 1, (0, 0, 0): 255}
    colours = np.array([*palette], np.uint8)
    places = np.random.default_rng(0).integers(0, 4, (6, 5))
    for name, pixels in {
        "rgb": colours[places],
        "rgba": np.dstack([colours[places], np.full((6, 5), 255, np.uint8)]),
    }.items():
        path = save(pixels, tmp_path / f"{name}.png")
        assert (read_labels(path, palette) == np.array([3, 1, 1, 255])[places]).all()
        assert "palette" in refusal(read_labels, path) and str(path) in refusal(read_labels, path)
    pixels = colours[places]
    pixels[4, 2:4] = (1, 2, 3)
    pixels[5, 0] = (9, 9, 9)
    message = refusal(read_labels, save(pixels, tmp_path / "other.png"), palette)
    assert "other.png has the colour (1, 2, 3) in 2 pixels, first at row 4, column 2" in message
    assert "3 pixels" in message
    grey = save(np.zeros((3, 3), np.uint8), tmp_path / "grey.png")
    assert (read_labels(grey, palette) == 255).all()  # an entirely black map, stored as grey
    deep = save(np.zeros((3, 3), np.uint16), tmp_path / "deep.png")
    assert "I;16" in refusal(read_labels, deep, palette)


@pytest.mark.parametrize(
    "line", ["1 2 3", "1 2 256 0", "1 2 3 -1", "a b c d", "0 0 0 2", "1 2 3 road"]
)
def test_files_that_are_not_palettes(tmp_path, line):
    path = tmp_path / "palette.txt"
    path.write_text(f"0 0 0 1\n{line}\n")
    assert f"{path}, line 2, " in refusal(read_palette, path)
    path.write_text("# nothing\n")
    assert str(path) in refusal(read_palette, path)


def test_files_that_are_not_label_maps(tmp_path):
    labels, photograph, _ = drawn(40, 40)
    path = save(labels, tmp_path / "map.jpg")
    assert "map.jpg is a JPEG, whose compression changes labels" in refusal(read_labels, path)
    path.rename(tmp_path / "hidden.png")
    assert "is a JPEG" in refusal(read_labels, tmp_path / "hidden.png")
    path = save(labels.astype(np.float32), tmp_path / "map.tif")
    assert f"{path} has pixels of mode F" in refusal(read_labels, path)
    for suffix in ("png", "jpg"):
        path = save(photograph, tmp_path / f"whole.{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for read in (read_labels, read_photograph):
            if suffix == "png" or read is read_photograph:
                assert f"{path} is not an image, or is incomplete: " in refusal(read, path)
    path.write_bytes(b"")
    assert "its format is not recognised" in refusal(read_photograph, path)
    with pytest.raises(FileNotFoundError, match="absent.png"):
        read_labels(tmp_path / "absent.png")


def test_a_photograph_in_memory(tmp_path):
    _, photograph, _ = drawn(6, 8)
    content = save(photograph, tmp_path / "photograph.png").read_bytes()
    assert (np.asarray(read_photograph("it", content, 48)) == photograph).all()
    words = refusal(read_photograph, "it", content, 47)
    assert words == "it has 8 × 6 pixels; it should have 47 or fewer"
    # Pillow would draw this with an external program.
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    assert "its format is not recognised" in refusal(read_photograph, "it", postscript)


def test_photographs(tmp_path):
    _, photograph, _ = drawn(6, 8)
    path = save(photograph, tmp_path / "photograph.png")
    assert (np.asarray(read_photograph(path)) == photograph).all()
    grey = read_photograph(save(photograph[..., 0], tmp_path / "grey.png"))
    assert (np.asarray(grey) == photograph[..., :1]).all()
    deep = save(photograph[..., 0].astype(np.uint16), tmp_path / "deep.png")
    assert "8 bits" in refusal(read_photograph, deep)
    alpha = np.full((6, 8, 1), 255, np.uint8)
    path = save(np.dstack([photograph, alpha]), tmp_path / "opaque.png")
    assert (np.asarray(read_photograph(path)) == photograph).all()
    alpha[2, 3] = 254
    path = save(np.dstack([photograph, alpha]), tmp_path / "clear.png")
    assert "transparent" in refusal(read_photograph, path)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_the_orientation_of_a_photograph(tmp_path, kind):
    _, photograph, _ = drawn(6, 8)
    lying, exif = on_its_side(photograph)
    path = save(lying, tmp_path / f"lying.{kind}", exif=exif, lossless=True)
    assert np.array_equal(read_photograph(path, upright=True), photograph)
    is_tiff = kind == "tiff"  # which Pillow turns
    assert np.array_equal(read_photograph(path), photograph if is_tiff else lying)
    assert read_orientation(path) == (1 if is_tiff else 6)


# Pairs


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_pairs_by_stem(tmp_path):
    touch(tmp_path / "l", "b.png", "a.png", "sub/a.png", "notes.txt", ".hidden.png")
    touch(tmp_path / "i", "a.jpg", "b.JPEG", "sub/a.webp", "Thumbs.db", ".cache/x.png")
    pairs = find_pairs(tmp_path / "l", tmp_path / "i")
    assert [pair.name for pair in pairs] == ["a", "b", "sub/a"]
    sub = Pair("sub/a", tmp_path / "l/sub/a.png", tmp_path / "i/sub/a.webp", None)
    assert pairs[2] == sub
    touch(tmp_path / "n", "a.png", "b.png", "sub/a.png")
    pairs = find_pairs(tmp_path / "l", str(tmp_path / "i"), tmp_path / "n")
    assert pairs[2] == sub._replace(instances=tmp_path / "n/sub/a.png")


def test_pairs_of_cityscapes(tmp_path):
    for name in ("bochum/bochum_000_1", "ulm/ulm_000_7"):
        endings = ("labelIds.png", "instanceIds.png", "color.png", "polygons.json")
        touch(tmp_path / "gtFine", *(f"{name}_gtFine_{ending}" for ending in endings))
        touch(tmp_path / "left", f"{name}_leftImg8bit.png")
    folders = tmp_path / "gtFine", tmp_path / "left"
    pairs = find_pairs(*folders, convention="cityscapes")
    assert [pair.name for pair in pairs] == ["bochum/bochum_000_1", "ulm/ulm_000_7"]
    assert [path.name for path in pairs[1][1:]] == [
        "ulm_000_7_gtFine_labelIds.png",
        "ulm_000_7_leftImg8bit.png",
        "ulm_000_7_gtFine_instanceIds.png",
    ]
    pairs = find_pairs(*folders, instances=False, convention="cityscapes")
    assert [pair.instances for pair in pairs] == [None, None]


def test_folders_that_are_no_paths(tmp_path):
    for folders in ((None, None), (None, tmp_path), (3, tmp_path)):
        message = f"labels is {folders[0]}; it should be the path of a folder"
        assert refusal(find_pairs, *folders) == message
    assert "images is None; it should be" in refusal(find_pairs, tmp_path, None)


def test_folders_without_valid_pairs(tmp_path):
    labels, images = tmp_path / "l", tmp_path / "i"
    assert "labels is" in refusal(find_pairs, labels, images)
    labels.mkdir()
    touch(images, "a.jpg", "b.jpg", "c.jpg")
    assert "labels is" in refusal(find_pairs, labels, images)
    assert "has no images" in refusal(find_pairs, labels, images)
    touch(labels, "a.png", "d.png")
    message = refusal(find_pairs, labels, images)
    assert message.startswith("3 names without a partner, or with two") and "check-data" in message
    assert f"{images / 'b.jpg'} has no partner in labels ({labels})" in message
    assert f"{labels / 'd.png'} has no partner in images ({images})" in message
    touch(images, "a.png", "d.png")
    message = refusal(find_pairs, labels, images)
    assert f"{images / 'a.jpg'} and {images / 'a.png'} have the same name in images" in message
    assert "should be one of folder, coco_stuff" in refusal(
        find_pairs, labels, images, convention="coco"
    )
    assert "_gtFine_labelIds" in refusal(find_pairs, labels, images, convention="cityscapes")


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_that_leads_back_is_not_followed(tmp_path, target):
    for kind in ("l", "i"):
        touch(tmp_path / kind, "a.png", "sub/b.png")
    (tmp_path / "l" / "sub" / "back").symlink_to(target)
    assert [pair.name for pair in find_pairs(tmp_path / "l", tmp_path / "i")] == ["a", "sub/b"]


def test_links_to_other_folders_are_followed(tmp_path):
    touch(tmp_path / "l", "a.png")
    touch(tmp_path / "more", "b.png")
    touch(tmp_path / "i", "a.png", "linked/b.png")
    (tmp_path / "l" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "l")  # by a way of two links
    pairs = find_pairs(tmp_path / "l", tmp_path / "i")
    assert [pair.name for pair in pairs] == ["a", "linked/b"]


def prepared(convention, labels, instances=None):
    rules = CONVENTIONS[convention]
    preparation = Preparation(
        rules.num_classes, rules.dont_care, mode="crop", crop_size=2, label_shift=rules.label_shift
    )
    layout, _ = preparation(np.array(labels), np.zeros((2, 2, 3), np.uint8), instances)
    return layout.to_segmap()[0]


def test_conventions_of_labels():
    segmap = prepared("coco_stuff", [[0, 181], [255, 7]])
    assert segmap.argmax(0).tolist() == [[0, 181], [182, 7]] and len(segmap) == 183
    segmap = prepared("ade20k", [[0, 150], [1, 7]])
    assert segmap.argmax(0).tolist() == [[150, 149], [0, 6]] and len(segmap) == 151
    instances = np.array([[24001, 24002], [24001, 24001]], np.uint16)
    segmap = prepared("cityscapes", [[0, 33], [7, 34]], instances)
    assert segmap[:35].argmax(0).tolist() == [[0, 33], [7, 34]] and len(segmap) == 36
    assert segmap[35].tolist() == [[1, 1], [0, 1]]
    message = refusal(prepared, "ade20k", [[0, 151], [1, 7]])
    assert "labels has a 151 in 1 pixels, first at row 0, column 1; it should have 1 to" in message


# Preparation


def places(height, width):
    """An image whose pixels encode their own places: labels row · width + column, and a photograph
    with row and column in two channels.
    """
    row, column = np.mgrid[:height, :width]
    return row * width + column, np.stack([row, column, 0 * row], -1).astype(np.uint8)


SIZES = {  # for an image 48 wide and 32 high: (height, width) before cropping, worked out by hand
    "resize_and_crop": (15, 30),
    "crop": (32, 48),
    "scale_width": (20, 30),
    "scale_width_and_crop": (20, 30),
    "scale_shortside": (30, 45),
    "scale_shortside_and_crop": (30, 45),
    "fixed": (10, 20),
    "none": (32, 64),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_modes(mode, seed):
    """Pillow resizes labels and photograph as a whole, then both are cropped at the same place."""
    chance = None if seed is None else random.Random(seed)
    resized = mode not in ("crop", "fixed", "none")
    numbers, photograph = places(32, 48)
    preparation = Preparation(
        32 * 48,
        mode=mode,
        crop_size=20,
        load_size=30 if resized else None,
        aspect_ratio=2,
    )
    layout, image = preparation(numbers, photograph, random=chance)
    size = SIZES[mode]
    whole = [
        np.asarray(Image.fromarray(array).resize(size[::-1], how))
        for array, how in (
            (numbers.astype(np.int32), Image.Resampling.NEAREST),
            (photograph, Image.Resampling.BICUBIC),
        )
    ]
    crops = mode.endswith("crop")
    assert preparation.output_size == ((10, 20) if crops or mode == "fixed" else None)
    found = layout.palette.argmax(1)[layout.codes[0].long()].numpy()
    assert found.shape == image.shape[2:] == ((10, 20) if crops else size)
    mirrored = found[0, 0] > found[0, -1]
    if mirrored:
        found, image = found[:, ::-1], image.flip(-1)
    top, left = np.argwhere(whole[0] == found[0, 0])[0]
    if seed is None:
        assert not mirrored
        assert (top, left) == tuple((a - b) // 2 for a, b in zip(size, found.shape))
    part = np.s_[top : top + found.shape[0], left : left + found.shape[1]]
    assert (whole[0][part] == found).all()
    expected = torch.tensor(whole[1][part]).permute(2, 0, 1) / 127.5 - 1
    assert image.dtype == torch.float32 and image.shape[:2] == (1, 3)
    assert_agree(image[0], expected)


@pytest.mark.parametrize(
    "settings, size",
    [
        ({"mode": "scale_width", "load_size": 30}, (45, 30)),
        ({"mode": "scale_shortside", "load_size": 30}, (45, 30)),
        ({"mode": "scale_width"}, (48, 32)),  # to crop_size
        ({"mode": "fixed", "aspect_ratio": 0.5}, (64, 32)),
        ({"mode": "none"}, (64, 32)),
    ],
)
def test_sizes_of_upright_images(settings, size):
    labels, photograph, _ = drawn(50, 33)
    layout, image = Preparation(CLASSES, DONT_CARE, crop_size=32, **settings)(labels, photograph)
    assert layout.codes.shape[1:] == image.shape[2:] == size


def test_published_load_size():
    labels, photograph, instances = drawn(50, 40)
    ours, published = (
        Preparation(CLASSES, DONT_CARE, crop_size=256, load_size=load_size)(
            labels, photograph, instances
        )
        for load_size in (None, 286)
    )
    assert same((*ours, ""), (*published, ""))


def test_crops_and_flips_reach_all_places():
    """All corners and both directions occur, and nothing else."""
    numbers, photograph = places(5, 6)
    preparation = Preparation(30, mode="crop", crop_size=4)
    seen = set()
    for seed in range(200):
        layout, image = preparation(numbers, photograph, random=random.Random(seed))
        found = layout.to_segmap()[0].argmax(0)
        left, right = sorted((found[0, 0].item(), found[0, -1].item()))
        assert right - left == 3
        seen.add((left // 6, left % 6, bool(found[0, 0] > found[0, 1])))
        pixels = ((image[0] + 1) * 127.5).round().long()
        assert (pixels[0] * 6 + pixels[1] == found).all()
    assert seen == set(itertools.product(range(2), range(3), (False, True)))
    still = Preparation(30, mode="crop", crop_size=4, flip=False)
    layout, _ = still(numbers, photograph, random=random.Random(0))
    columns = [
        still(numbers, photograph, random=random.Random(seed))[0].to_segmap()[0].argmax(0)[0]
        for seed in range(20)
    ]
    assert all((row.diff() == 1).all() for row in columns)


def test_instances_edges_are_those_of_the_crop():
    labels = np.zeros((4, 6), np.uint8)
    instances = np.array([[1, 1, 1, 1, 1, 2]] * 4)
    preparation = Preparation(1, mode="crop", crop_size=4)
    layout, _ = preparation(labels, np.zeros((4, 6, 3), np.uint8), instances)
    # the centre crop does not contain the second instance
    assert layout.to_segmap()[0, 1].sum() == 0
    layout, _ = preparation(labels[:, 2:], np.zeros((4, 4, 3), np.uint8), instances[:, 2:])
    assert layout.to_segmap()[0, 1].tolist() == [[0, 0, 1, 1]] * 4


def test_kinds_of_images():
    labels, photograph, instances = drawn(32, 48)
    photograph = photograph // 2 + 64  # avoids values that bytes would clip between the two passes
    preparation = Preparation(CLASSES, DONT_CARE, crop_size=24)
    layout, image = preparation(labels, photograph, instances)
    pixels = torch.from_numpy(photograph).permute(2, 0, 1) / 127.5 - 1
    for other in (
        preparation(
            torch.from_numpy(labels), Image.fromarray(photograph), torch.from_numpy(instances)
        ),
        preparation(Image.fromarray(labels), pixels, Image.fromarray(instances)),
    ):
        assert layout.equal(other[0])
        # Bytes are rounded after each of two passes; a pass's absolute weights sum to at most 1.5.
        assert (image - other[1]).abs().max() <= 1.25 / 127.5
    black_and_white = torch.where(torch.arange(48) < 24, -1.0, 1.0).expand(3, 32, 48)
    assert preparation(labels, black_and_white)[1].abs().max() == 1  # bicubic would overshoot


def test_pictures_whose_sizes_do_not_fit():
    labels, photograph, instances = drawn(32, 48)
    preparation = Preparation(CLASSES, DONT_CARE, mode="crop", crop_size=40)
    message = refusal(preparation, labels, photograph)
    assert "the image is 48 × 32" in message and "40 × 40" in message
    preparation = Preparation(CLASSES, DONT_CARE, crop_size=16)
    message = refusal(preparation, labels[:-1], photograph)
    assert "labels is 48 × 31, the photograph is 48 × 32" in message
    assert "instances is 47 × 32" in refusal(preparation, labels, photograph, instances[:, 1:])
    assert "labels has a 12 in" in refusal(preparation, labels * 0 + 12, photograph)
    for name, wrong in {
        "labels": (labels / 2, photograph),
        "photograph": (labels, photograph / 2),
        "labels has shape": (labels[None], photograph),
        "photograph has values": (labels, torch.full((3, 32, 48), 2.0)),
        "photograph is": (labels, photograph[..., :2]),
    }.items():
        assert name in refusal(preparation, *wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "resize"},
        {"mode": "crop", "load_size": 300},
        {"load_size": 255},
        {"crop_size": 0},
        {"crop_size": 2.5},
        {"aspect_ratio": 0},
        {"aspect_ratio": 1000},
        {"aspect_ratio": "1"},
        {"num_classes": 0},
        {"dont_care": 0.5},
        {"label_shift": None},
    ],
)
def test_invalid_preparations(settings):
    message = refusal(Preparation, **{"num_classes": 3} | settings)
    assert any(message.startswith(name) for name in settings)


# Data sets


def same(one, other):
    return one[0].equal(other[0]) and torch.equal(one[1], other[1]) and one[2:] == other[2:]


def test_folder(folder):
    data = data_set(folder)
    assert len(data) == 7 and data[6].name == "6"
    assert same(data[1, 4], data[1, 4]) and same(data[4], data[4])
    assert same(data[1, 4], pickle.loads(pickle.dumps(data_set(folder)))[1, 4])
    assert not all(same(data[0, 4], data[epoch, 4]) for epoch in range(1, 4))
    labels, photograph, instances = drawn(36, 40, 4)
    assert same(data[4], (*data.preparation(labels, photograph, instances), "4"))
    labels[3, 5] = 77
    save(labels, folder / "labels" / "4.png")
    words = "4: labels has a 77 in 1 pixels, first at row 3, column 5; it should have"
    for size in (40, 80):  # as large as the file, and larger
        flat = data_set(folder, mode="fixed", load_size=None, crop_size=size, aspect_ratio=40 / 36)
        assert refusal(lambda: flat[4]).startswith(words)


def test_batches_are_completely_numbered(folder, monkeypatch):
    """A training step of generator and discriminator numbers nothing, in forward or in backward."""
    generator = SPADEGenerator.official(CLASSES + 2, crop_size=32, ngf=2, nhidden=2)
    discriminator = MultiscaleDiscriminator(CLASSES + 2 + 3, n_scales=3, ndf=4)
    data = data_set(folder)
    numbered = {
        "sizes": generator.sizes,
        "kernel_size": generator.kernel_size,
        "scales": 3,
    }
    batch = collate([data[0, 1], data[0, 2]], **numbered)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # pinning needs a GPU
    batches = [batch, pickle.loads(pickle.dumps(batch)), batch.pin_memory(), batch.to("cpu")]
    batches += itertools.islice(loader(data, 2, workers=1, **numbered), 1)
    plain = collate([data[0, 1], data[0, 2]])
    assert plain.layout.equal(batch.layout) and not plain.layout._windows
    segmap = torch.cat([data[0, 1].layout.to_segmap(), data[0, 2].layout.to_segmap()])
    assert torch.equal(batch.layout.to_segmap(), segmap)

    def refuse(*_):
        raise AssertionError("a step numbered windows")

    for name in ("number", "number_patches"):
        monkeypatch.setattr(spade_fast.layout, name, refuse)
    for given in batches:
        fake = generator(given.layout)
        both = torch.cat([fake, given.images])
        sum(scale[-1].sum() for scale in discriminator(both, given.layout)).backward()
    with pytest.raises(AssertionError, match="numbered"):
        discriminator(plain.images, plain.layout)


def test_batches_of_several_sizes_are_refused(folder):
    save(drawn(36, 64)[0], folder / "labels" / "1.png")
    save(drawn(36, 64)[1], folder / "images" / "1.png")
    save(drawn(36, 64)[2], folder / "instances" / "1.png")
    data = data_set(folder, mode="none", load_size=None)
    assert data[0].layout.codes.shape[1:] == (32, 32) and data[1].image.shape == (1, 3, 32, 64)
    assert "with the same size" in refusal(collate, [data[0], data[1]])


# Loaders


def first(batches, count):
    return list(itertools.islice(batches, count))


def test_sampler():
    batches = first(Sampler(7, 2, seed=5), 9)
    for epoch in range(3):
        own = batches[3 * epoch : 3 * epoch + 3]
        indices = [index for batch in own for _, index in batch]
        assert len(set(indices)) == 6 and set(indices) < set(range(7))
        assert all(number == epoch for batch in own for number, _ in batch)
    assert batches[:3] != [[(0, index) for _, index in batch] for batch in batches[3:6]]
    assert batches != first(Sampler(7, 2, seed=6), 9)
    for start in range(7):
        assert first(Sampler(7, 2, seed=5, start=start), 2) == batches[start : start + 2]
    whole = first(Sampler(7, 6, seed=5), 4)
    shares = [first(Sampler(7, 2, seed=5, rank=rank, processes=3), 4) for rank in range(3)]
    assert [one + two + three for one, two, three in zip(*shares)] == whole


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"batch": 8}, "the data set has 7 examples; it should have at least one batch"),
        ({"batch": 4, "processes": 2}, "the data set has 7 examples"),
        ({"batch": 0}, "batch is 0; it should be 1 or more"),
        ({"batch": "2"}, "batch is '2'; it should be a whole number"),
        ({"rank": 1}, "rank is 1; it should be less than processes, 1"),
    ],
)
def test_invalid_samplers(settings, words):
    assert refusal(Sampler, 7, **{"batch": 1} | settings).startswith(words)


def test_loaders_yield_the_same_for_any_workers_processes_and_start(folder):
    data = data_set(folder)
    state = torch.get_rng_state()
    expected = first(loader(data, 4, seed=1), 4)  # four epochs
    for settings in ({"workers": 2}, {"workers": 1, "start": 2}):
        start = settings.get("start", 0)
        found = first(loader(data, 4, seed=1, **settings), 4 - start)
        assert all(map(same, found, expected[start:]))
    shares = [first(loader(data, 2, seed=1, rank=rank, processes=2), 4) for rank in (0, 1)]
    for whole, *parts in zip(expected, *shares):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert whole.names == parts[0].names + parts[1].names
        assert whole.layout.equal(SemanticLayout.stack(part.layout for part in parts))
    assert torch.equal(state, torch.get_rng_state())  # training's random state is untouched


def test_batches_come_from_workers_as_one_tensor(folder):
    """Otherwise each tensor would be a file to open. Changing one tensor leaves the others
    unchanged.
    """
    data = data_set(folder)
    numbered = {"sizes": [(16, 16), (32, 32)], "scales": 2}
    expected, (batch,) = (
        first(loader(data, 4, workers=workers, **numbered), 1) for workers in (0, 1)
    )
    assert same(batch, *expected)
    windows = batch.layout.windows((16, 16), 3)
    patches = batch.layout.avg_pool(3, 2, 1, False).patches(4, 2, 2)
    tensors = [batch.images, batch.layout.codes, batch.layout.palette, windows.index]
    tensors += [*windows.table, patches.contents, patches.order]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    batch.images.zero_()
    assert batch.layout.windows((16, 16), 3) is windows
    assert same(batch._replace(images=expected[0].images), *expected)


def test_workers_ignore_interrupts(folder):
    data = data_set(folder)
    batches = iter(loader(data, 2, workers=1))
    next(batches)
    (worker,) = batches._workers
    for number in (signal.SIGINT, signal.SIGTERM):  # sent by another process than the loader's
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
        assert len(first(batches, 5)) == 5
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(20)
    assert worker.exitcode == 0


class Again:
    """An iterable that starts again each time."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for number in range(self.count):
            yield drawn(36, 40, number)


def test_streams():
    preparation = Preparation(CLASSES, DONT_CARE, crop_size=32)
    stream = Stream(Again(5), preparation, seed=2)
    expected = first(loader(stream, 2), 6)  # endless
    assert [batch.names for batch in expected[:3]] == [("0", "1"), ("2", "3"), ("4", "5")]
    assert expected[2].images.shape == (2, 3, 32, 32)
    example = preparation(*drawn(36, 40, 3), random=random.Random("2 3"))
    assert torch.equal(expected[1].images[1:], example[1])
    for settings in ({"workers": 2}, {"workers": 1, "start": 2}, {"start": 5}):
        start = settings.get("start", 0)
        assert all(map(same, first(loader(stream, 2, **settings), 6 - start), expected[start:]))
    shares = [first(loader(stream, 1, rank=rank, processes=2), 6) for rank in (0, 1)]
    for whole, *parts in zip(expected, *shares):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert whole.names == parts[0].names + parts[1].names


def test_streams_that_end_and_invalid_streams():
    preparation = Preparation(CLASSES, DONT_CARE, crop_size=32)
    once = Stream(iter([drawn(36, 40, number)[:2] for number in range(5)]), preparation)
    assert [batch.names for batch in loader(once, 2)] == [("0", "1"), ("2", "3")]
    wrong = Stream([drawn(36, 40)[:1]], preparation)
    assert refusal(next, iter(loader(wrong, 1))).startswith("example 0: this is a tuple")
    labels, photograph, _ = drawn(36, 40)
    wrong = Stream([(labels * 0 + 99, photograph)], preparation)
    assert refusal(next, iter(loader(wrong, 1))).startswith("example 0: labels has a 99")
