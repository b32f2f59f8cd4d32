"""One mixture-of-experts layer as plain arrays: what compressors and baselines take and give."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import grouped_matmul

ArrayLike = Array | np.ndarray


@struct.dataclass
class MoELayer:
    """Router and experts of one layer.

    Attributes:
        router: `[d,N]`.
        gate: `[N,d,f]`.
        up: `[N,d,f]`.
        down: `[N,f,d]`.
        top_k: experts that a token visits.
        norm_topk_prob: whether the k weights are divided by their sum.
        act: activation of the gate, "silu" or "gelu" (exact).
    """

    router: Any
    gate: Any
    up: Any
    down: Any
    top_k: int = struct.field(pytree_node=False)
    norm_topk_prob: bool = struct.field(pytree_node=False)
    act: str = struct.field(pytree_node=False)

    @property
    def num_experts(self) -> int:
        """N."""
        return self.router.shape[-1]


def apply_moe_layer(layer: MoELayer, x: Float[ArrayLike, "*batch d"]) -> Float[Array, "*batch d"]:
    """The layer's output: the sum over a token's k experts of weight * down(act(gate x) * up x), in x's dtype.

    Routing is a softmax over all experts in float32, then top-k; equal scores go to the lower index.

    Raises:
        ValueError: x does not fit the layer, or `act` is unknown.
    """
    x = jnp.asarray(x)
    if x.ndim < 1 or x.shape[-1] != layer.router.shape[0]:
        raise ValueError(f"x must end in d={layer.router.shape[0]}, the rows of the router, got shape {x.shape}")
    return _apply(layer, x)


@jax.jit
def _apply(layer: MoELayer, x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    ids, weights = route_rows(layer, rows)
    k = ids.shape[1]
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = jnp.sum(ids.reshape(-1) == jnp.arange(layer.num_experts)[:, None], axis=1, dtype=jnp.int32)
    inner = grouped_matmul(rows[order // k], layer.gate, sizes, rhs_up=layer.up, act=layer.act)
    outputs = grouped_matmul(inner, layer.down, sizes, preferred_element_type=jnp.float32)[jnp.argsort(order)]
    y = jnp.sum(outputs.reshape(-1, k, x.shape[-1]) * weights[..., None], axis=1)
    return y.astype(x.dtype).reshape(x.shape)


def router_logits(layer: MoELayer, rows: Float[Array, "s d"]) -> Float[Array, "s n"]:
    """Router outputs in float32."""
    return jnp.dot(
        rows.astype(jnp.float32), jnp.asarray(layer.router, jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def route_rows(
    layer: MoELayer, rows: Float[Array, "s d"], dropped: Array | None = None
) -> tuple[Int[Array, "s k"], Float[Array, "s k"]]:
    """The experts of each row and their weights; experts in the mask `dropped` `[n]` have logit -inf."""
    logits = router_logits(layer, rows)
    if dropped is not None:
        logits = jnp.where(dropped, -jnp.inf, logits)
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), min(layer.top_k, layer.num_experts))
    if layer.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return ids, weights


@functools.partial(jax.jit, static_argnames="act")
def expert_outputs(
    rows: Float[Array, "s d"],
    gate: Float[Array, "n d f"],
    up: Float[Array, "n d f"],
    down: Float[Array, "n f d"],
    act: str,
) -> Float[Array, "n s d"]:
    """What every expert makes of every row, float32; one expert at a time."""

    def one(weights):
        size = jnp.array([rows.shape[0]], jnp.int32)
        gate, up, down = (w[None] for w in weights)
        inner = grouped_matmul(rows, gate, size, rhs_up=up, act=act)
        return grouped_matmul(inner, down, size, preferred_element_type=jnp.float32)

    return jax.lax.map(one, (gate, up, down))
