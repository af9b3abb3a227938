"""Reading label maps, photographs and palettes from files."""

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Palette = Mapping[tuple[int, int, int], int]  # the class that each colour stands for

LOSSY = ("JPEG", "MPO", "JPEG2000")  # formats whose compression changes labels
LOSSY_TIFFS = ("jpeg", "tiff_jpeg", "webp")  # such compressions of a TIFF, as Pillow names them
# No other format is opened: Pillow passes some to external programs, even from untrusted sources.
FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "BMP", "TIFF", "GIF", "PPM")
NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")  # modes with a number per pixel
COLOURS = ("RGB", "RGBA", "RGBX")
# How the pixels of a file are stored, as Pillow names it, if its numbers are those in the file.
# Grey of 2 or 4 bits it stretches to 8, and where 0 is white it inverts.
SAME = re.compile(r"1|L|LX|[1L];R|[PI].*")
LARGEST = (255, 65535)  # numbers in a PGM that Pillow does not stretch
ORIENTATION = 0x0112  # the EXIF tag: 1 is upright


def read_labels(path: str | os.PathLike, palette: Palette | None = None) -> np.ndarray:
    """The numbers of a label map or an instance map, int64 [height, width].

    Without a palette they are the numbers in the file: of 1, 8 or 16 bits, or the indices of a
    paletted PNG. With a palette, every file is read by its colours, because some programs store a
    map of few colours as a paletted or a grey image. Transparency is ignored.

    Args:
        palette: the class of each colour, as `read_palette` returns.

    Errors: ValueError, which names the file, if it is not a complete image, its compression is
        lossy, programs disagree on its numbers and there is no palette, it has colours and there is
        no palette, or a colour is not in the palette.
    """

    def load(image):
        change = _change_of(image, palette is not None)  # decoding forgets how pixels are stored
        image.load()
        return image, change

    image, change = opened(path, load)
    if change is not None:
        raise ValueError(f"{path} {change}: it should be a PNG of 8 or 16 bits")
    if palette is not None and image.mode in ("1", "L", "P", *COLOURS):
        return _classes_of(np.asarray(image.convert("RGB")), palette, path)
    if image.mode in COLOURS:
        raise ValueError(
            f"{path} has colours ({image.mode}), whose classes are not known without a palette:"
            " give a file with a line R G B CLASS for each colour"
        )
    if palette is not None or image.mode not in NUMBERS:
        wanted = "colours, as in the palette" if palette is not None else "whole numbers"
        raise ValueError(f"{path} has pixels of mode {image.mode}; it should have {wanted}")
    return np.asarray(image).astype(np.int64)


def read_photograph(
    path: str | os.PathLike,
    content: bytes | None = None,
    most_pixels: int | None = None,
    upright: bool = False,
) -> Image.Image:
    """A photograph as an RGB image of PIL. By default it has the rows and columns of the file,
    because its label map has the same: an EXIF orientation is ignored, as in the published code,
    except in a TIFF, which Pillow itself turns.

    Args:
        content: the file's bytes; the file is then not opened, and path is its name in messages.
        most_pixels: the limit above which the image is not decoded.
        upright: whether to turn the image as its EXIF orientation says, for a photograph without a
            label map.

    Errors: ValueError, which names the file, if it is not a complete image, it has more pixels than
        the limit, transparent pixels, or grey pixels of more than 8 bits.
    """
    if most_pixels is not None:
        width, height = opened(path, lambda image: image.size, content)
        if width * height > most_pixels:
            raise ValueError(
                f"{path} has {width} × {height} pixels; it should have {most_pixels} or fewer"
            )
    image = _read(path, content, upright)
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(
            f"{path} has pixels of mode {image.mode}, a photograph should have 8 bits per channel"
        )
    if image.has_transparency_data:
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"{path} has transparent pixels, a photograph should have none")
    return image.convert("RGB")


