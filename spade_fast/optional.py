"""Packages that only some uses need."""

import importlib
from types import ModuleType


def needed(module: str, purpose: str, install: str) -> ModuleType:
    """A module of an optional package. Errors: ModuleNotFoundError if it cannot be imported; the
    message says what needs it, and what pip should install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ModuleNotFoundError(
            f"{purpose} needs {package}: pip install {install} ({error})"
        ) from error
