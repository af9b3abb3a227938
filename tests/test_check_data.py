"""`spade-fast check-data`: every kind of ruined folder, and right ones."""

import errno
import os

import numpy as np
import pytest
import ruined
from drawn_data import drawn, save
from PIL import Image
from refusals import refusal
from ruined import RUINS, out_of_range
from typer.testing import CliRunner

from spade_fast.cli import app
from spade_fast.data import check_data, colours, paint
from spade_fast.data.colours import _seen as seen_as
from spade_fast.data.faults import grouped


@pytest.fixture
def folder(tmp_path):
    """Three pairs of 12 × 10 pixels. All labels are 0, except for two pixels of 3 in the second map
    and one pixel of 255 in the third.
    """
    for number in range(3):
        labels = np.zeros((10, 12), np.uint8)
        if number == 1:
            labels[4, 5:7] = 3
        if number == 2:
            labels[9, 0] = 255
        save(labels, tmp_path / "label" / f"{number:03}.png")
        save(drawn(10, 12, number)[1], tmp_path / "img" / f"{number:03}.png")
        save(labels, tmp_path / "inst" / f"{number:03}.png")
    return tmp_path


def folders(folder):
    return [folder / kind for kind in ("label", "img", "inst")]


def run(folder, *arguments):
    options = ("--labels", "--images", "--instances")
    names = [part for pair in zip(options, folders(folder)) for part in map(str, pair)]
    settings = {"COLUMNS": "200"}
    return CliRunner().invoke(app, ["check-data", *names, *map(str, arguments)], env=settings)


def test_right_folders(folder):
    report = check_data(*folders(folder))
    assert report.pairs == 3 and report.faults == [] and report.shortest == 10
    assert report.pixels == {0: 357, 3: 2, 255: 1} and report.images == {0: 3, 3: 1, 255: 1}
    assert (report.num_classes, report.dont_care) == (4, 255)
    assert report.classes == {0: (357, 3), 3: (2, 1), 4: (1, 1)}
    assert report.notes == [
        "these label maps suggest --num-classes 4 --dont-care 255",
        "2 of 4 classes never occur: 1 to 2",
    ]
    result = run(folder)
    assert result.exit_code == 0 and "Nothing is wrong." in result.output
    assert "--num-classes 4 --dont-care 255" in result.output
    assert "images are the label maps that have the class." in result.output
    assert "the shortest side of a photograph is 10 pixels." in result.output
    assert "its number in the files" not in result.output
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "357", "99.17%", "3"],
        ["3", "2", "0.56%", "1"],
        ["don't care (255)", "1", "0.28%", "1"],
    ]


@pytest.mark.parametrize(
    "values, suggested",
    [
        ([0, 1, 2], (3, None)),
        ([0, 5, 255], (6, 255)),
        ([0, 254, 255], (256, None)),  # three ordinary classes: nothing sets 255 apart
        ([0, 400, 65535], (401, 65535)),
        ([255], (1, 255)),
        ([7, 300], (301, None)),
    ],
)
def test_suggestions(tmp_path, values, suggested):
    labels = np.array([values], np.uint16 if max(values) > 255 else np.uint8)
    save(labels, tmp_path / "labels" / "a.png")
    save(np.zeros((1, len(values), 3), np.uint8), tmp_path / "images" / "a.png")
    report = check_data(tmp_path / "labels", tmp_path / "images")
    assert (report.num_classes, report.dont_care) == suggested and not report.faults
    given = check_data(tmp_path / "labels", tmp_path / "images", num_classes=500)
    assert (given.num_classes, given.dont_care) == (500, 65535 if 65535 in values else None)
    assert len(given.faults) == (65535 in values)


@pytest.mark.parametrize("ruin", RUINS, ids=lambda ruin: ruin.__name__)
def test_ruined_folders(folder, ruin):
    expected = ruin(folder)
    result = run(folder, "--num-classes", 4, "--dont-care", 255, "--sheet", folder / "sheet.png")
    assert result.exit_code == 1
    faults = [line for line in result.output.splitlines() if line.startswith("WRONG: ")]
    assert len(faults) == 1 and "1 fault." in result.output, result.output
    assert all(words in faults[0] for words in expected), faults
    assert "Nothing is wrong" not in result.output
    assert ruin is not out_of_range or "it should have 0 to 3, or 255 for don't care" in faults[0]
    assert Image.open(folder / "sheet.png").width > 1000


