"""The command `spade-fast export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from torch import nn

FORMATS = ("onnx", "pt2", "aoti")


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="WEIGHTS|MODULE:FUNCTION",
            help="File of a generator's weights; folder of a run, whose settings are then the"
            " defaults; or a function without arguments that returns (model, arguments), as for"
            " `spade-fast check`. A SemanticLayout in its arguments stands for label maps.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")],
    to: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(FORMATS)}; by default, the suffix of --out. aoti is a package of"
            " AOTInductor, which ends with .pt2 as well: for label maps with --no-windows."
        ),
    ] = None,
    windows: Annotated[
        bool,
        typer.Option(
            help="For label maps: compute γ and β once for each distinct window, which ONNX's"
            " Unique numbers. TensorRT and Core ML do not have it: --no-windows for them."
        ),
    ] = True,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Fix the number of images, to 1 or the example's.")
    ] = False,
    dynamic_sizes: Annotated[
        bool,
        typer.Option(
            "--dynamic-sizes", help="Let height and width differ, where the network does."
        ),
    ] = False,
    convention: options.RunsConvention = None,
    num_classes: options.NumClasses = None,
    dont_care: options.DontCare = None,
    instances: Annotated[
        bool | None,
        typer.Option(
            help="Take instance maps, too, for the edges of instances. By default, if the generator"
            " has a channel more than the classes need.",
            rich_help_panel=options.READING,
        ),
    ] = None,
    key: options.Key = None,
    crop_size: options.CropSize = None,
    aspect_ratio: options.AspectRatio = None,
) -> None:
    """Write a network for inference elsewhere, as ONNX, a program of torch.export or AOTInductor.

    It takes label maps instead of one-hot conditions, and is compared with the network before the
    file is written. It has standard operators alone, except that AOTInductor's needs spade_fast.
    Exits with 2 if it cannot be written.
    """
    from ..export import export as write
    from ..imported import Failed

    loading = {"key": key, "crop_size": crop_size, "aspect_ratio": aspect_ratio}
    loading = {name: value for name, value in loading.items() if value is not None}
    reading = {
        "convention": convention,
        "num_classes": num_classes,
        "dont_care": dont_care,
        "instances": instances,
    }
    dynamic = [
        name for name, wanted in (("batch", not fixed_batch), ("sizes", dynamic_sizes)) if wanted
    ]
    settings: dict[str, Any] = {"to": to, "windows": windows, "dynamic": dynamic}
    with options.refusals(export, RuntimeError, Failed):
        model, arguments, labels = _found(source, loading, reading)
        typer.echo(write(model, out, arguments, **settings, **labels))


def _found(
    source: str, loading: dict[str, Any], reading: dict[str, Any]
) -> "tuple[nn.Module, Any, dict[str, Any]]":
    """The model, an example of its arguments if it needs one, and how label maps are read."""
    path = Path(source)
    if not path.exists() and ":" in source:
        from .. import check

        given = [name for name, value in (loading | reading).items() if value is not None]
        allowed = {"dont_care", "instances"}
        if wrong := [name for name in given if name not in allowed]:
            raise ValueError(
                f"{', '.join(wrong)} should be given with weights, not with a function"
            )
        model, arguments = check.load(source)
        labels = {name: reading[name] for name in allowed if reading[name] is not None}
        return model, arguments, labels
    if not path.exists():
        raise FileNotFoundError(
            f"weights is {source}, which does not exist; it should be a file, a folder or"
            " MODULE:FUNCTION"
        )
    from .. import checkpoint
    from ..nn import SPADEGenerator
    from ..training.run import GENERATOR, Run

    said = Run(path).settings() if path.is_dir() else None
    network = checkpoint.load(path / GENERATOR if said else path, **loading)
    if not isinstance(network, SPADEGenerator):
        raise ValueError(
            f"weights are those of a {type(network).__name__}; they should be a generator's"
        )
    if said is not None:
        own: dict[str, Any] = {"convention": said.convention}
        if reading["convention"] in (None, said.convention):
            own |= {"num_classes": said.num_classes, "dont_care": said.dont_care}
        reading = own | {name: value for name, value in reading.items() if value is not None}
    return network, None, labels_of(network.label_nc, **reading)


def labels_of(
    label_nc: int,
    convention: str | None = None,
    num_classes: int | None = None,
    dont_care: int | None = None,
    instances: bool | None = None,
) -> dict[str, Any]:
    """The arguments of `export` that say how label maps are read, for a generator with this number
    of channels. Errors: ValueError if it has another number.
    """
    from ..data.pairs import convention_of

    rules = convention_of("folder" if convention is None else convention)
    classes = rules.num_classes if num_classes is None else num_classes
    dont_care = rules.dont_care if dont_care is None else dont_care
    others = int(dont_care is not None)
    if instances is None:
        instances = classes is not None and label_nc == classes + others + 1
    others += instances
    if classes is not None and classes + others != label_nc:
        words = f"{classes} classes" + (", don't care" if dont_care is not None else "")
        words += ", edges of instances" if instances else ""
        raise ValueError(
            f"the generator has {label_nc} channels, and {words} make {classes + others}:"
            " num_classes, dont_care and instances should be as in its training"
        )
    return {"instances": instances, "dont_care": dont_care, "label_shift": rules.label_shift}
