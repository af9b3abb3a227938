"""Loads what a user names as MODULE:FUNCTION, and tells errors in the user's code from ours."""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# A traceback's frames in these files come before the user's own code.
NOT_THEIRS = (
    *(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__, importlib.__file__)),
    contextlib.__file__,
    "<frozen importlib",
)


class Failed(Exception):
    """What the user named cannot be used. The message tells the user why, with their own traceback
    if their code raised.
    """


def returned(name: str, example: str) -> Any:
    """The result of the function "module:function", called without arguments. An object of this
    name that is a torch.nn.Module, or cannot be called, is returned itself.

    Errors: ValueError if the name is malformed (the message shows the example), or nothing has this
    name; Failed if the module or the function raises.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{name!r} should be MODULE:FUNCTION, such as {example}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with theirs(f"{module_name} cannot be imported"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module exists, but something that it imports does not
            module, why = None, str(error)
    if module is None:
        raise ValueError(f"{name!r} cannot be imported: {why}")
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from None
    if callable(found) and not isinstance(found, torch.nn.Module):
        with theirs(f"{name} failed"):
            found = found()
    return found


@contextlib.contextmanager
def theirs(what: str) -> Iterator[None]:
    """For a block that runs the user's code: if it raises, Failed says what failed, and shows the
    user's traceback from the first line of their own code on.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename.startswith(NOT_THEIRS):
            trace = trace.tb_next
        lines = traceback.format_exception(type(error), error, trace)
        raise Failed(f"{what}:\n\n{''.join(lines).rstrip()}") from None