def test_colour_coded_maps(folder):
    pixels = np.zeros((10, 12, 3), np.uint8)
    pixels[2, 3] = (9, 8, 7)
    for number in range(3):
        save(pixels, folder / "label" / f"{number:03}.png")
    (folder / "palette.txt").write_text("0 0 0 1\n9 8 7 0\n")
    result = run(folder, "--palette", folder / "palette.txt")
    assert result.exit_code == 0 and "--num-classes 2" in result.output
    (folder / "palette.txt").write_text("0 0 0 1\n")
    result = run(folder, "--palette", folder / "palette.txt")
    assert result.exit_code == 1 and "(9, 8, 7) in 1 pixels, first at row 2" in result.output
    assert "(2 more like this: " in result.output


def test_conventions(folder):
    labels = np.array([[0, 1], [150, 1]], np.uint8)
    for number in range(3):
        save(labels, folder / "label" / f"{number:03}.png")
        save(drawn(40, 40)[1][:2, :2], folder / "img" / f"{number:03}.png")
    report = check_data(*folders(folder)[:2], convention="ade20k")
    assert report.classes == {0: (6, 3), 149: (3, 3), 150: (3, 3)} and not report.faults
    command = run(folder, "--convention", "ade20k")
    assert "A class is its number in the files minus 1." in command.output
    report = check_data(*folders(folder)[:2], convention="ade20k", num_classes=149)
    assert "first at row 1, column 0; it should have 1 to 149, or 0 for" in report.faults[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--convention", "coco"], "convention is 'coco'"),
        (["--sheet", "nowhere/sheet.png"], "sheet is nowhere"),
        (["--sheet", "sheet.jpg"], ".png"),
    ],
)
def test_wrong_arguments(folder, arguments, words):
    result = run(folder, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_sheet(folder):
    """Photograph, labels in their colours, and instances' edges are in their places."""
    numbers = np.repeat([0, 3], 120)[None].repeat(240, 0).astype(np.uint8)  # 240 × 240
    for number in range(3):
        save(numbers, folder / "label" / f"{number:03}.png")
        save(np.full((240, 240, 3), 90, np.uint8), folder / "img" / f"{number:03}.png")
        save(numbers, folder / "inst" / f"{number:03}.png")
    report = check_data(*folders(folder), sheet=folder / "sheet.png")
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    ours = colours(report.num_classes)
    for colour, pixels in {
        (90, 90, 90): 3 * 240 * 240,
        tuple(ours[0].tolist()): 3 * 240 * 119,
        tuple(ours[3].tolist()): 3 * 240 * 119,
        (255, 255, 255): 3 * 240 * 2,
    }.items():
        found = (sheet == colour).all(-1).sum()
        assert 0.95 * pixels < found < 1.5 * pixels  # numbers and the key are written on it


def test_names_that_are_not_utf8(folder):
    name = os.fsdecode(b"bad\xff.png")
    for path in folders(folder):
        (path / "001.png").rename(path / name)
    result = run(folder, "--num-classes", 3, "--dont-care", 255, "--sheet", folder / "sheet.png")
    assert result.exit_code == 1 and (folder / "sheet.png").is_file()
    assert f"WRONG: {folder}/label/bad\\udcff.png has a 3 in 2 pixels" in result.output


def test_a_sheet_is_written_whole_or_not_at_all(folder, monkeypatch):
    sheet = folder / "sheet.png"
    sheet.write_bytes(b"before")

    def save_half(image, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises(OSError, match="No space left on device: .*sheet.png"):
        check_data(*folders(folder), sheet=sheet)
    assert sheet.read_bytes() == b"before" and len(list(folder.glob(".*"))) == 0


def test_colours():
    many = colours(400)
    assert many.dtype == np.uint8 and (colours(183) == many[:183]).all()
    seen = seen_as(np.concatenate([many[:183], [(255, 255, 255)]]))
    distances = np.sqrt(((seen[:, None] - seen[None]) ** 2).sum(-1)) + np.eye(184)
    assert distances.min() > 0.05  # the eye can distinguish 0.02
    assert len({tuple(colour) for colour in many.tolist()}) == 400
    assert many.sum(1).max() < 3 * 255 and many.sum(1).min() > 100  # neither white nor dark
    published = {(255, 0, 0): (0.628, 0.225, 0.126), (0, 0, 255): (0.452, -0.032, -0.312)}
    for colour, oklab in published.items():
        assert np.allclose(seen_as(np.array([colour])), oklab, atol=1e-3)
    assert colours(0).shape == (0, 3) and len(colours(5000)) == 5000
    labels = np.array([[0, 2], [1, 0]])
    assert (paint(labels, many)[1] == many[[1, 0]]).all()
    assert "numbers from 0 to 2; they should be 0 to 1" in refusal(paint, labels, many[:2])


def test_faults_with_one_cause_are_one_line(folder):
    save(np.zeros((10, 12), np.uint8), folder / "label" / "of a cat.png")
    for number in range(3):
        labels = np.full((10, 12), 9, np.uint8)
        labels[number] = 4 + number
        save(labels, folder / "label" / f"{number:03}.png")
    ruined.lossy(folder, "000"), ruined.dangling(folder, "001"), ruined.dangling(folder, "002")
    result = run(folder, "--num-classes", 4)
    lines = [line for line in result.output.splitlines() if line.startswith("WRONG: ")]
    first, second = (f"{folder}/label/00{number}.png has a {number + 4}" for number in (1, 2))
    assert len(lines) == 4 and "6 faults. --all-faults prints a line for each." in result.output
    assert any(
        f"{first} in 12" in line and line.endswith(f"(1 more like this: {folder}/label/002.png)")
        for line in lines
    )
    assert any("No such file or directory (1 more like this: " in line for line in lines)
    result = run(folder, "--num-classes", 4, "--all-faults")
    lines = [line for line in result.output.splitlines() if line.startswith("WRONG: ")]
    assert len(lines) == 6 and any(f"{second} in 12" in line for line in lines)
    assert "6 faults. Rows and columns" in result.output


def test_groups_of_faults():
    faults = [f"a b/{number}.png has a {number} in 3 pixels" for number in range(1500)]
    others = ["a b/7.jpg is a JPEG", "a b/1.png has no partner in images (x.png)"]
    assert grouped([*faults, *others, *others]) == [
        "a b/0.png has a 0 in 3 pixels (1,499 more like this: a b/1.png, a b/2.png, a b/3.png, …)",
        *(
            f"{fault} (1 more like this: {fault.split(' has')[0].split(' is')[0]})"
            for fault in others
        ),
    ]
    assert grouped(others) == others and grouped([]) == []


@pytest.mark.parametrize(
    "values, given, found, note",
    [
        ({200: 3}, {}, (20, None), "--num-classes 201 or --dont-care 200"),
        ({255: 3}, {}, (20, 255), None),
        ({255: 3}, {"dont_care": 0}, (20, 0), "--num-classes 256"),
        ({200: 3, 240: 1}, {}, (20, None), "240 (1 pixel in 1 label map); else give --num-classes"),
        ({200: 3, 255: 900}, {}, (20, 255), "--num-classes 201"),
        ({200: 300}, {}, (201, None), None),  # too many for a mistake
        ({30: 1}, {}, (31, None), None),  # too near
        ({200: 3}, {"num_classes": 5}, (20, None), "200 (3 pixels in 1 label map); else"),
        ({200: 3}, {"num_classes": 20}, None, "200 (3 pixels in 1 label map); else"),
        ({255: 3}, {"num_classes": 20}, (20, 255), None),
        ({255: 3}, {"num_classes": 25}, (25, 255), None),
        ({255: 3}, {"num_classes": 300}, None, None),
        ({200: 3}, {"num_classes": 20, "dont_care": 200}, None, None),
    ],
)
def test_labels_far_above_the_others(tmp_path, values, given, found, note):
    labels = np.repeat(np.arange(20, dtype=np.uint8), 500)
    for value, count in values.items():
        labels[value : value + count] = value
    save(labels.reshape(100, 100), tmp_path / "labels" / "a.png")
    save(np.zeros((100, 100, 3), np.uint8), tmp_path / "images" / "a.png")
    report = check_data(tmp_path / "labels", tmp_path / "images", **given)
    num_classes, dont_care = found or (None, None)
    care = "" if dont_care is None else f" --dont-care {dont_care}"
    suggestion = f"these label maps suggest --num-classes {num_classes}{care}"
    notes = [note for note in report.notes if "never occur" not in note]
    assert len(notes) == (found is not None) + (note is not None), notes
    assert found is None or notes[0] == suggestion
    assert note is None or note in notes[-1]
    assert report.num_classes == given.get("num_classes", num_classes)
    assert [report.pixels[label] for label in report.outside if label in values] == (
        [] if note is None else [count for label, count in values.items() if label != dont_care]
    )
