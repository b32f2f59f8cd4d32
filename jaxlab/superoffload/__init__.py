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
    from jaxlab.superoffload.config import SuperOffloadConfig
    from jaxlab.superoffload.engine import SuperOffload, TrainState
    from jaxlab.superoffload.host_adam import AdamHyper, fused_adamw, host_adamw, scale_by_host_adam
    from jaxlab.superoffload.loss_scale import LossScaleConfig, LossScaleState, init_loss_scale, update_loss_scale
    from jaxlab.superoffload.segmented import Segmented
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

__all__ = [
    "AdamHyper",
    "BucketSpec",
    "LossScaleConfig",
    "LossScaleState",
    "Segmented",
    "SpeculativeState",
    "SuperOffload",
    "SuperOffloadConfig",
    "TrainState",
    "UndoLog",
    "Verdict",
    "cast_bucket",
    "commit",
    "flatten",
    "fused_adamw",
    "host_adamw",
    "init_loss_scale",
    "init_state",
    "make_buckets",
    "replay",
    "rollback",
    "scale_by_host_adam",
    "speculate",
    "unflatten",
    "update_loss_scale",
    "validate",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "bucket": ("BucketSpec", "flatten", "make_buckets", "unflatten"),
        "cast": ("cast_bucket",),
        "config": ("SuperOffloadConfig",),
        "engine": ("SuperOffload", "TrainState"),
        "host_adam": ("AdamHyper", "fused_adamw", "host_adamw", "scale_by_host_adam"),
        "loss_scale": ("LossScaleConfig", "LossScaleState", "init_loss_scale", "update_loss_scale"),
        "segmented": ("Segmented",),
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
    },
)
