"""The experts' matrices, and what every way of dispatching returns."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.xmoe.config import MoEConfig
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_matmul import PRODUCTS_NAME, grouped_matmul


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
    return through_experts(rows, experts, config, multiply, gated=functools.partial(multiply, act="silu"))


_made_again = functools.partial(
    jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(PRODUCTS_NAME)
)


def through_experts(
    rows: Float[Array, "..."],
    experts: Experts,
    config: MoEConfig,
    multiply: Callable[..., Array],
    gated: Callable[..., Array] | None = None,
) -> Float[Array, "..."]:
    """An expert's two or three products, of which the backward pass keeps little.

    That is rows, the inner rows before the nonlinearity and the matrices as they are stored. Casts and the nonlinearity
    are made again, the products are not.

    Args:
        rows: in the compute dtype, laid out as `multiply` wants them.
        experts: the matrices, stacked.
        config: the layer.
        multiply: `(rows, matrices) -> products`.
        gated: `(rows, gate, rhs_up=up) -> silu(rows @ gate) * (rows @ up)` in one, `grouped_matmul`; None puts it
            together.
    """
    gate, up, down = experts
    if gate is not None and gated is not None:

        @_made_again
        def both(rows, gate, up, down):
            inner = gated(rows, gate.astype(rows.dtype), rhs_up=up.astype(rows.dtype))
            return multiply(inner, down.astype(rows.dtype))

        return both(rows, gate, up, down)

    @_made_again
    def into(rows, matrix):
        return multiply(rows, matrix.astype(rows.dtype))

    @_made_again
    def out_of(inner, factor, down):
        inner = act(inner, config.activation)
        return multiply(inner if factor is None else inner * factor, down.astype(inner.dtype))

    if gate is None:
        return out_of(into(rows, up), None, down)
    return out_of(into(rows, gate), into(rows, up), down)


@_made_again
def masked(rows: Float[Array, "r h"], mask: Bool[Array, " r"]) -> Float[Array, "r h"]:
    """Zeros where the mask is False; the backward pass keeps the mask itself, not one as large as the rows."""
    return jnp.where(mask[:, None], rows, 0)


def no_exchange(y: Float[Array, "s h"]) -> Routed:
    """The result of a dispatcher that sent no rows anywhere."""
    return Routed(y, jnp.int32(0), jnp.int32(0))
