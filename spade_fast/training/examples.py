"""The data set that a run's settings describe."""

from ..arguments import counted
from ..data import CONVENTIONS, Folder, Preparation, check_data, find_pairs, read_palette
from ..progress import progress_bar
from ..settings import Config
from .networks import label_channels


def with_convention(config: Config) -> Config:
    """The settings, completed by the convention's num_classes, dont_care and instances."""
    convention = CONVENTIONS[config.convention]
    found = {}
    for name in ("num_classes", "dont_care"):
        if getattr(config, name) is None:
            found[name] = getattr(convention, name)
    if convention.beside_labels and config.instances is None:
        found["instances"] = config.labels
    return config.changed(**found)


def with_steps(config: Config, examples: int) -> Config:
    """The settings with epochs converted to steps."""
    if config.epochs is None:
        return config
    return config.changed(steps=config.epochs * max(1, examples // config.batch), epochs=None)


def _given(name: str, folder: str | None) -> str:
    if folder is None:
        raise ValueError(f"{name} is not given; it should be a folder")
    return folder


def folder_of(config: Config) -> Folder:
    """The data set that the settings describe. Errors: ValueError, OSError."""
    labels, images = _given("labels", config.labels), _given("images", config.images)
    label_channels(config)
    assert config.num_classes is not None  # label_channels has checked it
    preparation = Preparation(
        config.num_classes,
        config.dont_care,
        mode=config.preprocess,
        load_size=config.load_size,
        crop_size=config.crop_size,
        aspect_ratio=config.aspect_ratio,
        flip=config.flip,
        label_shift=CONVENTIONS[config.convention].label_shift,
    )
    pairs = find_pairs(labels, images, config.instances, config.convention)
    palette = None if config.palette is None else read_palette(config.palette)
    return Folder(pairs, preparation, palette=palette, seed=config.seed)


def check_examples(config: Config, examples: Folder) -> None:
    """Raises ValueError if a file cannot be used for training; the message says which, and why."""
    report = check_data(
        _given("labels", config.labels),
        _given("images", config.images),
        config.instances,
        convention=config.convention,
        palette=examples.palette,
        num_classes=config.num_classes,
        dont_care=config.dont_care,
        progress=progress_bar,
    )
    if report.faults:
        raise ValueError(
            f"the data have {counted(len(report.faults), 'fault')}, the first:"
            f" {report.faults[0]}; `spade-fast"
            " check-data --all-faults` lists them all, and --no-check trains in spite of them"
        )
    wanted = round(config.crop_size / config.aspect_ratio), config.crop_size
    for size, path in report.sizes.items():
        try:
            found = examples.preparation.size_of(*size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if found != wanted:
            heights = [f"{width} × {height}" for height, width in (found, wanted)]
            raise ValueError(
                f"preprocess is {config.preprocess!r}, which makes {path} {heights[0]}; it should"
                f" be {heights[1]} as the generator's images, by crop_size and aspect_ratio"
            )
