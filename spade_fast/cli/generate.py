"""The command `spade-fast generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..arguments import counted
from ..progress import progress_bar
from . import options

if TYPE_CHECKING:
    import torch

STYLE = "Styles"  # the panel of the help
DTYPES = ("float32", "float64", "bfloat16", "float16")


def generate(
    weights: Annotated[
        Path,
        typer.Argument(
            callback=options.is_there("file or folder"),
            help="File of a generator's weights, or folder of a run, whose settings are then the"
            " defaults.",
        ),
    ],
    labels: Annotated[Path, options.folder("Folder of label maps.")],
    out: Annotated[Path, typer.Option(help="Folder to write the images to.")],
    instances: Annotated[Path | None, options.folder("Folder of instance maps.")] = None,
    convention: options.RunsConvention = None,
    palette: options.Palette = None,
    num_classes: options.NumClasses = None,
    dont_care: options.DontCare = None,
    preprocess: Annotated[
        str,
        typer.Option(
            help="How maps are resized, as for `spade-fast train`; fixed resizes them to the"
            " generator's size.",
            rich_help_panel=options.READING,
        ),
    ] = "fixed",
    load_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pixels that maps are resized to before they are cropped.",
            rich_help_panel=options.READING,
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            help="Images of each label map, for a generator with a style z.",
            rich_help_panel=STYLE,
        ),
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Seed that z is drawn from, with the label map's name.",
            rich_help_panel=STYLE,
        ),
    ] = 0,
    style: Annotated[
        Path | None, options.file("Photograph whose style the images get.", STYLE)
    ] = None,
    encoder: Annotated[
        Path | None,
        options.file("File of an encoder's weights, for --style; by default, the run's.", STYLE),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most images that are computed together.")] = 1,
    dtype: Annotated[
        str, typer.Option(help=f"Floating-point type of the network: {', '.join(DTYPES)}.")
    ] = "float32",
    device: options.Device = "cpu",
    key: options.Key = None,
    crop_size: options.CropSize = None,
    aspect_ratio: options.AspectRatio = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip images that exist already.")
    ] = False,
    all_faults: options.AllFaults = False,
) -> None:
    """Make an image of each label map in a folder.

    Reports label maps that are wrong, makes the images of the others, and then exits with 1.
    """
    import torch

    from .. import generation
    from ..data import read_palette

    loading = {"key": key, "crop_size": crop_size, "aspect_ratio": aspect_ratio}
    with options.refusals(generate, RuntimeError):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it should be one of {', '.join(DTYPES)}")
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
    there = f"; {report.skipped} existed already" if report.skipped else ""
    typer.echo(f"{counted(report.made, 'image')} in {out}{there}.")
    options.report_faults(report.faults, all_faults, err=True)


def device_of(name: str) -> "torch.device":
    """The device with this name. Errors: ValueError if this machine does not have it."""
    import torch

    try:
        torch.empty(0, device=name).cpu()  # the device "meta" has no values
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device is {name!r}; it should be a device of this machine: {reason}"
        ) from None
