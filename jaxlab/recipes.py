"""Finding and loading what can be run: systems, their recipes and their YAML files. Imports nothing heavy."""

import dataclasses
import importlib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclasses.dataclass(frozen=True)
class System:
    """One entry of the command line.

    Attributes:
      package: the system's package; `<package>.recipe` has `run(config) -> Report` and may have
        `plan(config, target) -> Plan`; `<package>.commands`, where there is one, has further verbs in a Typer `app`.
      summary: one line for `jaxlab --help`.
      config: its recipe at laptop scale, relative to the project.
    """

    package: str
    summary: str
    config: str


SYSTEMS: dict[str, System] = {
    "foundation": System(
        "jaxlab.foundation", "A small language model trained on real text.", "configs/foundation/laptop.yaml"
    ),
    "xmoe": System(
        "jaxlab.xmoe", "Mixtures of experts without padding or redundant network traffic.", "configs/xmoe/laptop.yaml"
    ),
    "puzzlemoe": System(
        "jaxlab.puzzlemoe", "Two experts in the space of one, without training.", "configs/puzzlemoe/laptop.yaml"
    ),
    "superoffload": System(
        "jaxlab.superoffload",
        "Adam on the host while the GPU still works, exact under speculation.",
        "configs/superoffload/laptop.yaml",
    ),
    "megafold": System(
        "jaxlab.megafold",
        "Training of AlphaFold3 with fused kernels and cached features.",
        "configs/megafold/laptop.yaml",
    ),
    "sfpo": System(
        "jaxlab.sfpo",
        "Reinforcement learning of language models by slow-fast policy optimisation.",
        "configs/sfpo/laptop.yaml",
    ),
    "eaglet": System(
        "jaxlab.eaglet",
        "A planner trained by what its plans are worth to executors that stay as they are.",
        "configs/eaglet/laptop.yaml",
    ),
    "vlm-scaling": System(
        "jaxlab.vlm_scaling",
        "Votes against self-verification by vision-language models, with and without the image.",
        "configs/vlm_scaling/laptop.yaml",
    ),
    "voltanallm": System(
        "jaxlab.voltanallm",
        "Serving with less GPU energy within latency objectives.",
        "configs/voltanallm/laptop.yaml",
    ),
    "instantedit": System(
        "jaxlab.instantedit",
        "Pictures edited from two prompts in eight steps of a rectified flow.",
        "configs/instantedit/laptop.yaml",
    ),
    "flexgaussian": System(
        "jaxlab.flexgaussian",
        "3D Gaussian splats in a tenth of their size, within a chosen loss of quality.",
        "configs/flexgaussian/laptop.yaml",
    ),
    "pipeline": System(
        "jaxlab.pipeline",
        "One model through five systems: trained, improved, compressed, served, put to work.",
        "configs/pipeline/laptop.yaml",
    ),
}
"""Command-line name of each system; a later system registers here and gets `jaxlab <system> run` for nothing."""


def system_of(path: Path) -> str:
    """The value of a config's top-level key `system`; a file without it is a plain training config, `foundation`'s.

    Raises:
      ValueError: not a YAML mapping, or the system is unknown (the known ones are listed).
    """
    from jaxlab.core.untrusted import read_yaml

    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    name = content.get("system", "foundation")
    if not isinstance(name, str) or name not in SYSTEMS:
        raise ValueError(f"{path}: unknown system {name!r}; known: {', '.join(sorted(SYSTEMS))}")
    return name


def recipe_of(system: str) -> ModuleType:
    """The recipe module of a system in `SYSTEMS`."""
    return importlib.import_module(f"{SYSTEMS[system].package}.recipe")


def config_class(function: Callable[..., Any]) -> type:
    """The dataclass a recipe's function takes: the annotation of its parameter `config`."""
    return typing.get_type_hints(function)["config"]


def load(function: Callable[..., Any], path: str | Path | None, overrides: Sequence[str] = ()) -> Any:
    """The config of a recipe's function, from its YAML file and dotted overrides."""
    from jaxlab.core import find_config, load_config

    return load_config(config_class(function), None if path is None else find_config(path), tuple(overrides))
