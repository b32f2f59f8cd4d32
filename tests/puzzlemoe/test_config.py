import math

import pytest

from jaxlab.core import load_config
from jaxlab.puzzlemoe import PuzzleConfig


def test_defaults():
    cfg = PuzzleConfig()
    assert (cfg.ratio, cfg.tau, cfg.norm, cfg.pairing, cfg.seed) == (0.5, 0.4, "sum", "random", 0)
    assert (cfg.underflow, cfg.unmerged, cfg.min_tokens) == ("clamp", "bf16", 1)
    assert load_config(PuzzleConfig, None, ["ratio=0.25", "norm=calls"]) == PuzzleConfig(ratio=0.25, norm="calls")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": -0.1},
        {"tau": 1.1},
        {"tau": math.nan},
        {"ratio": 0.0},
        {"ratio": 0.51},
        {"ratio": math.nan},
        {"norm": "l1"},
        {"pairing": "best"},
        {"underflow": "flush"},
        {"unmerged": "f32"},
        {"min_tokens": -1},
    ],
    ids=str,
)
def test_wrong_values_are_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        PuzzleConfig(**wrong)
