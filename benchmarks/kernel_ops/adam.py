"""Passes over flat buckets (SuperOffload)."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_ops.op import Op
from pallas_kernels.fused_adam import fused_adam
from pallas_kernels.grad_stats import grad_stats
from tests.oracles import adam as adam_oracle


def _adam(p, m, v, g, *, implementation=None):
    hyper = {"count": 9, "lr": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    return fused_adam(p, m, v, g, **hyper, implementation=implementation)[:3]  # the copy is p, rounded


def _adam_values(p, m, v, g):
    return adam_oracle.step(p, m, v, g, t=10, lr=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


def _adam_arrays():
    rng = np.random.default_rng(0)
    p, m, v, g = (jnp.asarray(rng.normal(size=1 << 20), jnp.float32) for _ in range(4))
    return p, 0.1 * m, jnp.square(v), g


def _adam_gpu_shapes():
    return (*[jax.ShapeDtypeStruct((1 << 24,), jnp.float32)] * 3, jax.ShapeDtypeStruct((1 << 24,), jnp.bfloat16))


OPS = (
    Op(
        name="fused_adam",
        what="One AdamW step on a flat bucket (SuperOffload): parameters, moments and a bfloat16 copy in one pass.",
        function=_adam,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla"),
        arrays=_adam_arrays,
        shape="1048576 parameters",
        oracle=_adam_values,
        differentiate=(),
        gpu_shapes=_adam_gpu_shapes,
        gpu_shape="16777216 parameters (64 MiB of float32), bfloat16 gradients",
        notes="`xla` rounds every product before it is added, so that its bits are those of the C++ host step.",
    ),
    Op(
        name="grad_stats",
        what="Sum of squares and finiteness of a gradient bucket (SuperOffload), in a fixed order.",
        function=grad_stats,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla"),
        arrays=lambda: _adam_arrays()[:1],
        shape="1048576 elements",
        oracle=lambda g: (np.sum(np.square(g)), np.isfinite(g).all()),
        differentiate=(),
        gpu_shapes=lambda: _adam_gpu_shapes()[:1],
        gpu_shape="16777216 float32 elements",
    ),
)
