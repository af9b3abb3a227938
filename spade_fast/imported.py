"""What a user's MODULE:FUNCTION returns, and whose error it is where it raises."""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Files where a traceback is not the user's yet.
NOT_THEIRS = (
    *(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__, importlib.__file__)),
    contextlib.__file__,
    "<frozen importlib",
)


class Failed(Exception):
    """Why nothing was found, in words for the user: with their own traceback where their code
    raised.
    """


def returned(name: str, example: str) -> Any:
    """What the function "module:function" returns without arguments; or the object that is named
    so, where it is a torch.nn.Module or cannot be called.

    Errors: ValueError where there is none, which shows the example; Failed where the module or the
    function raises.
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
                raise  # the module is there, and what it imports is not
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
    """Inside, the user's code runs: where it raises, Failed says what failed, and shows their
    traceback from their own first line on.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename.startswith(NOT_THEIRS):
            trace = trace.tb_next
        lines = traceback.format_exception(type(error), error, trace)
        raise Failed(f"{what}:\n\n{''.join(lines).rstrip()}") from None
