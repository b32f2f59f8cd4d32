"""Which config a checkpoint belongs to: going on with another one would silently give a mixture of two runs."""

import json
from collections.abc import Mapping
from typing import Any

from jaxlab import core
from jaxlab.rl.config import GRPOConfig

# What decides no number of the steps already made.
_FREE = ("steps", "checkpoint_every", "nonfinite")


def identity(config: GRPOConfig) -> dict[str, Any]:
    """What of a config decides the numbers, as JSON gives it back."""
    plain = core.to_dict(config)
    return json.loads(json.dumps({name: value for name, value in plain.items() if name not in _FREE}))


def check_same(saved: Mapping[str, Any], mine: Mapping[str, Any], where: str, *, within: str = "") -> None:
    """Compares the identity in a checkpoint with a run's.

    Raises:
        ValueError: they differ; the first difference is named.
    """
    for name in (*mine, *(name for name in saved if name not in mine)):
        theirs, ours = saved.get(name), mine.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            check_same(theirs, ours, where, within=f"{within}{name}.")
        elif theirs != ours:
            raise ValueError(
                f"{within}{name}: {where} was trained with {theirs!r}, got {ours!r}; "
                "use another folder, or allow_changes=True"
            )
