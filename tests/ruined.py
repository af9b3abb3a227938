"""Ways to ruin a folder of scenes that drawn_data.draw_folder has drawn. Each ruins the scene of
one name, and returns the words that a refusal should contain.
"""

import numpy as np
from drawn_data import save
from PIL import Image


def missing(folder, name="001"):
    (folder / "img" / f"{name}.png").unlink()
    return [f"label/{name}.png has no partner in images"]


def missing_instances(folder, name="001"):
    (folder / "inst" / f"{name}.png").unlink()
    return [f"label/{name}.png has no partner in instances"]


def double(folder, name="001"):
    pixels = np.asarray(Image.open(folder / "img" / f"{name}.png"))
    save(pixels, folder / "img" / f"{name}.jpg")
    return [f"img/{name}.jpg and", f"img/{name}.png have the same name in images"]


def truncated(folder, name="001", kind="img"):
    path = folder / kind / f"{name}.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [f"{kind}/{name}.png is not an image, or is incomplete"]


def truncated_labels(folder, name="001"):
    return truncated(folder, name, "label")


def text(folder, name="001"):
    (folder / "label" / f"{name}.png").write_text("these are no labels")
    return [f"label/{name}.png is not an image, or is incomplete: its format is not recognised"]


def larger(folder, name="001"):
    height, width = size(folder, name)
    save(np.zeros((height + 1, width), np.uint8), folder / "label" / f"{name}.png")
    return [
        f"label/{name}.png is {width} × {height + 1}, ",
        f"img/{name}.png is {width} × {height}: they should have the same size",
    ]


def other_instances(folder, name="001"):
    height, width = size(folder, name)
    save(np.zeros((height, width + 1), np.uint8), folder / "inst" / f"{name}.png")
    return [f"inst/{name}.png is {width + 1} × {height}, "]


def out_of_range(folder, name="001"):
    labels = np.zeros(size(folder, name), np.uint8)
    labels[3, 5:7], labels[0, 3] = 200, 210
    save(labels, folder / "label" / f"{name}.png")
    return [
        f"label/{name}.png has a 200 in 2 pixels, first at row 3, column 5; ",
        "; 2 labels in 3 pixels are out of range",
    ]


def turned(folder, name="001"):
    path, exif = folder / "img" / f"{name}.png", Image.Exif()
    exif[0x0112] = 3
    save(np.asarray(Image.open(path)), path, exif=exif)
    return [f"img/{name}.png has the EXIF orientation 3"]


def coloured(folder, name="001"):
    save(np.zeros((*size(folder, name), 3), np.uint8), folder / "label" / f"{name}.png")
    return [f"label/{name}.png has colours (RGB), whose classes are not known"]


def lossy(folder, name="001"):
    save(np.zeros(size(folder, name), np.uint8), folder / "label" / f"{name}.jpg")
    (folder / "label" / f"{name}.png").unlink()
    return [f"label/{name}.jpg is a JPEG"]


def stretched(folder, name="001"):
    height, width = size(folder, name)
    (folder / "label" / f"{name}.png").unlink()
    header = f"P5 {width} {height} 11 ".encode()
    (folder / "label" / f"{name}.pgm").write_bytes(header + bytes(height * width))
    return [f"label/{name}.pgm has numbers up to 11, which some programs stretch: it should be a"]


def dangling(folder, name="001"):
    path = folder / "img" / f"{name}.png"
    path.unlink()
    path.symlink_to(folder / "nowhere.png")
    return ["No such file or directory", f"img/{name}.png"]


def size(folder, name):
    with Image.open(folder / "label" / f"{name}.png") as image:
        return image.height, image.width


RUINS = [
    missing,
    missing_instances,
    double,
    truncated,
    truncated_labels,
    text,
    larger,
    other_instances,
    out_of_range,
    turned,
    coloured,
    lossy,
    stretched,
    dangling,
]
