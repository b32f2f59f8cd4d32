"""What PuzzleMoE is compared with, each over one layer of plain arrays.

`METHODS[name](layer, x, layer_stats, target_experts, *, pairs=None, seed=0)` gives a smaller `MoELayer`; x `[B,T,d]`
are calibration batches. Merged experts are tied as copies; "naee" and "drop" delete router columns.

Example:
    import jax
    from jaxlab.puzzlemoe import MoELayer, apply_moe_layer
    from jaxlab.puzzlemoe.baselines import METHODS

    keys = jax.random.split(jax.random.key(0), 5)
    router, gate, up = (jax.random.normal(k, s) for k, s in zip(keys, [(16, 4), (4, 16, 32), (4, 16, 32)]))
    down, x = jax.random.normal(keys[3], (4, 32, 16)), jax.random.normal(keys[4], (2, 64, 16))
    layer = MoELayer(router, gate, up, down, top_k=2, norm_topk_prob=True, act="silu")
    half = {name: method(layer, x, None, 2) for name, method in METHODS.items()}
"""

from collections.abc import Callable
from types import MappingProxyType

from jaxlab.puzzlemoe.baselines.clustering import hc_labels, hc_smoe, m_smoe
from jaxlab.puzzlemoe.baselines.expert_dropping import drop, naee, naee_search
from jaxlab.puzzlemoe.baselines.pair_merging import average, puzzle
from jaxlab.puzzlemoe.baselines.wanda import wanda, wanda_2_4, wanda_mask
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
    }
)
"""Name -> method."""

__all__ = ["METHODS", "hc_labels", "naee_search", "wanda_mask"]
