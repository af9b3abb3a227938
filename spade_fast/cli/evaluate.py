"""The command `spade-fast evaluate`."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..progress import progress_bar
from . import options
from .generate import device_of
from .tables import table_of

NETWORKS = "Networks"


def evaluate(
    generated: Annotated[Path, options.folder("Folder of generated images.")],
    photographs: Annotated[Path | None, options.folder("Folder of photographs, for FID.")] = None,
    labels: Annotated[
        Path | None, options.folder("Folder of label maps, for mean IoU and pixel accuracy.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Network whose features FID compares: inception (the default), or"
            " MODULE:FUNCTION.",
            rich_help_panel=NETWORKS,
        ),
    ] = None,
    features_weights: Annotated[
        Path | None,
        options.file(
            "File of Inception's weights; by default, that in torch.hub's cache.", NETWORKS
        ),
    ] = None,
    segmentation: Annotated[
        str | None,
        typer.Option(
            help="Segmentation network, for --labels: a folder or hub name for transformers, or"
            " MODULE:FUNCTION.",
            rich_help_panel=NETWORKS,
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        options.file(
            "File with the label of each class of the segmentation network, in lines NETWORK_ID"
            " LABEL; by default, the two are equal.",
            NETWORKS,
        ),
    ] = None,
    convention: options.Convention = "folder",
    palette: options.Palette = None,
    num_classes: options.NumClasses = None,
    dont_care: options.DontCare = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="WIDTHxHEIGHT, in pixels, that all images and label maps are resized to first; by"
            " default, they keep their sizes."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that are computed together.")] = 8,
    device: options.Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="File to write scores and protocol to.")] = None,
) -> None:
    """Score generated images against photographs and label maps.

    FID compares them with photographs. Mean IoU and pixel accuracy compare their label maps with
    what a segmentation network sees in them. Exits with 2 if something is wrong.
    """
    from .. import evaluation
    from ..data import read_palette
    from ..imported import Failed

    with options.refusals(evaluate, RuntimeError, Failed):
        if json is not None:
            evaluation.check_writable(json)
        result = evaluation.evaluate(
            generated,
            photographs,
            labels,
            features=features,
            features_weights=features_weights,
            segmentation=segmentation,
            classes=None if classes is None else evaluation.read_classes(classes),
            convention=convention,
            palette=None if palette is None else read_palette(palette),
            num_classes=num_classes,
            dont_care=dont_care,
            size=None if size is None else _size(size),
            batch=batch,
            device=device_of(device),
            progress=lambda found, count: progress_bar(found, count, "Evaluating"),
        )
        if json is not None:
            evaluation.write(result, json)
    Console().print(table_of_scores([("", result)]))
    for note in result["notes"]:
        typer.echo(f"Note: {note}")


def table_of_scores(results: list[tuple[str, dict]]) -> Table:
    """The scores of each result, in a column with the result's name."""
    from ..evaluation import SCORES

    table = table_of("score", *(name for name, _ in results), title="Scores")
    for score, words in SCORES.items():
        found = [result["scores"][score] for _, result in results]
        if any(value is not None for value in found):
            table.add_row(
                words, *("" if value is None else f"{round(value, 4) + 0.0:.4f}" for value in found)
            )
    return table


def _size(words):
    """A width and a height. Errors: ValueError."""
    found = re.fullmatch(r"(\d+)[x×](\d+)", words)
    if found is None:
        raise ValueError(f"size is {words!r}; it should be WIDTHxHEIGHT, such as 256x256")
    return int(found[1]), int(found[2])
