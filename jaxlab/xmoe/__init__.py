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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlab.xmoe.config import MoEConfig, Topology, expert_capacity
    from jaxlab.xmoe.exchange import uneven_all_to_all
    from jaxlab.xmoe.memory import activation_memory
    from jaxlab.xmoe.moe import MoE, MoEMetrics
    from jaxlab.xmoe.pft import PFT, build_pft, pft_gather, pft_scatter
    from jaxlab.xmoe.rbd import RBDPlan, rbd_combine, rbd_dispatch, rbd_plan
    from jaxlab.xmoe.router import Routing, router_loss, top_k_gating
    from jaxlab.xmoe.ssmb import sequence_shard, sequence_unshard
    from jaxlab.xmoe.volume import dispatch_volume, redundancy_rate, uniform_redundancy_rate

_HOME = {
    "MoE": "moe",
    "MoEConfig": "config",
    "MoEMetrics": "moe",
    "PFT": "pft",
    "RBDPlan": "rbd",
    "Routing": "router",
    "Topology": "config",
    "activation_memory": "memory",
    "build_pft": "pft",
    "dispatch_volume": "volume",
    "expert_capacity": "config",
    "pft_gather": "pft",
    "pft_scatter": "pft",
    "rbd_combine": "rbd",
    "rbd_dispatch": "rbd",
    "rbd_plan": "rbd",
    "redundancy_rate": "volume",
    "router_loss": "router",
    "sequence_shard": "ssmb",
    "sequence_unshard": "ssmb",
    "top_k_gating": "router",
    "uneven_all_to_all": "exchange",
    "uniform_redundancy_rate": "volume",
}

__all__ = [
    "PFT",
    "MoE",
    "MoEConfig",
    "MoEMetrics",
    "RBDPlan",
    "Routing",
    "Topology",
    "activation_memory",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
