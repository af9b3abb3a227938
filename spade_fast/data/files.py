"""Reading label maps, photographs and palettes from files."""

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

Palette = Mapping[tuple[int, int, int], int]  # the class that each colour stands for

LOSSY = ("JPEG", "MPO", "JPEG2000")  # formats of images that no label map survives
# Nothing else is tried: Pillow hands some formats to other programs, whoever the file is from.
FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "BMP", "TIFF", "GIF", "PPM")
NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of one number a pixel
COLOURS = ("RGB", "RGBA", "RGBX")
ORIENTATION = 0x0112  # the EXIF tag: 1 is upright


def read_labels(path: str | os.PathLike, palette: Palette | None = None) -> np.ndarray:
    """The numbers of a label map or an instance map, int64 [height, width].

    Without a palette they are the numbers in the file: of 1, 8 or 16 bits, or the indices of a
    paletted PNG. With one, every file is read by its colours, since writers store a map of few
    colours as a paletted or a grey image. Transparency is not looked at.

    Args:
        palette: the class of each colour, as `read_palette` returns.

    Errors: ValueError, which names the file: it is no whole image, it is compressed with losses, it
        has colours and there is no palette, or a colour is not in the palette.
    """
    image = _read(path)
    if image.format in LOSSY:
        raise ValueError(
            f"{path} is a {image.format}, whose compression changes labels: it should be a PNG"
        )
    if palette is not None and image.mode in ("1", "L", "P", *COLOURS):
        return _classes_of(np.asarray(image.convert("RGB")), palette, path)
    if image.mode in COLOURS:
        raise ValueError(
            f"{path} has colours ({image.mode}), and it takes a palette to know their classes: give"
            " a file with a line R G B CLASS for each"
        )
    if palette is not None or image.mode not in NUMBERS:
        wanted = "colours, for there is a palette" if palette is not None else "whole numbers"
        raise ValueError(f"{path} has pixels of the kind {image.mode}, it should have {wanted}")
    return np.asarray(image).astype(np.int64)


def read_photograph(
    path: str | os.PathLike,
    content: bytes | None = None,
    most_pixels: int | None = None,
    upright: bool = False,
) -> Image.Image:
    """A photograph as an RGB image of PIL. By default it has the rows and columns of the file,
    which its label map has, too: an EXIF orientation is ignored, as in the published code, except
    in a TIFF, which Pillow itself turns.

    Args:
        content: of the file, which is then not opened: path is its name in messages.
        most_pixels: that it may have; more are not decoded.
        upright: whether to turn it as its EXIF orientation says, for a photograph without a label
            map.

    Errors: ValueError, which names the file: it is no whole image, it has more pixels, more than 8
        bits for a grey one, or transparent ones, whose colour nobody sees.
    """
    if most_pixels is not None:
        width, height = _opened(path, lambda image: image.size, content)
        if width * height > most_pixels:
            raise ValueError(
                f"{path} has {width} × {height} pixels, it should have {most_pixels} or fewer"
            )
    image = _read(path, content, upright)
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(
            f"{path} has pixels of the kind {image.mode}, a photograph should have 8 bits per"
            " channel"
        )
    if image.has_transparency_data:
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"{path} has transparent pixels, a photograph should have none")
    return image.convert("RGB")


def read_orientation(path: str | os.PathLike) -> int:
    """The EXIF orientation that `read_photograph` ignores: 1 if there is none, or if the file is a
    TIFF, which Pillow itself turns.

    Errors: ValueError where the file is no image.
    """

    def found(image):
        return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)

    return _opened(path, found)


def read_palette(path: str | os.PathLike) -> dict[tuple[int, int, int], int]:
    """The class of each colour, from a text file with a line `R G B CLASS` for each colour: 0 to
    255, and 0 or more; a name may follow. Several colours may have one class; `#` begins a comment.

    Errors: ValueError, which names the file and the line.
    """
    palette: dict[tuple[int, int, int], int] = {}
    for number, line, words in lines_of(path):
        try:
            *colour, label = map(int, words[:4])
            is_right = len(colour) == 3 and label >= 0 and all(0 <= part < 256 for part in colour)
        except ValueError:
            is_right = False
        if not is_right:
            raise ValueError(
                f"{path}, line {number}, is {line!r}, it should be R G B CLASS: three"
                " numbers from 0 to 255 and a class from 0 on"
            )
        red, green, blue = colour
        if palette.setdefault((red, green, blue), label) != label:
            raise ValueError(
                f"{path}, line {number}, has the colour {tuple(colour)} for class {label}, an"
                f" earlier line has it for {palette[red, green, blue]}"
            )
    if not palette:
        raise ValueError(f"{path} has no colours, it should have lines R G B CLASS")
    return palette


def lines_of(path: str | os.PathLike) -> Iterator[tuple[int, str, list[str]]]:
    """The number, the text and the words of each line of a text file that has words before `#`,
    which begins a comment. Errors: OSError; ValueError where it is no text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from None
    for number, line in enumerate(lines, start=1):
        if words := line.partition("#")[0].split():
            yield number, line.strip(), words


def _classes_of(pixels, palette, path):
    """The class of each pixel, uint8 [height, width, 3], by its colour."""
    numbers = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    colours = sorted(palette)
    known = np.array([red << 16 | green << 8 | blue for red, green, blue in colours], np.int32)
    places = np.searchsorted(known, numbers).clip(max=len(known) - 1)
    wrong = known[places] != numbers
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        count = int((numbers == numbers[row, column]).sum())
        raise ValueError(
            f"{path} has the colour {tuple(pixels[row, column].tolist())} in {count} pixels, first"
            f" at row {row}, column {column}; the palette does not have it"
            f" ({int(wrong.sum())} pixels have colours that it does not have)"
        )
    return np.array([palette[colour] for colour in colours], np.int64)[places]


def _read(path, content=None, upright=False):
    """All of an image, upright or as it is in the file."""

    def load(image):
        image.load()
        return ImageOps.exif_transpose(image) if upright else image

    return _opened(path, load, content)


def _opened(path, function, content=None):
    """What function returns for the image in a file, or in its content."""
    # Errors of the file system are raised here, as they are.
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        try:
            return function(Image.open(file, formats=FORMATS))
        except MemoryError:
            raise
        except Exception as error:  # of any type, by where the file ends or what it is instead
            reason = str(error).partition("\n")[0] or repr(error)
            if isinstance(error, Image.UnidentifiedImageError):
                reason = "of no format that is known"
            raise ValueError(f"{path} is no image, or not a whole one: {reason}") from error
