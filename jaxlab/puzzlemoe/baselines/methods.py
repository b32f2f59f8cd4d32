"""The table of methods."""

from collections.abc import Callable
from types import MappingProxyType

from jaxlab.puzzlemoe.baselines.clustering import hc_smoe, m_smoe
from jaxlab.puzzlemoe.baselines.expert_dropping import drop, naee
from jaxlab.puzzlemoe.baselines.pair_merging import average, puzzle, puzzle_unpacked
from jaxlab.puzzlemoe.baselines.wanda import wanda, wanda_2_4
from jaxlab.puzzlemoe.layer import MoELayer

METHODS: MappingProxyType[str, Callable[..., MoELayer]] = MappingProxyType(
    {
        "average": average,
        "drop": drop,
        "hc_smoe": hc_smoe,
        "naee": naee,
        "wanda": wanda,
        "wanda_2_4": wanda_2_4,
        "m_smoe": m_smoe,
        "puzzle": puzzle,
        "puzzle_unpacked": puzzle_unpacked,
    }
)
"""Name -> method."""
