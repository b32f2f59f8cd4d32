"""Where models lie on this machine, and what their `config.json` says.

Nothing here reads a weight, imports JAX or reaches a network.
"""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlab.core.untrusted import read_object

MODELS_VARIABLE = "JAXLAB_MODELS"
"""Folder, or several joined by the path separator, under which `org/name` is looked up."""


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder or `.gguf` file that a source names.

    Args:
        source: a path; "package:NAME", the model inside an installed distribution (which is not imported); or
            "org/name" under `$JAXLAB_MODELS`.

    Raises:
        FileNotFoundError: nothing there; lists the places searched. Nothing is ever downloaded.
    """
    name = os.fspath(source)
    if name.startswith("package:"):
        return _in_package(name.removeprefix("package:"))
    searched = [Path(name).expanduser()]
    roots = [Path(root).expanduser() for root in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if root]
    if not searched[0].is_absolute():
        searched += [root / name for root in roots]
    for path in searched:
        if path.exists():
            return path
    hint = "" if roots else f" (${MODELS_VARIABLE} is not set)"
    raise FileNotFoundError(f"model {name!r} is in none of: {', '.join(map(str, searched))}{hint}")


def _in_package(name: str) -> Path:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"model 'package:{name}': no distribution {name!r} is installed") from error
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    found = sorted(path for path in files if path.suffix == ".gguf" and path.is_file())
    found = found or sorted(path.parent for path in files if path.name == "config.json" and path.is_file())
    if len(found) != 1:
        held = [str(path) for path in found] or "none"
        root = distribution.locate_file("")
        raise FileNotFoundError(f"model 'package:{name}': expected one model among its files under {root}, got {held}")
    return found[0]


def find_model(source: str | os.PathLike[str]) -> Path:
    """`locate`, and the one `.gguf` file of a folder that has no `config.json`."""
    path = locate(source)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(f"{path} has no config.json, and {len(files)} .gguf files where one was expected")
        return files[0]
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"source {path}: expected a folder or a .gguf file")
    return path


def read_config(source: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """The content of a `config.json`.

    Args:
        source: the content itself, the file, or its folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a JSON object.
    """
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    return read_object(path / "config.json" if path.is_dir() else path)
