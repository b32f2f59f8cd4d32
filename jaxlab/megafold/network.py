"""A network by the name of a preset and what differs from it, as configuration files have it."""

import dataclasses
import functools
import json
from typing import Any, Literal

from jaxlab import core
from jaxlab.megafold.config import AF3Config


@dataclasses.dataclass(frozen=True)
class Network:
    """A preset of `AF3Config`, changed.

    Attributes:
      preset: "tiny", "small" or "af3".
      changes: values of `AF3Config`'s fields; names and types are checked.
    """

    preset: Literal["tiny", "small", "af3"] = "tiny"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _changed(self.preset, self.changes)

    @functools.cached_property
    def config(self) -> AF3Config:
        """The sizes.

        Raises:
          ValueError: an unknown name (the nearest known one is told), or a value out of range.
          TypeError: a value of another type.
        """
        return _changed(self.preset, self.changes)


def _changed(preset: str, changes: dict[str, Any]) -> AF3Config:
    values = core.to_dict(getattr(AF3Config, preset)()) | changes
    return core.load_config(AF3Config, None, [f"{name}={json.dumps(value)}" for name, value in values.items()])
