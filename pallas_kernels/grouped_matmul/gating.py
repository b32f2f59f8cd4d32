"""The gate of a gated expert; the gated product made of plain products, for implementations without their own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

# "swiglu" is what model configurations call a gate with silu.
ACTIVATIONS = {"silu": "silu", "swiglu": "silu", "gelu": "gelu"}


def activate(z: Array, act: str) -> Array:
    """silu(z) = z * sigmoid(z), or gelu(z) = z * Phi(z), exact."""
    return z * (jax.nn.sigmoid(z) if act == "silu" else _normal_cdf(z))


def gate_gradients(z: Array, u: Array, d_out: Array, act: str) -> tuple[Array, Array]:
    """The gradients of sum(d_out * act(z) * u) in z and u."""
    share = jax.nn.sigmoid(z) if act == "silu" else _normal_cdf(z)
    slope = share * (1 - share) if act == "silu" else jnp.exp(-0.5 * z * z) * float(1 / np.sqrt(2 * np.pi))
    return d_out * u * (share + z * slope), d_out * z * share


def _normal_cdf(z: Array) -> Array:
    return 0.5 * (1 + lax.erf(z * float(np.sqrt(0.5))))


class Composed:
    """The gated product, its two products and its gradients out of an implementation's plain products."""

    def __init__(self, rows_times_weights: Callable[..., Array], weights_gradient: Callable[..., Array]):
        self._rows_times_weights, self._weights_gradient = rows_times_weights, weights_gradient

    def gated(
        self,
        rows: Float[Array, "m k"],
        gate: Float[Array, "g k n"],
        up: Float[Array, "g k n"],
        group_sizes: Int[Array, " g"],
        *,
        act: str,
        dtype: DTypeLike,
    ) -> Float[Array, "m n"]:
        """Row i of group g gives `act(rows[i] @ gate[g]) * (rows[i] @ up[g])`; rows of no group give zero."""
        precise = jnp.promote_types(jnp.result_type(rows, gate, up), jnp.float32)
        z, u = self.products(rows, gate, up, group_sizes, dtype=precise)
        return (activate(z, act) * u).astype(dtype)

    def products(
        self,
        rows: Float[Array, "m k"],
        gate: Float[Array, "g k n"],
        up: Float[Array, "g k n"],
        group_sizes: Int[Array, " g"],
        *,
        dtype: DTypeLike,
    ) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
        """Row i of group g gives `rows[i] @ gate[g]` and `rows[i] @ up[g]`; rows of no group give zeros."""
        z, u = (
            self._rows_times_weights(rows, weights, group_sizes, transpose=False, dtype=dtype) for weights in (gate, up)
        )
        return z, u

    def gradients(
        self,
        rows: Float[Array, "m k"],
        gate: Float[Array, "g k n"],
        up: Float[Array, "g k n"],
        group_sizes: Int[Array, " g"],
        z: Float[Array, "m n"],
        u: Float[Array, "m n"],
        grads: Float[Array, "m n"],
        *,
        act: str,
    ) -> tuple[Float[Array, "m k"], Float[Array, "g k n"], Float[Array, "g k n"]]:
        """Gradients of `gated` in rows, gate and up, given its two products."""
        precise = jnp.promote_types(jnp.result_type(rows, gate, up), jnp.float32)
        d_products = gate_gradients(z.astype(precise), u.astype(precise), grads.astype(precise), act)
        by_gate, by_up = (
            self._rows_times_weights(d, weights, group_sizes, transpose=True, dtype=precise)
            for d, weights in zip(d_products, (gate, up), strict=True)
        )
        d_gate, d_up = (
            self._weights_gradient(rows, d, group_sizes, dtype=weights.dtype)
            for d, weights in zip(d_products, (gate, up), strict=True)
        )
        return (by_gate + by_up).astype(rows.dtype), d_gate, d_up
