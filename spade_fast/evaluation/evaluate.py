"""Scores of generated images, with the protocol by which they were measured."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..arguments import whole_number
from ..data.allowed import Allowed
from ..data.files import Palette
from ..data.pairs import Convention, convention_of, files_in
from . import protocol
from .features import FID, INCEPTION, FrechetDistance, load_features
from .pictures import LabelMaps, Seen, images, origin, partners
from .segmentation import OVERLAP, Overlap, load_segmentation

RESIZED = {"images": "Pillow, bicubic, antialias", "labels": "Pillow, nearest neighbour"}


def evaluate(
    generated: str | os.PathLike,
    photographs: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    *,
    features: str | nn.Module | None = None,
    features_weights: str | os.PathLike | None = None,
    segmentation: str | nn.Module | None = None,
    classes: Mapping[int, int | None] | None = None,
    convention: str = "folder",
    palette: Palette | None = None,
    num_classes: int | None = None,
    dont_care: int | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable, int], Iterable] = lambda found, count: found,
) -> dict[str, Any]:
    """FID between generated images and photographs; mean IoU and pixel accuracy of a segmentation
    network's predictions for the generated images against their label maps. Scores whose inputs are
    not given are None.

    Args:
        generated, photographs, labels: folders. `NAME.png` and each `NAME-K.png` are images that
            were generated from the label map `NAME`; photographs may have other names.
        features, features_weights: as in `load_features`; None is Inception.
        segmentation: a network, as in `load_segmentation`.
        classes: the label of each of the network's classes, as `read_classes` returns; None if they
            are the same.
        convention, palette, num_classes, dont_care: of the label maps, as in `check_data`. The
            convention's endings apply to label maps and photographs, not to generated images.
        size: the width and the height that all images and label maps are first resized to; None
            leaves their sizes unchanged.
        batch: the most images of the same size that a network gets in one call.
        device: of the networks.
        progress: called with an iterable that has an item for each image, and with their number,
            returns an iterable of the same items: a progress bar.

    Returns:
        "scores", each None if it was not measured; "iou" of each class that occurs; "notes" in
        words; "generated" with the folder and a SHA-256 of its images; and the "protocol", which is
        equal for scores that can be compared. All of it can be written as JSON.

    Raises:
        ValueError, TypeError, OSError, ModuleNotFoundError, Failed: the arguments do not fit
            together, a file cannot be read, a package is missing, or a network fails.
    """
    of_labels = {
        "classes": classes,
        "palette": palette,
        "num_classes": num_classes,
        "dont_care": dont_care,
    }
    _check_given(photographs, labels, features, features_weights, segmentation, of_labels)
    batch = whole_number("batch", batch, least=1)
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ValueError(f"size is {size!r}; it should be a width and a height")
        width, height = (whole_number("size", length, least=1) for length in size)
        size = width, height
    rules = convention_of(convention)
    own = _folder("generated", generated)
    real = {} if photographs is None else _folder("photographs", photographs, rules.image)
    maps = None
    if labels is not None:
        allowed = _allowed(rules, num_classes, dont_care)
        maps = LabelMaps(_label_of_each(own, generated, labels, rules), allowed, palette, size)
    made_by = origin(own)

    said: dict[str, Any] = {}
    packages: list[str] = []
    frechet, overlap = None, None
    if photographs is not None:
        network = load_features(INCEPTION if features is None else features, features_weights)
        frechet = FrechetDistance(network.to(device))
        said["features"] = network.protocol | {"rule": FID}
        packages += network.packages
    if labels is not None:
        assert segmentation is not None and allowed.num_classes is not None
        network = load_segmentation(segmentation)
        overlap = Overlap(network.to(device), allowed.num_classes, classes)
        said["segmentation"] = network.protocol | {"rule": OVERLAP}
        packages += network.packages

    seen, seen_real = _measure(own, real, maps, frechet, overlap, size, batch, device, progress)
    scores, ious, notes = dict.fromkeys(protocol.SCORES), None, []
    said["generated"] = seen.protocol | made_by
    if None in made_by.values():
        notes.append(
            "The images do not say their generator's seed, or whether it is a running average."
        )
    if frechet is not None:
        scores["fid"] = frechet.compute()
        said["photographs"] = seen_real.protocol | {"sha256": seen_real.sha256}
        notes += frechet.notes()
        if size is None and seen.sizes.keys() != seen_real.sizes.keys():
            notes.append("Generated images and photographs differ in size: --size resizes both.")
    if overlap is not None and maps is not None:
        scores["mean_iou"], scores["pixel_accuracy"], ious = overlap.compute()
        said["labels"] = maps.seen.protocol | {
            "sha256": maps.seen.sha256,
            "convention": convention,
            "num_classes": allowed.num_classes,
            "dont_care": allowed.dont_care,
        }
        said["classes"] = (
            None if classes is None else [list(pair) for pair in sorted(classes.items())]
        )
    said["resizing"] = None if size is None else {"size": list(size)} | RESIZED
    said["versions"] = protocol.versions(packages)
    return {
        "scores": scores,
        "iou": None if ious is None else {str(label): iou for label, iou in ious.items()},
        "notes": notes,
        "generated": {"folder": str(generated), "sha256": seen.sha256},
        "protocol": said,
    }


def _measure(own, real, maps, frechet, overlap, size, batch, device, progress):
    """Adds all images to the scores, and returns the facts about the generated images and about the
    photographs.
    """
    count = len(own) + len(real)
    steps = iter(progress(range(count), count))
    seen, seen_real = Seen(), Seen()
    for names, pictures in _batches(images(own, size, seen), batch, steps):
        if frechet is not None:
            frechet.add(pictures.to(device), real=False)
        if overlap is not None:
            wanted = [maps(name, own[name], pictures.shape[2:]) for name in names]
            overlap.add(pictures.to(device), torch.stack(wanted))
    for _, pictures in _batches(images(real, size, seen_real), batch, steps):
        frechet.add(pictures.to(device), real=True)
    next(steps, None)  # the end of the progress bar
    return seen, seen_real


def _check_given(photographs, labels, features, features_weights, segmentation, of_labels):
    if photographs is None and labels is None:
        raise ValueError("photographs and labels are not given, at least one of them should be")
    if labels is not None and segmentation is None:
        raise ValueError(
            "segmentation is not given; it should be: its predictions are compared with labels"
        )
    of_photographs = {"features": features, "features_weights": features_weights}
    of_labels = {"segmentation": segmentation} | of_labels
    for needs, folder, others in (
        ("photographs", photographs, of_photographs),
        ("labels", labels, of_labels),
    ):
        unused = [name for name, value in others.items() if value is not None]
        if folder is None and unused:
            raise ValueError(f"{unused[0]} is given; it should only be given with {needs}")


def _folder(kind, folder, ending=""):
    """The images below a folder by name, in order. Errors: ValueError."""
    faults: list[str] = []
    found = files_in(kind, Path(folder), ending, faults)
    if faults:
        raise ValueError(faults[0])
    return dict(sorted(found.items()))


def _label_of_each(
    own: dict[str, Path], generated: str | os.PathLike, labels: str | os.PathLike, rules: Convention
) -> dict[str, Path]:
    """The label map of each generated image. Errors: ValueError if a file has no partner."""
    found = _folder("labels", labels, rules.labels)
    return {
        name: found[label]
        for name, label in partners(own, found, Path(generated), Path(labels)).items()
    }


def _allowed(rules, num_classes, dont_care):
    """The labels that the files may have."""
    num_classes = rules.num_classes if num_classes is None else num_classes
    dont_care = rules.dont_care if dont_care is None else dont_care
    if num_classes is None:
        raise ValueError("num_classes is not given; it should be: the convention does not say it")
    num_classes = whole_number("num_classes", num_classes, least=1)
    if dont_care is not None:
        dont_care = whole_number("dont_care", dont_care)
    return Allowed(num_classes, dont_care, rules.label_shift)


def _batches(
    found: Iterable[tuple[str, torch.Tensor]], most: int, steps: Iterator[int]
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Names, and images as a tensor [N, 3, H, W]: up to `most` consecutive images of the same size.
    Advances `steps` once for each image.
    """
    for _, alike in itertools.groupby(found, lambda one: one[1].shape):
        while waiting := list(itertools.islice(alike, most)):
            names, pictures = zip(*waiting)
            yield list(names), torch.stack(pictures)
            for _ in names:
                next(steps)
