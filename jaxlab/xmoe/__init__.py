"""X-MoE: padding-free expert-parallel training of mixtures of experts (Yuan et al., SC 2025, arXiv:2508.13337).

Example:
    import jax, jax.numpy as jnp
    from jaxlab.xmoe import MoE, MoEConfig, router_loss

    config = MoEConfig(num_experts=8, top_k=2, hidden_size=32, ffn_size=16)
    layer, x = MoE(config), jax.random.normal(jax.random.key(0), (4, 16, 32))
    y, metrics = layer.apply(layer.init(jax.random.key(1), x), x)
    print(y.shape, metrics.tokens_per_expert, router_loss(metrics, config))

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.xmoe import baselines
    from jaxlab.xmoe.config import MoEConfig, Topology, expert_capacity
    from jaxlab.xmoe.exchange import uneven_all_to_all
    from jaxlab.xmoe.memory import activation_memory
    from jaxlab.xmoe.moe import MoE, MoEMetrics
    from jaxlab.xmoe.pft import PFT, build_pft, pft_gather, pft_scatter
    from jaxlab.xmoe.rbd import RBDPlan, rbd_combine, rbd_dispatch, rbd_plan
    from jaxlab.xmoe.router import Routing, router_loss, top_k_gating
    from jaxlab.xmoe.ssmb import sequence_shard, sequence_unshard
    from jaxlab.xmoe.volume import dispatch_volume, redundancy_rate, uniform_redundancy_rate

__all__ = [
    "PFT",
    "MoE",
    "MoEConfig",
    "MoEMetrics",
    "RBDPlan",
    "Routing",
    "Topology",
    "activation_memory",
    "baselines",
    "build_pft",
    "dispatch_volume",
    "expert_capacity",
    "pft_gather",
    "pft_scatter",
    "rbd_combine",
    "rbd_dispatch",
    "rbd_plan",
    "redundancy_rate",
    "router_loss",
    "sequence_shard",
    "sequence_unshard",
    "top_k_gating",
    "uneven_all_to_all",
    "uniform_redundancy_rate",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "config": ("MoEConfig", "Topology", "expert_capacity"),
        "exchange": ("uneven_all_to_all",),
        "memory": ("activation_memory",),
        "moe": ("MoE", "MoEMetrics"),
        "pft": ("PFT", "build_pft", "pft_gather", "pft_scatter"),
        "rbd": ("RBDPlan", "rbd_combine", "rbd_dispatch", "rbd_plan"),
        "router": ("Routing", "router_loss", "top_k_gating"),
        "ssmb": ("sequence_shard", "sequence_unshard"),
        "volume": ("dispatch_volume", "redundancy_rate", "uniform_redundancy_rate"),
    },
    modules=("baselines",),
)
