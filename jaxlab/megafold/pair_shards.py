"""One device's part of the operations on pairs: its own rows i, and what it must learn of the others'.

To be called inside `jax.shard_map`. N tokens lie over `axis`, n = N / P of them on each of its P devices: rows of z are
whole, `[B, n, N, C]`, and so are those of the results. What one device receives in a forward pass (the backward pass
sends as much the other way):

- triangle attention: the bias of all rows, H channels of N^2 pairs; the ending node also exchanges rows for columns and
  back, N^2 C / P each.
- triangle multiplication: channels do not mix in it, so a device takes F / P of them for all pairs. a, b, and then the
  product are exchanged, N^2 F / P each, whatever the direction; a ring of b, or a sum scattered over rows, would move
  N^2 F.
- attention with pair bias: keys and values of all tokens; of samples that lie over the devices, the bias of all rows.
- outer product mean, pair-weighted averaging: b, or the values, of all tokens, `[S, N]` of few channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxlab.megafold.ops.attention import attend_rows, attend_tokens, token_projections
from jaxlab.megafold.ops.basic import (
    Affine,
    Implementation,
    Whole,
    kernels_of,
    masked_softmax,
    norm_project,
    project,
)
from jaxlab.megafold.ops.msa import average_rows, outer_rows

_CHUNKS, _PAIRS = 8, 2048  # at most so many chunks of rows, of no fewer pairs


def triangle_attention(
    z: Float[Array, "b rows n c"],
    mask: Bool[Array, "b rows n"] | None = None,
    *,
    axis: str,
    node: str,
    implementation: Implementation,
    **weights: Any,
) -> Float[Array, "b rows n c"]:
    """`ops.triangle_attention` for this device's rows; of the ending node, its columns."""
    if node == "ending":
        z, mask = transposed(z, axis), None if mask is None else transposed(mask, axis)
    # Beside q, k and v the bias is small: in float32 its gradient, too, is summed so.
    whole = _gather(axis, dtype=jnp.promote_types(z.dtype, jnp.float32))
    out = attend_rows(z, mask, **weights, kernels=kernels_of(implementation), whole=whole)
    return transposed(out, axis) if node == "ending" else out


