"""What calibration keeps: sums of squared activations by expert and input channel (arXiv:2511.04805, section 3.2).

They add up over calls, layers are stacked, and no activation is stored.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Integer

from jaxlab.puzzlemoe.config import NORMS, check_name
from pallas_kernels.grouped_matmul import grouped_matmul

ArrayLike = Array | np.ndarray


@struct.dataclass
class ExpertStats:
    """Statistics of the tokens routed to each expert; `a + b` joins those of two sets of calls.

    Attributes:
        sum_sq_in: `[L,N,d]` float32, sums over tokens of the squared input of the gate and up projections.
        sum_sq_mid: `[L,N,f]` float32, the same of the input of the down projection.
        tokens: `[L,N]` int32, tokens that reached the expert.
        calls: `[L,N]` int32, forward calls, those without a token for the expert included.
    """

    sum_sq_in: Any
    sum_sq_mid: Any
    tokens: Any
    calls: Any

    def __add__(self, other: "ExpertStats") -> "ExpertStats":
        shapes = [(part.sum_sq_in.shape, part.sum_sq_mid.shape) for part in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"statistics of two models do not add: shapes {shapes[0]} and {shapes[1]}")
        return jax.tree.map(lambda a, b: a + b, self, other)

    def layer(self, index: int) -> "ExpertStats":
        """Those of one layer, without the leading L.

        Raises:
            ValueError: no such layer, or the layers are not stacked.
        """
        if self.tokens.ndim != 2 or not -len(self.tokens) <= index < len(self.tokens):
            raise ValueError(f"layer {index}: tokens [L, N] have shape {self.tokens.shape}")
        return jax.tree.map(lambda leaf: leaf[index], self)


def expert_stats(
    x: Float[ArrayLike, "t d"],
    gate: Float[ArrayLike, "n d f"],
    up: Float[ArrayLike, "n d f"],
    expert_ids: Integer[ArrayLike, "t k"],
    *,
    act: str = "silu",
) -> ExpertStats:
    """Statistics of one layer in one forward call: arrays without the leading L, `calls` all 1.

    Args:
        x: input of the layer's experts; no tokens at all is allowed.
        gate: gate projections.
        up: up projections.
        expert_ids: the experts of each token.
        act: activation of the gate, "silu" or "gelu" (exact).

    Raises:
        ValueError: shapes disagree, a concrete id is not an expert's, or `act` is unknown.
        TypeError: a dtype is not floating (not integer, for the ids).
    """
    x, gate, up, ids = map(jnp.asarray, (x, gate, up, expert_ids))
    if x.ndim != 2 or gate.ndim != 3 or gate.shape != up.shape or gate.shape[1] != x.shape[1]:
        raise ValueError(f"expected x [t, d], gate and up [n, d, f], got {x.shape}, {gate.shape} and {up.shape}")
    if ids.ndim != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"expert_ids must be [t, k] with t={x.shape[0]}, got {ids.shape}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"expert_ids must be integers, got {ids.dtype}")
    if not isinstance(ids, jax.core.Tracer):
        bad = np.unique(ids[(ids < 0) | (ids >= len(gate))])
        if bad.size:
            raise ValueError(f"expert_ids must be in 0..{len(gate) - 1}, got {bad.tolist()}")
    return _expert_stats(x, gate, up, ids, act)


@functools.partial(jax.jit, static_argnames="act")
def _expert_stats(x, gate, up, ids, act):
    (num_tokens, k), num_experts = ids.shape, gate.shape[0]
    owner = ids.reshape(-1)
    owner = jnp.where((owner >= 0) & (owner < num_experts), owner, num_experts)  # traced nonsense belongs to nobody
    order = jnp.argsort(owner, stable=True)
    hits = owner == jnp.arange(num_experts)[:, None]
    counts = jnp.sum(hits, axis=1, dtype=jnp.int32)
    # Sums over a group as products with zeros and ones: a scatter is slow everywhere.
    add = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    visits = jnp.sum(hits.reshape(num_experts, num_tokens, k), axis=2, dtype=jnp.float32)
    mid = grouped_matmul(x[order // k], gate, counts, rhs_up=up, act=act, preferred_element_type=jnp.float32)
    return ExpertStats(
        sum_sq_in=add(visits, jnp.square(x.astype(jnp.float32))),
        sum_sq_mid=add(hits[:, order].astype(jnp.float32), jnp.square(mid)),
        tokens=counts,
        calls=jnp.ones(num_experts, jnp.int32),
    )


def expert_norms(layer_stats: ExpertStats, norm: str = "sum") -> tuple[Float[Array, "*n d"], Float[Array, "*n f"]]:
    """Norms of the input channels, by which two experts' weights are compared.

    Args:
        layer_stats: of one layer.
        norm: "sum" (root of the sum of squares: the busier expert of a pair is favoured), "tokens" (per token), "calls"
            (per forward call, as Wanda's code does) or "magnitude" (ones).

    Returns:
        n_in `[N,d]` for gate and up, n_mid `[N,f]` for down; an expert that saw no token has zeros (ones for
        "magnitude").

    Raises:
        ValueError: an unknown norm.
    """
    check_name("norm", norm, NORMS)
    sums = (layer_stats.sum_sq_in, layer_stats.sum_sq_mid)
    if norm == "magnitude":
        n_in, n_mid = (jnp.ones(ss.shape, jnp.float32) for ss in sums)
    else:
        count = {"sum": None, "tokens": layer_stats.tokens, "calls": layer_stats.calls}[norm]
        per = 1.0 if count is None else jnp.maximum(jnp.asarray(count), 1).astype(jnp.float32)[..., None]
        n_in, n_mid = (jnp.sqrt(jnp.asarray(ss, jnp.float32) / per) for ss in sums)
    return n_in, n_mid
