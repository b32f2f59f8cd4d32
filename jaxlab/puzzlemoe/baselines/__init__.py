"""What PuzzleMoE is compared with, each over one layer of plain arrays.

`METHODS[name](layer, x, layer_stats, target_experts, *, pairs=None, seed=0)` gives a smaller `MoELayer`; x `[B,T,d]`
are calibration batches. Merged experts are tied as copies; "naee" and "drop" delete router columns. `apply_method`
does it to every layer of a decoder.

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

from jaxlab.puzzlemoe.baselines.clustering import hc_labels
from jaxlab.puzzlemoe.baselines.expert_dropping import naee_search
from jaxlab.puzzlemoe.baselines.methods import METHODS
from jaxlab.puzzlemoe.baselines.wanda import wanda_mask
from jaxlab.puzzlemoe.baselines.whole_model import apply_method

__all__ = ["METHODS", "apply_method", "hc_labels", "naee_search", "wanda_mask"]
