"""Matches label maps with their photographs and instance maps."""

import os
from pathlib import Path
from typing import Literal, NamedTuple

from ..arguments import counted

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MOST_LISTED = 3


class Pair(NamedTuple):
    """The files of one example; image and instances are None if the example has none."""

    name: str
    labels: Path
    image: Path | None = None
    instances: Path | None = None


class Convention(NamedTuple):
    """How a published data set names its files and numbers its classes.

    num_classes: the number of classes, without "don't care"; None if it differs between folders.
    dont_care: the label in the files that marks pixels without a class, or None.
    label_shift: added to a label in the files to get its class.
    labels, image, instances: endings of the files' stems. The part before the ending is the pair's
        name; files with other endings are ignored.
    beside_labels: whether the instance maps are in the folder of the label maps.
    """

    num_classes: int | None = None
    dont_care: int | None = None
    label_shift: int = 0
    labels: str = ""
    image: str = ""
    instances: str = ""
    beside_labels: bool = False


CONVENTIONS = {
    "folder": Convention(),
    "coco_stuff": Convention(182, 255),
    "ade20k": Convention(150, 0, -1),  # 0 is unlabelled, 1 to 150 are classes
    "cityscapes": Convention(
        35,
        labels="_gtFine_labelIds",
        image="_leftImg8bit",
        instances="_gtFine_instanceIds",
        beside_labels=True,
    ),
}


def convention_of(name: str) -> Convention:
    """The convention with this name. Errors: ValueError if there is none."""
    if name not in CONVENTIONS:
        raise ValueError(f"convention is {name!r}; it should be one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def find_pairs(
    labels: str | os.PathLike,
    images: str | os.PathLike,
    instances: str | os.PathLike | Literal[False] | None = None,
    convention: str = "folder",
) -> list[Pair]:
    """The pairs of label map, photograph and instance map in folders, sorted by name.

    Files match if their paths below the folders are equal without the suffix and the convention's
    endings. Hidden files and those without an image's suffix are ignored.

    Args:
        labels, images, instances: folders, which may have subfolders. With `instances` None, the
            convention's instance maps beside the label maps are used, if it has any; False uses
            none.
        convention: one of CONVENTIONS.

    Errors: ValueError if a folder does not exist or has no files, or files have no partner or more
        than one; the message says how many, and names the first. TypeError if a folder is not a
        path.
    """
    for name, folder in {"labels": labels, "images": images}.items():
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"{name} is {folder!r}; it should be the path of a folder")
    pairs, faults = match(labels, images, instances, convention)
    if faults:
        more, first = len(faults) - MOST_LISTED, "; ".join(faults[:MOST_LISTED])
        raise ValueError(
            f"{counted(len(faults), 'name')} without a partner, or with two files: {first}"
            + (f"; and {more} more" if more > 0 else "")
            + ". `spade-fast check-data --all-faults` lists them all"
        )
    return pairs


def match(
    labels: str | os.PathLike,
    images: str | os.PathLike | None,
    instances: str | os.PathLike | Literal[False] | None = None,
    convention: str = "folder",
) -> tuple[list[Pair], list[str]]:
    """The pairs that `find_pairs` returns, and a description of each file that is in none. If
    images is None, the pairs have no photographs.
    """
    rules = convention_of(convention)
    if instances is None and rules.beside_labels:
        instances = labels
    asked = {
        "labels": (labels, rules.labels),
        "images": (images, rules.image),
        "instances": (instances, rules.instances),
    }
    folders = {
        kind: (folder, ending)
        for kind, (folder, ending) in asked.items()
        if folder is not None and folder is not False
    }
    faults: list[str] = []
    found: dict[str, dict[str, Path]] = {}
    for kind, (folder, ending) in folders.items():
        found[kind] = files_in(kind, Path(folder), ending, faults)
    names = sorted(set().union(*found.values()))
    for name in names:
        missing = [kind for kind, files in found.items() if name not in files]
        if missing:
            has = next(files[name] for files in found.values() if name in files)
            places = " or ".join(f"{kind} ({folders[kind][0]})" for kind in missing)
            faults.append(f"{has} has no partner in {places}")
    paired = [name for name in names if all(name in files for files in found.values())]
    maps, photographs, others = (found.get(kind, {}) for kind in ("labels", "images", "instances"))
    return [
        Pair(name, maps[name], photographs.get(name), others.get(name)) for name in paired
    ], faults


def files_in(kind: str, folder: Path, ending: str, faults: list[str]) -> dict[str, Path]:
    """The image files below a folder, by name. Links to folders are followed, except those that
    lead back. Appends a line to `faults` for each name that two files have. Errors: ValueError if
    the folder does not exist or has no such files.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{kind} is {folder}, which {what}; it should be a folder")
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _leads_back(Path(place, name), folder)
        ]
        for file in sorted(Path(place, name) for name in names if not name.startswith(".")):
            if file.suffix.lower() not in SUFFIXES or not file.stem.endswith(ending):
                continue
            stem = file.stem.removesuffix(ending)
            name = file.relative_to(folder).with_name(stem).as_posix()
            if found.setdefault(name, file) != file:
                faults.append(f"{found[name]} and {file} have the same name in {kind}")
    if not found:
        files = f"files that end with {ending}" if ending else "images"
        raise ValueError(f"{kind} is {folder}, which has no {files}")
    return found


def encoded(name: str) -> bytes:
    """A text with a file's name as bytes, to hash them. On Linux a name may be any bytes: those
    that are not UTF-8 are in the text as surrogates.
    """
    return name.encode("utf-8", "surrogatepass")


def _leads_back(link, folder):
    """Whether a path below `folder` is a link to one of the folders on the way to it, or to one
    that these are in: the same files would be found in it again and again.
    """
    if not link.is_symlink():
        return False
    target = link.resolve()
    way = (folder / part for part in link.relative_to(folder).parents)
    return any(place.resolve().is_relative_to(target) for place in way)
