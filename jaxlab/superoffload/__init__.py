"""SuperOffload (arXiv:2509.21271): Adam on the host while the accelerator still runs backward, and exact to the bit.

Master parameters and moments lie in flat buckets in host memory. A step is speculated on before the gradients' norm is
known, then committed, or rolled back bit for bit and replayed.

Example:
    import jax, jax.numpy as jnp
    from jaxlab import superoffload as so

    params, hyper = {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}, so.AdamHyper(1e-3, weight_decay=0.1)
    spec = so.make_buckets(params, bucket_bytes=4096)
    state, grads = so.init_state(params, spec), so.flatten(jax.tree.map(jnp.ones_like, params), spec)
    state, log = so.speculate(state, grads, hyper, undo="residual")
    coef = so.validate(grads, clip_norm=1.0).coef
    state = so.commit(state) if coef == 1 else so.replay(so.rollback(state, log), grads, hyper, coef=coef)
    params = so.unflatten(state.p, spec)

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.superoffload.bucket import BucketSpec, flatten, make_buckets, unflatten
    from jaxlab.superoffload.cast import cast_bucket
    from jaxlab.superoffload.checkpoint import EngineCheckpointer
    from jaxlab.superoffload.config import SuperOffloadConfig
    from jaxlab.superoffload.engine import SuperOffload, TrainState
    from jaxlab.superoffload.host_adam import AdamHyper, fused_adamw, host_adamw, scale_by_host_adam
    from jaxlab.superoffload.loss_scale import LossScaleConfig, LossScaleState, init_loss_scale, update_loss_scale
    from jaxlab.superoffload.machine import Machine, ModelShape, get_machine
    from jaxlab.superoffload.memory import CapacityError, Memory, estimate_memory
    from jaxlab.superoffload.placement import fetch_tree, host_sharding, offload_tree, remat_offload_policy
    from jaxlab.superoffload.plan import OffloadPlan, plan_offload
    from jaxlab.superoffload.policy import choose_cast, choose_weight_policy, weight_flow_efficiency
    from jaxlab.superoffload.schedule import Schedule
    from jaxlab.superoffload.segmented import Segmented
    from jaxlab.superoffload.simulation import choose_gpu_buckets, simulate
    from jaxlab.superoffload.stack import OffloadedScan, OffloadedStack
    from jaxlab.superoffload.stv import (
        SpeculativeState,
        UndoLog,
        Verdict,
        commit,
        init_state,
        replay,
        rollback,
        speculate,
        validate,
    )
    from jaxlab.superoffload.ulysses import UlyssesAttention, gather_heads, scatter_heads, ulysses_attention

__all__ = [
    "AdamHyper",
    "BucketSpec",
    "CapacityError",
    "EngineCheckpointer",
    "LossScaleConfig",
    "LossScaleState",
    "Machine",
    "Memory",
    "ModelShape",
    "OffloadPlan",
    "OffloadedScan",
    "OffloadedStack",
    "Schedule",
    "Segmented",
    "SpeculativeState",
    "SuperOffload",
    "SuperOffloadConfig",
    "TrainState",
    "UlyssesAttention",
    "UndoLog",
    "Verdict",
    "cast_bucket",
    "choose_cast",
    "choose_gpu_buckets",
    "choose_weight_policy",
    "commit",
    "estimate_memory",
    "fetch_tree",
    "flatten",
    "fused_adamw",
    "gather_heads",
    "get_machine",
    "host_adamw",
    "host_sharding",
    "init_loss_scale",
    "init_state",
    "make_buckets",
    "offload_tree",
    "plan_offload",
    "remat_offload_policy",
    "replay",
    "rollback",
    "scale_by_host_adam",
    "scatter_heads",
    "simulate",
    "speculate",
    "ulysses_attention",
    "unflatten",
    "update_loss_scale",
    "validate",
    "weight_flow_efficiency",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "bucket": (
            "BucketSpec",
            "flatten",
            "make_buckets",
            "unflatten",
        ),
        "cast": ("cast_bucket",),
        "checkpoint": ("EngineCheckpointer",),
        "config": ("SuperOffloadConfig",),
        "engine": (
            "SuperOffload",
            "TrainState",
        ),
        "host_adam": (
            "AdamHyper",
            "fused_adamw",
            "host_adamw",
            "scale_by_host_adam",
        ),
        "loss_scale": (
            "LossScaleConfig",
            "LossScaleState",
            "init_loss_scale",
            "update_loss_scale",
        ),
        "machine": (
            "Machine",
            "ModelShape",
            "get_machine",
        ),
        "memory": (
            "CapacityError",
            "Memory",
            "estimate_memory",
        ),
        "placement": (
            "fetch_tree",
            "host_sharding",
            "offload_tree",
            "remat_offload_policy",
        ),
        "plan": (
            "OffloadPlan",
            "plan_offload",
        ),
        "policy": (
            "choose_cast",
            "choose_weight_policy",
            "weight_flow_efficiency",
        ),
        "schedule": ("Schedule",),
        "segmented": ("Segmented",),
        "simulation": (
            "choose_gpu_buckets",
            "simulate",
        ),
        "stack": (
            "OffloadedScan",
            "OffloadedStack",
        ),
        "stv": (
            "SpeculativeState",
            "UndoLog",
            "Verdict",
            "commit",
            "init_state",
            "replay",
            "rollback",
            "speculate",
            "validate",
        ),
        "ulysses": (
            "UlyssesAttention",
            "gather_heads",
            "scatter_heads",
            "ulysses_attention",
        ),
    },
)
