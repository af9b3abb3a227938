"""The command `spade-fast generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import progress_bar
from . import options

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float64", "bfloat16", "float16")


def generate(
    weights: Annotated[
        Path,
        typer.Argument(
            callback=options.is_there("file or folder"),
            help="A generator's file, or the folder of a run, which says the rest.",
        ),
    ],
    labels: Annotated[Path, options.folder("Folder of label maps.")],
    out: Annotated[Path, typer.Option(help="Folder of the images.")],
    instances: Annotated[Path | None, options.folder("Folder of instance maps.")] = None,
    convention: Annotated[str | None, typer.Option(help=options.WORDS)] = None,
    palette: options.Palette = None,
    num_classes: options.NumClasses = None,
    dont_care: options.DontCare = None,
    preprocess: Annotated[
        str, typer.Option(help="As of train; fixed resizes to the generator's size.")
    ] = "fixed",
    load_size: Annotated[
        int | None, typer.Option(min=1, help="Length that maps are resized to before a crop.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images of each label map.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Decides z, with the file's name.")] = 0,
    style: Annotated[Path | None, options.file("A photograph whose style the images get.")] = None,
    encoder: Annotated[
        Path | None, options.file("Its weights, for --style; a run has them.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most images computed together.")] = 1,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES) + ".")] = "float32",
    device: options.Device = "cpu",
    key: Annotated[
        str | None, typer.Option(help="Which of several networks in the file, such as ema.")
    ] = None,
    crop_size: Annotated[
        int | None, typer.Option(min=1, help="Width of the images, where the file does not say it.")
    ] = None,
    aspect_ratio: Annotated[
        float | None, typer.Option(help="Their width over their height, likewise.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what is there.")] = False,
) -> None:
    """Make images of label maps. Exits with 1 where a label map is wrong, which is named; the
    others are made.
    """
    import torch

    from .. import generation
    from ..data import read_palette

    loading = {"key": key, "crop_size": crop_size, "aspect_ratio": aspect_ratio}
    try:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, it should be one of {', '.join(DTYPES)}")
        report = generation.generate(
            weights,
            labels,
            out,
            loading={name: value for name, value in loading.items() if value is not None},
            instances=instances,
            convention=convention,
            palette=None if palette is None else read_palette(palette),
            num_classes=num_classes,
            dont_care=dont_care,
            preprocess=preprocess,
            load_size=load_size,
            samples=samples,
            seed=seed,
            style=style,
            encoder=encoder,
            batch=batch,
            dtype=getattr(torch, dtype),
            device=device_of(device),
            resume=resume,
            progress=lambda found, count: progress_bar(found, count, "Generating"),
        )
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    for fault in report.faults:
        typer.echo(f"WRONG: {fault}", err=True)
    there = f", {report.skipped} were there" if report.skipped else ""
    typer.echo(f"{report.made} images in {out}{there}.")
    if report.faults:
        typer.echo(f"{len(report.faults)} faults.", err=True)
        raise typer.Exit(1)


def device_of(name: str) -> "torch.device":
    """The device with this name. Errors: ValueError where there is none here."""
    import torch

    try:
        torch.empty(0, device=name).cpu()  # the device "meta" has no values
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {name!r}, it should be one that is here: {reason}") from None
