"""The exceptions a caller may want to catch; everything else is a ValueError, TypeError or KeyError."""

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """An optional package is absent; the message names the extra that brings it."""


class CheckpointError(ValueError):
    """A checkpoint is truncated, foreign, or does not fit; the message names folder, step and leaf."""


class DataUnavailable(FileNotFoundError):
    """A registered data file is neither on this machine nor downloadable; the message lists the places searched."""


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional module, or raises `MissingExtra` naming the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module} is not installed; it comes with the extra {extra!r}: pip install 'jaxlab[{extra}]'"
        ) from error
