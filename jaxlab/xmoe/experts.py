"""The experts' matrices, and what every way of dispatching returns."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.xmoe.config import MoEConfig
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_matmul import grouped_matmul


class Experts(NamedTuple):
    """The experts that one device holds: E_l of them.

    Attributes:
        gate: `[E_l,H,F]`; None unless the activation is "swiglu".
        up: `[E_l,H,F]`.
        down: `[E_l,F,H]`.
    """

    gate: Array | None
    up: Array
    down: Array


class Routed(NamedTuple):
    """What a dispatcher gives, of one device.

    Attributes:
        y: `[S,H]`, the weighted sum of each token's experts.
        dropped_recv: rows that its receive buffers had no room for, int32.
        inter_node_rows: rows it sent to other nodes, one direction, int32.
    """

    y: Array
    dropped_recv: Array
    inter_node_rows: Array


ExpertFunction = Callable[[Array, Experts, Array, MoEConfig], Array]
"""rows `[M,H]` that lie expert after expert, the experts, rows of each, the layer -> `[M,H]`."""


def act(x: Float[Array, "..."], activation: str) -> Float[Array, "..."]:
    """The nonlinearity of an expert: SiLU, or the exact GELU."""
    return jax.nn.gelu(x, approximate=False) if activation == "gelu" else jax.nn.silu(x)


def expert_ffn(
    rows: Float[Array, "m h"],
    experts: Experts,
    group_sizes: Int[Array, " e"],
    config: MoEConfig,
    *,
    implementation: Implementation = None,
) -> Float[Array, "m h"]:
    """Each row through its expert; rows lie expert after expert, and those past the last give zeros.

    Args:
        rows: tokens, in the compute dtype; the matrices are cast to it.
        experts: the matrices.
        group_sizes: rows of each expert.
        config: the layer.
        implementation: of the grouped products; None is the configuration's.
    """
    multiply = functools.partial(
        grouped_matmul, group_sizes=group_sizes, implementation=implementation or config.kernel_implementation
    )

    # Checkpointed: the backward pass keeps rows, one array of inner width and the matrices as they are stored; their
    # casts and the nonlinearity are made again. The products themselves are not.
    @_made_again
    def into(rows, gate, up):
        up = up.astype(rows.dtype)
        if gate is None:
            return multiply(rows, up)
        return multiply(rows, gate.astype(rows.dtype), rhs_up=up, act="silu")

    @_made_again
    def out_of(inner, down):
        inner = act(inner, config.activation) if experts.gate is None else inner
        return multiply(inner, down.astype(inner.dtype))

    return out_of(into(rows, experts.gate, experts.up), experts.down)


_made_again = functools.partial(jax.checkpoint, prevent_cse=False)


def no_exchange(y: Float[Array, "s h"]) -> Routed:
    """The result of a dispatcher that sent no rows anywhere."""
    return Routed(y, jnp.int32(0), jnp.int32(0))
