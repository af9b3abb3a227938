"""The settings of a training run: one dataclass, which is saved as YAML beside the weights. Every
field is also an option of `spade-fast train`, whose help reads them without importing PyTorch.
"""

import contextlib
import dataclasses
import math
import types
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .optional import needed

ORDERS = ("published", "shared")
PRECISIONS = ("no", "bf16", "fp16")
INITIALISATIONS = ("xavier", "xavier_uniform", "normal", "kaiming", "orthogonal", "default")
# Settings that are paths, besides out.
FOLDERS, FILES = ("labels", "images", "instances"), ("palette", "vgg_weights")
OFF = {False: "off", "default": "'default'"}  # values of settings that others need


def setting(
    default: Any,
    help: str,
    least: float | None = None,
    may_change: bool = False,
    needs: str | None = None,
) -> Any:
    """A field of Config.

    Args:
        default: its value if none is given.
        help: its meaning, for the command's help.
        least: its smallest allowed value.
        may_change: whether a run may be resumed with another value, because the value does not
            affect what the next steps compute.
        needs: the setting without which it has no effect.
    """
    metadata = dict(help=help, least=least, may_change=may_change, needs=needs)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Config:
    """All settings of a training run. The defaults are those of the published code (Park et al.
    2019, section 4 and appendix A); `PRESETS` has others.
    """

    # Data
    labels: str | None = setting(None, "Folder of label maps.", may_change=True)
    images: str | None = setting(None, "Folder of photographs.", may_change=True)
    instances: str | None = setting(
        None, "Folder of instance maps; instances' edges become a channel.", may_change=True
    )
    convention: str = setting(
        "folder", "Names and labels of the files: folder, coco_stuff, ade20k or cityscapes."
    )
    palette: str | None = setting(
        None,
        "For colour-coded label maps: a file with a line R G B CLASS per colour.",
        may_change=True,
    )
    num_classes: int | None = setting(None, "Number of classes, without don't care.", 1)
    dont_care: int | None = setting(None, "The label that marks pixels without a class.")
    preprocess: str = setting(
        "resize_and_crop",
        "How images are resized and cropped: resize_and_crop, crop, scale_width,"
        " scale_width_and_crop, scale_shortside, scale_shortside_and_crop, fixed or none.",
    )
    load_size: int | None = setting(
        None,
        "Length that images are resized to before the crop; by default 286/256 of the crop size,"
        " or without a crop the crop size.",
        1,
    )
    crop_size: int = setting(256, "Width of the images that the networks are trained on.", 1)
    aspect_ratio: float = setting(1.0, "Width of these images over their height.")
    flip: bool = setting(True, "Mirror half of the examples, chosen at random.")
    workers: int = setting(1, "Processes that read examples ahead.", 0, may_change=True)
    check: bool = setting(True, "Check all files before the first step.", may_change=True)
    # Networks
    ngf: int = setting(
        64, "The generator's base width: its layers have multiples of it as channels.", 1
    )
    ndf: int = setting(64, "Channels of the discriminator's and encoder's first layer.", 1)
    nhidden: int = setting(128, "Channels between the condition and γ and β.", 1)
    norm_G: str = setting(
        "spectralspadesyncbatch3x3", "The generator's norms, as in the published code."
    )
    upsampling: str = setting(
        "normal",
        "How often the generator doubles the size: normal (5 times), more (6) or most (7).",
    )
    scales: int = setting(2, "Scales of the discriminator.", 1)
    layers: int = setting(4, "Layers before the last in the discriminator of each scale.", 1)
    use_vae: bool = setting(False, "Train an encoder that computes the style z from photographs.")
    z_dim: int = setting(256, "Length of z.", 1, needs="use_vae")
    init: str = setting("xavier", "Initialisation: " + ", ".join(INITIALISATIONS) + ".")
    init_gain: float = setting(0.02, "Gain of the initialisation.", 0, needs="init")
    # Losses
    adversarial: str = setting(
        "hinge", "Adversarial loss: hinge, least_squares, non_saturating or wasserstein."
    )
    weight_adversarial: float = setting(1.0, "Weight of the generator's adversarial loss.", 0)
    weight_feature_matching: float = setting(10.0, "Weight of feature matching.", 0)
    weight_kl: float = setting(0.05, "Weight of the encoder's KL divergence.", 0, needs="use_vae")
    perceptual: bool = setting(True, "Use the perceptual loss, on VGG19's features.")
    vgg_weights: str | None = setting(
        None,
        "torchvision's file of VGG19's weights; by default the one in torch.hub's cache.",
        may_change=True,
        needs="perceptual",
    )
    weight_perceptual: float = setting(
        10.0, "Weight of the perceptual loss.", 0, needs="perceptual"
    )
    # Steps
    steps: int | None = setting(
        None, "Steps of the run; give these or --epochs.", 1, may_change=True
    )
    epochs: int | None = setting(None, "Epochs of the run.", 1, may_change=True)
    batch: int = setting(1, "Images in a step, over all processes.", 1)
    accumulate: int = setting(1, "Parts that a step's batch is split into, to save memory.", 1)
    order: str = setting(
        "published",
        "published: the generator's step, then the discriminator's on newly generated images;"
        " shared: the same images for both, the discriminator first.",
    )
    discriminator_steps: int = setting(
        1, "Steps of the discriminator for each of the generator; --steps counts the former.", 1
    )
    lr_generator: float = setting(1e-4, "Learning rate of the generator and the encoder.", 0)
    lr_discriminator: float = setting(4e-4, "Learning rate of the discriminator.", 0)
    beta1: float = setting(0.0, "Adam's first beta.", 0)
    beta2: float = setting(0.9, "Adam's second beta.", 0)
    decay: float = setting(
        0.0,
        "The last share of the run, in which learning rates fall to 0: 0.5 is its second half.",
        0,
    )
    ema: float = setting(
        0.999,
        "Decay per step of the running average of the generator's weights, which is what is saved;"
        " 0.9 suits a run of some hundred steps.",
        0,
    )
    precision: str = setting("no", "Mixed precision: no, bf16 or fp16.")
    recompute: bool = setting(
        False, "Recompute the generator's blocks in backward: slower, with less memory."
    )
    # The run
    out: str | None = setting(None, "The run's folder.", may_change=True)
    seed: int = setting(
        0, "Seed of initialisation, order of examples, crops, mirroring and noise.", 0
    )
    save_every: int = setting(1000, "Steps between checkpoints.", 1, may_change=True)
    keep: int = setting(
        2, "How many of the newest checkpoints are kept, beside the best.", 1, may_change=True
    )
    log_every: int = setting(50, "Steps between lines of the log.", 1, may_change=True)
    pictures: int = setting(8, "Scenes in each picture of the run.", 0, may_change=True)
    tensorboard: bool = setting(True, "Write TensorBoard's events.", may_change=True)

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError if a setting is wrong or contradicts another; the message
        names it.
        """
        types_of = get_type_hints(type(self))
        for each in dataclasses.fields(self):
            value = _as_type(each.name, getattr(self, each.name), types_of[each.name])
            least = each.metadata["least"]
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{each.name} is {value}; it should be a finite number")
            if value is not None and least is not None and not value >= least:
                raise ValueError(f"{each.name} is {value}; it should be {least} or more")
            setattr(self, each.name, value)
        self._check_choices()
        self._check_contradictions()
        self.generator_arguments(1)

    def _check_choices(self):
        from .data import CONVENTIONS, MODES
        from .losses import check_kind
        from .nn.config import parse_config

        check_kind(self.adversarial)
        parse_config(self.norm_G, "norm_G")
        for name, choices in {
            "convention": CONVENTIONS,
            "preprocess": MODES,
            "order": ORDERS,
            "precision": PRECISIONS,
            "init": INITIALISATIONS,
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it should be one of {', '.join(choices)}"
                )
        for name in ("beta1", "beta2", "ema"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be less than 1")
        if self.decay > 1:
            raise ValueError(f"decay is {self.decay}; it should be 1 or less: a share of the run")

    def _check_contradictions(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}, only one of them should be"
                " given"
            )
        if self.order == "shared" and self.accumulate > 1:
            raise ValueError(
                f"order is 'shared' and accumulate is {self.accumulate}; it should be 1: the"
                " discriminator takes its step before the generator's losses are computed"
            )
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch is {self.batch}; it should be a multiple of accumulate, {self.accumulate}"
            )
        if self.load_size is not None and self.preprocess in ("crop", "fixed", "none"):
            raise ValueError(
                f"load_size is {self.load_size}; it should not be given: preprocess"
                f" {self.preprocess!r} does not use it"
            )

    def check_used(self, given: Container[str] | None = None) -> None:
        """Raises ValueError if a setting has no effect, because the one that it needs is off.

        given: names of the settings that were given; by default all that differ from their default.
        """
        for each in dataclasses.fields(self):
            value, needed = getattr(self, each.name), each.metadata["needs"]
            is_given = value != each.default if given is None else each.name in given
            if is_given and needed is not None and getattr(self, needed) in OFF:
                raise ValueError(
                    f"{each.name} is {value!r}; it should not be given: {needed} is"
                    f" {OFF[getattr(self, needed)]}"
                )

    def generator_arguments(self, label_nc: int) -> dict:
        """The arguments of SPADEGenerator for a condition of label_nc channels. Errors: ValueError
        if the generator cannot make images of this size.
        """
        from .nn.generator import official_arguments

        return official_arguments(
            label_nc,
            crop_size=self.crop_size,
            aspect_ratio=self.aspect_ratio,
            num_upsampling_layers=self.upsampling,
            takes=self._takes,
        ) | dict(
            z_dim=self.z_dim if self.use_vae else None,
            ngf=self.ngf,
            nhidden=self.nhidden,
            norm_G=self.norm_G,
        )

    def has_deviation(self, start: Sequence[int], images: int, processes: int = 1) -> bool:
        """Whether the generator's norm computes a mean and a deviation from more than one number in
        a first map of this height and width.

        images: of a batch, in each of the processes.
        """
        from .nn.config import parse_config

        norm = parse_config(self.norm_G, "norm_G").norm
        maps = {"instance": 1, "batch": images, "syncbatch": images * processes}.get(norm, 2)
        return maps * math.prod(start) > 1

    def _takes(self, crop_size, start):
        """Whether a crop size that suits the generator also passes the checks of load_size and of
        the norm, for a run in one process.
        """
        from .data import Preparation

        try:
            Preparation(
                1,
                mode=self.preprocess,
                load_size=self.load_size,
                crop_size=crop_size,
                aspect_ratio=self.aspect_ratio,
            )
        except ValueError:
            return False
        return self.has_deviation(start, self.batch // self.accumulate)

    def save(self, path: Path) -> None:
        """Writes the settings as YAML. Paths become absolute: the run may be resumed or used from
        another folder. Errors: OSError; ModuleNotFoundError without PyYAML.
        """
        yaml = needed("yaml", "writing a run's settings", "pyyaml")
        found = dataclasses.asdict(self)
        for name in (*FOLDERS, *FILES, "out"):
            if found[name] is not None:
                found[name] = str(Path(found[name]).absolute())
        path.write_text(
            "# Settings of a training run: `spade-fast train --help` explains them.\n"
            + yaml.safe_dump(found, sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )

    @classmethod
    def load(cls, path: Path) -> "Config":
        """The settings in a YAML file. Errors: OSError; ModuleNotFoundError without PyYAML;
        ValueError or TypeError if the file has anything else in it.
        """
        yaml = needed("yaml", "reading a run's settings", "pyyaml")
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path} should have settings, a line `name: value` for each")
        names = [each.name for each in dataclasses.fields(cls)]
        unknown = [str(name) for name in found if name not in names]
        if unknown:
            raise ValueError(f"{path} has unknown settings: {', '.join(unknown)}")
        for name, kind in get_type_hints(cls).items():  # YAML reads 1e-4 as text
            if kind is float and isinstance(found.get(name), str):
                with contextlib.suppress(ValueError):
                    found[name] = float(found[name])
        try:
            return cls(**found)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    def changed(self, **others: Any) -> "Config":
        """A copy of these settings with some of them replaced."""
        return dataclasses.replace(self, **others)

    def deciding(self) -> dict:
        """The settings that affect what steps compute, by name: a resumed run has to keep them."""
        fields = dataclasses.fields(self)
        return {
            each.name: getattr(self, each.name)
            for each in fields
            if not each.metadata["may_change"]
        }


# By name: a description, and the settings that the preset changes.
PRESETS: dict[str, tuple[str, dict]] = {
    "published": (
        "The paper's recipe.",
        dict(batch=32, epochs=200, decay=0.5),
    ),
    "small": (
        "Half of the channels, and instance norm, which allows a batch of one image. For a small"
        " GPU or a CPU: a step of 4 images at 256² takes 1.3 GiB in float32, 0.9 with --recompute.",
        dict(
            ngf=32,
            ndf=32,
            nhidden=64,
            norm_G="spectralspadeinstance3x3",
            lr_generator=2e-4,
        ),
    ),
}


def preset(name: str | None, **others: Any) -> dict:
    """The settings of a preset (none if the name is None), replaced and completed by `others`. If
    steps are given, the preset's epochs are left out. Errors: ValueError if there is no such
    preset.
    """
    if name is not None and name not in PRESETS:
        raise ValueError(f"preset is {name!r}; it should be one of {', '.join(PRESETS)}")
    found = dict(PRESETS[name][1]) if name is not None else {}
    if "steps" in others:
        found.pop("epochs", None)
    return found | others


def _as_type(name, value, wanted):
    """value as an instance of a field's type. Errors: TypeError."""
    kinds = get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in kinds:
        return None
    (kind,) = (one for one in kinds if one is not type(None))
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and isinstance(value, Path):
        return str(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise TypeError(f"{name} is {value!r}; it should be {words[kind]}")
    return value
