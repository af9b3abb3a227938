"""Which label map belongs to which photograph and instance map."""

import os
from pathlib import Path
from typing import Literal, NamedTuple

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MOST_LISTED = 3


class Pair(NamedTuple):
    """The files of one example; image and instances are None where there are none."""

    name: str
    labels: Path
    image: Path | None = None
    instances: Path | None = None


class Convention(NamedTuple):
    """What a published data set has in its files.

    num_classes: None where every folder has its own; without "don't care".
    dont_care: the number in the files that is no class, or None.
    label_shift: what is added to a number in the files to get a class.
    labels, image, instances: how the stems of the files end; the pair's name is what comes before,
        and files that end otherwise are not looked at.
    beside_labels: the instance maps lie in the folder of the label maps.
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
    """The convention with this name. Errors: ValueError where there is none."""
    if name not in CONVENTIONS:
        raise ValueError(f"convention is {name!r}, it should be one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def find_pairs(
    labels: str | os.PathLike,
    images: str | os.PathLike,
    instances: str | os.PathLike | Literal[False] | None = None,
    convention: str = "folder",
) -> list[Pair]:
    """The pairs of label map, photograph and instance map in folders, sorted by name.

    Files belong together where their paths below the folders are equal, without the suffix and the
    convention's endings. Files that are no images by their suffix, and hidden ones, are left out.

    Args:
        labels, images, instances: folders, with folders in them or without. Without `instances`
            those are taken that the convention has beside the label maps; False takes none.
        convention: one of CONVENTIONS.

    Errors: ValueError where a folder is not there or has no files, or where files lack a partner or
        have two: how many, and the first ones.
    """
    pairs, faults = match(labels, images, instances, convention)
    if faults:
        more = len(faults) - MOST_LISTED
        raise ValueError(
            f"{len(faults)} files have no partner, or two: {'; '.join(faults[:MOST_LISTED])}"
            + (f"; and {more} more" if more > 0 else "")
            + ". `spade-fast check-data` lists them all"
        )
    return pairs


def match(
    labels: str | os.PathLike,
    images: str | os.PathLike | None,
    instances: str | os.PathLike | Literal[False] | None = None,
    convention: str = "folder",
) -> tuple[list[Pair], list[str]]:
    """The pairs that `find_pairs` returns, and in words the faults of other files; without
    photographs where images is None.
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
    """The image of each name below a folder."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise ValueError(f"{kind} is {folder}, which is {what}; it should be a folder")
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
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