def triangle_multiplication(
    z: Float[Array, "b rows n c"],
    mask: Bool[Array, "b rows n"] | None = None,
    *,
    axis: str,
    ln_in: Affine | None,
    w_proj: Float[Array, "c f2"],
    w_gate: Float[Array, "c f2"],
    ln_out: Affine | None,
    w_out: Float[Array, "f c"],
    w_out_gate: Float[Array, "c c"],
    direction: str,
    eps: float,
    implementation: Sequence[str] | str | None,
) -> Float[Array, "b rows n c"]:
    """`triangle_multiplication` for this device's rows, the product itself for its channels.

    The backward pass keeps z alone, as the kernel's does. `implementation` is that of layernorm_linear.
    """
    hidden, fused = w_out.shape[0], {"eps": eps, "implementation": implementation}
    padding = -hidden % jax.lax.axis_size(axis)
    w_pair = jnp.concatenate([w_proj, w_gate], axis=1)

    def sides(z: Array, mask: Array | None) -> Array:
        value, gate = jnp.split(norm_project(z, ln_in, w_pair, **fused), 2, axis=-1)
        pair = jax.nn.sigmoid(gate) * value
        pair = pair if mask is None else jnp.where(mask[..., None], pair, 0)
        return jnp.moveaxis(pair.reshape(*pair.shape[:3], 2, hidden), (3, 4), (1, 2))  # [B, 2, F, rows, N]

    def result(z: Array, t: Array) -> Array:
        out = norm_project(jnp.moveaxis(t, 1, -1), ln_out, w_out, **fused)
        return jax.nn.sigmoid(norm_project(z, ln_in, w_out_gate, **fused)) * out

    @jax.checkpoint
    def update(z: Array, mask: Array | None) -> Array:
        pair = _by_chunks(sides, (z, mask), (1, 1), 3)
        pair = jnp.pad(pair, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
        a, b = jnp.moveaxis(jax.lax.all_to_all(pair, axis, 2, 3, tiled=True), 1, 0)  # [B, F / P, N, N]
        product = "bfik,bfjk->bfij" if direction == "outgoing" else "bfki,bfkj->bfij"
        wide = jnp.promote_types(z.dtype, jnp.float32)
        t = jnp.einsum(product, a, b, preferred_element_type=wide).astype(z.dtype)
        t = jax.lax.all_to_all(t, axis, 2, 1, tiled=True)[:, :hidden]
        return _by_chunks(result, (z, t), (1, 2), 1)

    return update(z, mask)


def _by_chunks(function: Callable[..., Array], xs: tuple[Any, ...], axes: tuple[int, ...], out_axis: int) -> Array:
    """`function(*xs)` for some of the rows that lie along `axes` after the others, recomputed in the backward pass."""
    rows = xs[0].shape[axes[0]]
    most = max(1, min(_CHUNKS, math.prod(xs[0].shape[:-1]) // _PAIRS))
    chunks = max(count for count in range(1, most + 1) if rows % count == 0)

    def cut(x: Array, axis: int) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, -1, *x.shape[axis + 1 :]), axis, 0)

    parts = tuple(None if x is None else cut(x, axis) for x, axis in zip(xs, axes))
    out = jax.lax.map(lambda part: jax.checkpoint(function)(*part), parts)
    out = jnp.moveaxis(out, 0, out_axis)
    return out.reshape(*out.shape[:out_axis], rows, *out.shape[out_axis + 2 :])


def outer_product_mean(
    m: Float[Array, "b s rows c_m"],
    mask: Bool[Array, "b s rows"] | None = None,
    *,
    axis: str,
    implementation: Implementation,
    row_chunk: int | None,
    **weights: Any,
) -> Float[Array, "b rows n c_z"]:
    """`ops.outer_product_mean` for this device's rows i."""
    return outer_rows(m, mask, **weights, kernels=kernels_of(implementation), row_chunk=row_chunk, whole=_gather(axis))


def pair_weighted_averaging(
    m: Float[Array, "b s rows c_m"],
    z: Float[Array, "b rows n c_z"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    axis: str,
    implementation: Implementation,
    **weights: Any,
) -> Float[Array, "b s rows c_m"]:
    """`ops.pair_weighted_averaging` for this device's tokens i."""
    return average_rows(m, z, mask, **weights, kernels=kernels_of(implementation), whole=_gather(axis))


def attention_pair_bias(
    s: Float[Array, "b *t tokens c"],
    z: Float[Array, "b rows n c_z"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    axis: str,
    ln_s: Affine | None,
    ln_z: Affine | None,
    w_bias: Array,
    w_out: Array,
    implementation: Implementation,
    **weights: Any,
) -> Float[Array, "b *t tokens c"]:
    """`ops.attention_pair_bias` for all tokens of this device's samples, or for this device's tokens of all of them."""
    kernels, wide = kernels_of(implementation), jnp.promote_types(s.dtype, jnp.float32)
    if s.shape[-2] == z.shape[2]:
        weights |= {"ln_s": ln_s, "ln_z": ln_z, "w_bias": w_bias, "w_out": w_out}
        return attend_tokens(s, z, mask, **weights, kernels=kernels, whole=_gather(axis, dtype=wide))
    q, k, v, gate = token_projections(s, ln_s, **weights, heads=w_bias.shape[1], kernels=kernels)
    k, v = (_gather(axis)(x, 2) for x in (k, v))
    bias = jnp.moveaxis(norm_project(z, ln_z, w_bias, implementation=kernels.layernorm_linear), -1, 1).astype(wide)

    # Queries and keys differ in number, which is not the kernel's case; a sample at a time keeps the logits small.
    @jax.checkpoint
    def sample(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv
        logits = jnp.einsum("bihd,bjhd->bhij", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5 + bias
        share = masked_softmax(logits, None if mask is None else mask[:, None, None, :])
        return jnp.einsum("bhij,bjhd->bihd", share.astype(v.dtype), v)

    out = jax.lax.map(sample, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v)))
    return project(jax.nn.sigmoid(gate) * jnp.moveaxis(out, 0, 1).reshape(gate.shape), w_out)


def transposed(x: Shaped[Array, "b rows n *c"], axis: str) -> Shaped[Array, "b rows n *c"]:
    """This device's rows of the transpose."""
    return jnp.swapaxes(jax.lax.all_to_all(x, axis, 2, 1, tiled=True), 1, 2)


def _gather(axis: str, dtype: Any = None) -> Whole:
    """Tokens of all devices, in another dtype if so said; the gradient is summed and scattered in that."""
    return lambda x, dim: jax.lax.all_gather(x if dtype is None else x.astype(dtype), axis, axis=dim, tiled=True)