def read_orientation(path: str | os.PathLike) -> int:
    """The EXIF orientation that `read_photograph` ignores: 1 if there is none, or if the file is a
    TIFF, which Pillow itself turns.

    Errors: ValueError if the file is not an image.
    """

    def found(image):
        return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)

    return opened(path, found)


def read_palette(path: str | os.PathLike) -> dict[tuple[int, int, int], int]:
    """The class of each colour, from a text file with a line `R G B CLASS` for each: R, G and B are
    0 to 255, CLASS is 0 or more, and a name may follow. Several colours may have the same class.
    `#` begins a comment.

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
                f"{path}, line {number}, is {line!r}; it should be R G B CLASS: three"
                " numbers from 0 to 255 and a class of 0 or more"
            )
        red, green, blue = colour
        if palette.setdefault((red, green, blue), label) != label:
            raise ValueError(
                f"{path}, line {number}, gives the colour {tuple(colour)} to class {label}, an"
                f" earlier line gives it to {palette[red, green, blue]}"
            )
    if not palette:
        raise ValueError(f"{path} has no colours; it should have lines R G B CLASS")
    return palette


def lines_of(path: str | os.PathLike) -> Iterator[tuple[int, str, list[str]]]:
    """The number, the text and the words of each line of a text file, without comments, which begin
    with `#`, and empty lines. Errors: OSError; ValueError if the file is not text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from None
    for number, line in enumerate(lines, start=1):
        if words := line.partition("#")[0].split():
            yield number, line.strip(), words


def _change_of(image, by_colours):
    """Why the labels of an image, not yet decoded, may not be those that were written, or None.

    by_colours: whether colours are read, and numbers do not matter.
    """
    if image.format in LOSSY:
        return f"is a {image.format}, whose compression changes labels"
    if image.format == "TIFF" and image.info["compression"] in LOSSY_TIFFS:
        return "is a TIFF whose compression changes labels"
    if (image.format, image.mode) == ("BMP", "1"):
        return "is a BMP in black and white, which Pillow misreads if it has several bits"
    if by_colours or image.mode not in NUMBERS:
        return None
    if image.format == "GIF":
        return "is a GIF, whose labels some programs renumber"
    # To undo what Pillow does would be to guess: a program that shrinks files writes a label 17 of
    # 8 bits as a 1 of 4 bits, and Pillow itself writes a label 0 as the 1 of a PBM.
    decoder, _, _, stored = image.tile[0]
    stored, *others = [stored] if isinstance(stored, str) else stored
    if decoder in ("ppm", "ppm_plain") and others and others[0] not in LARGEST:
        return f"has numbers up to {others[0]}, which some programs stretch"
    if SAME.fullmatch(stored):
        return None
    if "I" in stored:
        return "has 0 for white, which some programs invert"
    return f"has grey of {stored[2]} bits, which some programs stretch"


def _classes_of(pixels, palette, path):
    """The class of each pixel by its colour; pixels is uint8 [height, width, 3]."""
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
            f" at row {row}, column {column}; it is not in the palette"
            f" ({int(wrong.sum())} pixels have colours that are not)"
        )
    return np.array([palette[colour] for colour in colours], np.int64)[places]


def _read(path, content=None, upright=False):
    """A fully decoded image, upright or as it is in the file."""

    def load(image):
        image.load()
        return ImageOps.exif_transpose(image) if upright else image

    return opened(path, load, content)


def opened(
    path: str | os.PathLike, function: Callable[[Image.Image], Any], content: bytes | None = None
) -> Any:
    """The function's result for the image in a file, or in its content, which need not be decoded.
    Errors: ValueError, which names the file, if it is not an image or the function fails.
    """
    # Errors of the file system are raised here, unchanged.
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        try:
            return function(Image.open(file, formats=FORMATS))
        except MemoryError:
            raise
        except Exception as error:  # the type depends on how the file is damaged
            reason = str(error).partition("\n")[0] or repr(error)
            if isinstance(error, Image.UnidentifiedImageError):
                reason = "its format is not recognised"
            raise ValueError(f"{path} is not an image, or is incomplete: {reason}") from error
