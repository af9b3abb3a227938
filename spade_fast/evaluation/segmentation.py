"""Scores of a segmentation network's predictions for images against their label maps."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..arguments import whole_number
from ..data.files import lines_of
from ..imported import theirs
from ..optional import needed
from .networks import SAME_TORCH, Network, first_line, given, sha256_of

IGNORED = -1  # "don't care" in the labels that `Overlap` takes
NO_CLASS = "-"  # in a file of classes
DISPLACING = ("do_center_crop", "do_pad")  # image processors' settings that shift predictions
OVERLAP = (
    "Don't care is left out. Mean IoU is over the classes that occur in labels or predictions. A"
    " prediction that is no class of the labels is wrong where it is, and has no IoU of its own."
)


def load_segmentation(network: str | nn.Module) -> Network:
    """The segmentation network, which takes images uint8 [N, 3, H, W], RGB from 0 to 255, and
    returns its classes, whole numbers [N, H, W].

    network: MODULE:FUNCTION, a module, or a folder or hub name that transformers'
        AutoModelForSemanticSegmentation reads. transformers downloads networks from the hub.

    Errors: ModuleNotFoundError without transformers; ValueError, TypeError, Failed.
    """
    if not isinstance(network, str) or (":" in network and not Path(network).is_dir()):
        return given("segmentation", network, "my_project.networks:segmentation")
    return _of_transformers(network)


def read_classes(path: str | os.PathLike) -> dict[int, int | None]:
    """The label of each class of the network, from a text file with a line `NETWORK_ID LABEL` for
    each; a name may follow, and `#` begins a comment. Labels count from 0 as `check-data` prints
    them; `-` means that the class has no label, and is returned as None.

    Errors: ValueError, which names the file and the line.
    """
    classes: dict[int, int | None] = {}
    for number, line, words in lines_of(path):
        if len(words) < 2 or not words[0].isdecimal() or not _is_label(words[1]):
            raise ValueError(
                f"{path}, line {number}, is {line!r}; it should be NETWORK_ID LABEL: two"
                f" numbers of 0 or more, or {NO_CLASS} for no label"
            )
        own, label = int(words[0]), None if words[1] == NO_CLASS else int(words[1])
        if classes.setdefault(own, label) != label:
            raise ValueError(f"{path}, line {number}, has {own} again, with another label")
    if not classes:
        raise ValueError(f"{path} has no classes; it should have lines NETWORK_ID LABEL")
    return classes


class Overlap:
    """Mean IoU and pixel accuracy, computed batch by batch. torchmetrics counts the pixels.

    num_classes: how many classes the labels have.
    classes: the label of each class of the network, None for a class without one. By default the
        network's classes are the labels.

    Errors: ValueError, TypeError if classes has something else, or nothing.
    """

    def __init__(
        self, network: Network, num_classes: int, classes: Mapping[int, int | None] | None = None
    ) -> None:
        self.network, self.num_classes = network, num_classes
        if classes is None:
            classes = {label: label for label in range(num_classes)}
        if not classes:
            raise ValueError(f"classes is {classes}; it should have a label for a class, or None")
        for own, label in classes.items():
            whole_number("a class in classes", own)
            if label is not None:
                whole_number(f"the label of class {own} in classes", label)
        self.known = torch.tensor(sorted(classes))
        labels = [classes[own] for own in sorted(classes)]
        wrong = [label for label in labels if label is not None and not 0 <= label < num_classes]
        if wrong:
            raise ValueError(
                f"classes has the label {wrong[0]}; it should have labels from 0 to"
                f" {num_classes - 1}, or None"
            )
        self.labels = torch.tensor([num_classes if label is None else label for label in labels])
        # one more row and column, for predictions that are not a label
        metrics = needed("torchmetrics.classification", "mean IoU", f"torchmetrics {SAME_TORCH}")
        self.metric = metrics.MulticlassConfusionMatrix(
            num_classes + 1, ignore_index=IGNORED, validate_args=False
        )

    @torch.no_grad()
    def add(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds images, uint8 [N, 3, H, W], and their labels, int64 [N, H, W] from 0 to
        num_classes − 1, or IGNORED. Errors: ValueError, Failed.
        """
        with theirs("the segmentation network failed"):
            found = self.network.module(images)
        self.metric.update(self._as_labels(found, list(labels.shape)), labels.cpu())

    def compute(self) -> tuple[float, float, dict[int, float]]:
        """Mean IoU, pixel accuracy, and the IoU of each class that occurs.

        Errors: ValueError if all pixels are "don't care".
        """
        counts = self.metric.compute().double()
        if not counts.sum():
            raise ValueError("labels has only don't care; it should have pixels with a class")
        right = counts.diagonal()
        either = counts.sum(0) + counts.sum(1) - right
        ious = {
            label: (right[label] / either[label]).item()
            for label in range(self.num_classes)
            if either[label]
        }
        return sum(ious.values()) / len(ious), (right.sum() / counts.sum()).item(), ious

    def _as_labels(self, found, shape):
        """The network's classes converted to labels, on the CPU."""
        if (
            not isinstance(found, torch.Tensor)
            or found.is_floating_point()
            or found.is_complex()
            or found.dtype == torch.bool
        ):
            kind = getattr(found, "dtype", type(found).__name__)
            raise ValueError(f"segmentation returned {kind}; it should be whole numbers {shape}")
        if list(found.shape) != shape:
            raise ValueError(
                f"segmentation returned shape {list(found.shape)}; it should be {shape}"
            )
        found = found.cpu().long()
        places = torch.searchsorted(self.known, found).clamp_(max=len(self.known) - 1)
        unknown = self.known[places] != found
        if unknown.any():
            raise ValueError(
                f"segmentation predicts its class {found[unknown][0].item()}, whose label is not"
                " known: --classes FILE should have a line NETWORK_ID LABEL for it, or NETWORK_ID"
                f" {NO_CLASS} if it has no label"
            )
        return self.labels[places]


