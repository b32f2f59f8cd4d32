"""LayerNorm and the product by chunks of rows: what a CPU, and any platform without a kernel, really uses.

A chunk stays in a core's cache from the statistics to the result, and nothing larger than it is a temporary. The
backward pass keeps the arguments alone. With x^ the rows normalised without scale and offset, G = x^T d_out and s the
sum of d_out's rows, every other gradient is a matter of [k, n] arrays:

    d_w = scale * G + offset s,   d_scale = sum_n w * G,   d_offset = w s,   d_b = s.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import zeros_alike


def forward(
    x: Float[Array, "m k"],
    scale: Float[Array, " k"],
    offset: Float[Array, " k"],
    w: Float[Array, "k n"],
    b: Float[Array, " n"] | None,
    *,
    eps: float,
) -> Float[Array, "m n"]:
    """LN(x) w + b."""
    weights, constant = folded(scale, offset, w, b, x)

    def chunk(at, size, fresh, out):
        del fresh
        normal, _ = standardise(cut(x, at, size, weights.dtype), eps)
        return put(out, normal @ weights + constant, at)

    return over_rows(x.shape[0], chunk_of(x), chunk, zeros_alike((x.shape[0], w.shape[1]), x.dtype, x))


def backward(
    x: Float[Array, "m k"],
    scale: Float[Array, " k"],
    offset: Float[Array, " k"],
    w: Float[Array, "k n"],
    d_out: Float[Array, "m n"],
    *,
    eps: float,
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, " k"], Float[Array, "k n"], Float[Array, " n"]]:
    """Gradients of x, scale, offset, w and b, the last four in float32."""
    weights, _ = folded(scale, offset, w, None, x)
    wide = weights.dtype

    def chunk(at, size, fresh, carry):
        d_x, product, total = carry
        normal, rstd = standardise(cut(x, at, size, wide), eps)
        d_own = jnp.where(fresh[:, None], cut(d_out, at, size, wide), 0)
        d_x = put(d_x, through_norm(cut(d_out, at, size, wide) @ weights.T, normal, rstd), at)
        return d_x, product + transposed(normal) @ d_own, total + jnp.sum(d_own, axis=0)

    start = (x, zeros_alike(w.shape, wide, x), zeros_alike(w.shape[1:], wide, x))
    d_x, product, total = over_rows(x.shape[0], chunk_of(x), chunk, start)
    return d_x, *weight_gradients(scale, offset, w, product, total), total


def folded(
    scale: Array, offset: Array, w: Array, b: Array | None, x: Array
) -> tuple[Float[Array, "k n"], Float[Array, " n"]]:
    """A factor and a constant in float32, with which LN(x) w + b is x^ times the one plus the other."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    w = w.astype(wide)
    constant = jnp.sum(offset.astype(wide)[:, None] * w, axis=0)
    return scale.astype(wide)[:, None] * w, constant if b is None else constant + b.astype(wide)


def weight_gradients(
    scale: Array, offset: Array, w: Array, product: Float[Array, "k n"], total: Float[Array, " n"]
) -> tuple[Float[Array, " k"], Float[Array, " k"], Float[Array, "k n"]]:
    """Gradients of scale, offset and w from x^T d_out and the sum of d_out's rows."""
    wide = product.dtype
    w = w.astype(wide)
    d_w = scale.astype(wide)[:, None] * product + offset.astype(wide)[:, None] * total
    return jnp.sum(w * product, axis=1), jnp.sum(w * total, axis=1), d_w


def standardise(x: Float[Array, "r k"], eps: float) -> tuple[Float[Array, "r k"], Float[Array, "r 1"]]:
    """Rows of mean 0 and variance 1, and the reciprocal of the deviation."""
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True) + eps)
    return centred * rstd, rstd


def through_norm(d: Float[Array, "r k"], normal: Float[Array, "r k"], rstd: Float[Array, "r 1"]) -> Float[Array, "r k"]:
    """The gradient of the rows from that of the standardised rows."""
    return rstd * (d - normal * jnp.mean(d * normal, axis=1, keepdims=True) - jnp.mean(d, axis=1, keepdims=True))


def chunk_of(x: Array) -> int:
    """Rows of a chunk: few enough for a core's cache, enough for their product to outweigh adding it to the sum."""
    return max(256, 2 * x.shape[1])


def over_rows(rows: int, chunk: int, body: Callable[..., Any], carry: Any, *, multiple: int = 1) -> Any:
    """Folds `body(at, size, fresh, carry)` over chunks [at, at + size) of the rows.

    Chunks are of one size, so the last may begin within the one before it: `fresh[size]` is False for rows that a sum
    has already. Their size is a `multiple`, of which `chunk` is one too, where there are several.
    """
    parts = -(-rows // chunk)
    size = min(rows, -(-rows // (parts * multiple)) * multiple)

    def step(i, carry):
        at = jnp.minimum(i * size, rows - size)
        return body(at, size, at + jnp.arange(size) >= i * size, carry)

    return jax.lax.fori_loop(0, parts, step, carry)


def cut(x: Array, at: Array, size: int, dtype: Any) -> Array:
    """Rows [at, at + size), of a dtype."""
    return jax.lax.dynamic_slice_in_dim(x, at, size).astype(dtype)


def put(out: Array, part: Array, at: Array) -> Array:
    """Writes rows from `at` on."""
    return jax.lax.dynamic_update_slice_in_dim(out, part.astype(out.dtype), at, 0)


def transposed(x: Float[Array, "r k"]) -> Float[Array, "k r"]:
    """Made beforehand: XLA's CPU library multiplies fast only what is contracted along its last axis."""
    return jax.lax.optimization_barrier(x.T)
