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


def gate_gradients(z: Array, u: Array, d_out: Array, act: str) -> tuple[Array, Array, Array]:
    """act(z) * u, and the gradients of sum(d_out * act(z) * u) in z and u."""
    share = jax.nn.sigmoid(z) if act == "silu" else _normal_cdf(z)
    slope = share * (1 - share) if act == "silu" else jnp.exp(-0.5 * z * z) * float(1 / np.sqrt(2 * np.pi))
    gate = z * share
    return gate * u, d_out * u * (share + z * slope), d_out * gate


def _normal_cdf(z: Array) -> Array:
    return 0.5 * (1 + lax.erf(z * float(np.sqrt(0.5))))


def composed(
    rows_times_weights: Callable[..., Array], weights_gradient: Callable[..., Array]
) -> tuple[Callable[..., Array], Callable[..., tuple[Array, Array, Array]]]:
    """The gated product and its gradients out of an implementation's plain products."""

    def products(rows, gate, up, group_sizes):
        precise = jnp.promote_types(jnp.result_type(rows, gate, up), jnp.float32)
        return (rows_times_weights(rows, w, group_sizes, transpose=False, dtype=precise) for w in (gate, up))

    def forward(
        rows: Float[Array, "m k"],
        gate: Float[Array, "g k n"],
        up: Float[Array, "g k n"],
        group_sizes: Int[Array, " g"],
        *,
        act: str,
        dtype: DTypeLike,
    ) -> Float[Array, "m n"]:
        z, u = products(rows, gate, up, group_sizes)
        return (activate(z, act) * u).astype(dtype)

    def gradients(
        rows: Float[Array, "m k"],
        gate: Float[Array, "g k n"],
        up: Float[Array, "g k n"],
        group_sizes: Int[Array, " g"],
        grads: Float[Array, "m n"],
        *,
        act: str,
    ) -> tuple[Float[Array, "m k"], Float[Array, "g k n"], Float[Array, "g k n"]]:
        z, u = products(rows, gate, up, group_sizes)
        _, d_z, d_u = gate_gradients(z, u, grads.astype(z.dtype), act)
        d_rows = sum(
            rows_times_weights(d, w, group_sizes, transpose=True, dtype=z.dtype) for d, w in ((d_z, gate), (d_u, up))
        )
        d_gate, d_up = (weights_gradient(rows, d, group_sizes, dtype=w.dtype) for d, w in ((d_z, gate), (d_u, up)))
        return d_rows.astype(rows.dtype), d_gate, d_up

    return forward, gradients
