"""The command `spade-fast train`, with an option for every setting."""

import dataclasses
import inspect
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from . import options
from .memory import keep_freed_memory

HELP = """Train a generator on folders of label maps and photographs, or go on with a run. The
run's folder has its settings, checkpoints, pictures, log and the generator's weights.
"""
FOLDERS = ("labels", "images", "instances")
FILES = ("palette", "vgg_weights")
# Where --help begins another group of settings, in their order.
PANELS = {
    "labels": "Data",
    "ngf": "Networks",
    "adversarial": "Losses",
    "steps": "Steps",
    "out": "The run",
}


def command() -> Callable[..., None]:
    """The function that typer makes the command of: its parameters are the settings, each None
    where it is not given.
    """
    from ..training import PRESETS, Config, Stopped

    types_of = get_type_hints(Config)
    panel = "The run"
    parameters = [
        _parameter("resume_folder", Path, "Go on with the run in this folder.", "--resume", panel),
        _parameter(
            "preset_name",
            str,
            " ".join(
                f"{name}: {words} Sets {' '.join(map(_as_option, changed, changed.values()))}."
                for name, (words, changed) in PRESETS.items()
            ),
            "--preset",
            panel,
        ),
    ]
    for each in dataclasses.fields(Config):
        panel = PANELS.get(each.name, panel)
        option = "--" + each.name.lower().replace("_", "-")
        kind = Path if each.name in (*FOLDERS, *FILES) else _plain(types_of[each.name])
        if kind is bool:
            option += f"/--no-{option[2:]}"
        default = "" if each.default is None else f" Default: {_words(each.default)}."
        help = each.metadata["help"] + default
        parameters.append(_parameter(each.name, kind, help, option, panel))

    def run(resume_folder: Path | None, preset_name: str | None, **settings: Any) -> None:
        keep_freed_memory()
        given = {name: value for name, value in settings.items() if value is not None}
        try:
            path = _train(resume_folder, preset_name, given)
        except Stopped as stopped:
            typer.echo(stopped, err=True)
            raise typer.Exit(1) from None
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            typer.echo(f"Error: {_as_options(str(error))}", err=True)
            raise typer.Exit(2) from None
        if os.environ.get("RANK", "0") == "0":  # the first of the processes that trained
            typer.echo(path)

    setattr(run, "__signature__", inspect.Signature(parameters))
    run.__doc__ = HELP
    return run


def _train(resume_folder, preset_name, given):
    from ..training import Config, preset, resume, train

    if resume_folder is None:
        return train(Config(**preset(preset_name, **given)))
    if preset_name is not None:
        raise ValueError(
            f"preset is {preset_name!r} and resume {str(resume_folder)!r}, only one of them should"
            " be given: a run has its settings"
        )
    return resume(resume_folder, **given)


def _parameter(name, kind, help, option, panel):
    kind_of_path = "folder" if name in (*FOLDERS, "resume_folder") else "file"
    option = typer.Option(
        option,
        help=help,
        show_default=False,
        rich_help_panel=panel,
        callback=options.is_there(kind_of_path) if kind is Path else None,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _plain(wanted):
    """A setting's type without None."""
    if isinstance(wanted, types.UnionType):
        return next(kind for kind in get_args(wanted) if kind is not type(None))
    return wanted


def _as_option(name, value):
    return f"--{name.lower().replace('_', '-')} {value}"


def _words(value):
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


def _as_options(words):
    """A message of a setting, as of an option."""
    name, _, rest = words.partition(" ")
    from ..training import Config

    if name in Config.__dataclass_fields__:
        return f"--{name.lower().replace('_', '-')} {rest}"
    return words