class _Segmentation(nn.Module):
    """A network from transformers with its image processor."""

    def __init__(self, network, processor):
        super().__init__()
        self.network, self.processor = network, processor

    def forward(self, images):
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        inputs = self.processor(
            images=pictures, input_data_format="channels_last", return_tensors="pt"
        ).to(images.device)
        logits = self.network(**inputs).logits.float()
        return F.interpolate(logits, images.shape[-2:], mode="bilinear").argmax(1)


def _of_transformers(name):
    transformers = needed("transformers", f"--segmentation {name}", f"transformers {SAME_TORCH}")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        network, loading = transformers.AutoModelForSemanticSegmentation.from_pretrained(
            name, output_loading_info=True
        )
    except Exception as error:  # the type depends on what is missing
        raise ValueError(
            f"segmentation is {name!r}, which transformers cannot load: {first_line(error)}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"segmentation is {name!r}, whose weights lack {missing[0]} and {len(missing) - 1}"
            " others: it should be a network trained for semantic segmentation"
        )
    settings = json.loads(processor.to_json_string())
    if displacing := [key for key in DISPLACING if settings.get(key)]:
        raise ValueError(
            f"segmentation is {name!r}, whose image processor has {displacing[0]}: predictions"
            " would be shifted against the labels; --segmentation MODULE:FUNCTION can undo that"
        )
    return Network(
        _Segmentation(network.eval(), processor),
        {
            "network": f"{type(network).__name__} in transformers",
            "weights_sha256": sha256_of(network),
            "processor": settings | {"class": type(processor).__name__},
            "resizing": "logits to the labels' size: torch, bilinear, no antialias",
        },
        ("transformers",),
    )


def _is_label(word):
    return word == NO_CLASS or word.isdecimal()
