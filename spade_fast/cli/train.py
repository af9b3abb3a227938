"""The command `spade-fast train`, with an option for each setting."""

import dataclasses
import inspect
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ..settings import FILES, FOLDERS, PRESETS, Config, preset
from . import options
from .memory import keep_freed_memory
from .options import as_option

HELP = """Train a generator on label maps and photographs, or resume a run.

The run's folder gets its settings, checkpoints, pictures, log and the generator's weights.
"""
# The setting that begins each panel of the help.
PANELS = {
    "labels": "Data",
    "ngf": "Networks",
    "adversarial": "Losses",
    "perceptual": "Perceptual loss",
    "steps": "Steps",
    "out": "The run",
}


def command() -> Callable[..., None]:
    """The command for typer: a function whose parameters are the settings, each None unless it is
    given.
    """
    types_of = get_type_hints(Config)
    panel = "The run"
    parameters = [
        _parameter("resume", Path, "Folder of a run to go on with.", "--resume", panel),
        _parameter(
            "preset",
            str,
            " ".join(
                f"{name}: {words} Sets {_as_options(changed)}."
                for name, (words, changed) in PRESETS.items()
            ),
            "--preset",
            panel,
        ),
    ]
    for each in dataclasses.fields(Config):
        panel = PANELS.get(each.name, panel)
        option = as_option(each.name)
        kind = Path if each.name in (*FOLDERS, *FILES) else _plain(types_of[each.name])
        if kind is bool:
            option += f"/--no-{option[2:]}"
        default = "" if each.default is None else f" Default: {_words(each.default)}."
        help = each.metadata["help"] + default
        parameters.append(_parameter(each.name, kind, help, option, panel))

    def run(resume: Path | None, preset: str | None, **settings: Any) -> None:
        from ..training import Stopped

        keep_freed_memory()
        given = {name: value for name, value in settings.items() if value is not None}
        try:
            with options.refusals(run):
                path = _train(resume, preset, given)
        except Stopped as stopped:
            typer.echo(stopped, err=True)
            raise typer.Exit(1) from None
        if os.environ.get("RANK", "0") == "0":  # the first of the training processes
            typer.echo(path)

    setattr(run, "__signature__", inspect.Signature(parameters))
    run.__doc__ = HELP
    return run


def _train(resume_folder, preset_name, given):
    from ..training import resume, train

    if resume_folder is None:
        config = Config(**preset(preset_name, **given))
        config.check_used(given)
        return train(config)
    if preset_name is not None:
        raise ValueError(
            f"preset is {preset_name!r} and resume {str(resume_folder)!r}, only one of them should"
            " be given: a run has its own settings"
        )
    return resume(resume_folder, **given)


def _parameter(name, kind, help, option, panel):
    kind_of_path = "folder" if name in (*FOLDERS, "resume") else "file"
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


def _as_options(settings):
    return " ".join(f"{as_option(name)} {value}" for name, value in settings.items())


def _words(value):
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
