"""Packages whose names are loaded when they are first used, so that importing the package costs nothing."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package (PEP 562).

    Example:
        __getattr__, __dir__ = lazy.attach(__name__, {"shapes": ("Circle", "Square")}, modules=("colours",))

    Args:
      package: its name.
      homes: module of the package -> the public names it defines.
      modules: modules of it that are public themselves.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        vars(sys.modules[package])[name] = value  # the next use does not come here; nor does a module of that name win
        return value

    def names() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return load, names
