"""Between alignment and pairs: the outer product mean, and rows averaged with weights from the pairs."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.megafold.config import Kernels
from jaxlab.megafold.ops.basic import (
    Affine,
    Implementation,
    Whole,
    check_mask,
    check_matrices,
    kernels_of,
    masked_softmax,
    norm_project,
    project,
    split_heads,
    whole_already,
)

_CHUNK_ELEMENTS = 2**24


def outer_product_mean(
    m: Float[Array, "b s n c_m"],
    mask: Bool[Array, "b s n"] | None = None,
    *,
    ln_in: Affine | None,
    w_a: Float[Array, "c_m f"],
    w_b: Float[Array, "c_m f"],
    w_out: Float[Array, "ff c_z"],
    b_out: Float[Array, " c_z"],
    implementation: Implementation = None,
    row_chunk: int | None = None,
) -> Float[Array, "b n n c_z"]:
    """Mean over the rows of the outer products of two projections, projected to pairs (AlphaFold3, algorithm 9).

    out_ij = (sum_s mask_si mask_sj a_si ⊗ b_sj / max(sum_s mask_si mask_sj, 1)) w_out + b_out, with a, b = LN(m) w_a,
    LN(m) w_b, and the outer product flattened a-major. `[N, N, F*F]` is never whole: rows i are taken some at a time,
    and again in the backward pass.

    Args:
      m: alignment.
      mask: valid entries.
      ln_in: scale and offset for m.
      w_a: first projection.
      w_b: second projection.
      w_out: its rows are pairs (channel of a, channel of b).
      b_out: bias; a pair without common rows gets it alone.
      implementation: of layernorm_linear.
      row_chunk: rows i at a time; None: as many as keep the outer products below 2^24 numbers.

    Raises:
      ValueError: unknown implementation; shapes that do not fit; row_chunk below 1.
      TypeError: a mask that is not boolean.
    """
    if m.ndim != 4:
        raise ValueError(f"m: expected shape [B, S, N, Cm], got {m.shape}")
    check_mask(mask, "[B, S, N]", m.shape[:3])
    check_matrices(w_a=(w_a, m.shape[-1]))
    width = w_a.shape[1]
    check_matrices(width, w_b=(w_b, m.shape[-1]))
    check_matrices(w_out=(w_out, width * width))
    if row_chunk is not None and row_chunk < 1:
        raise ValueError(f"row_chunk: expected at least 1, or None, got {row_chunk}")
    weights = {"ln_in": ln_in, "w_a": w_a, "w_b": w_b, "w_out": w_out, "b_out": b_out}
    return outer_rows(m, mask, **weights, kernels=kernels_of(implementation), row_chunk=row_chunk)


def outer_rows(
    m: Float[Array, "b s rows c_m"],
    mask: Bool[Array, "b s rows"] | None,
    *,
    ln_in: Affine | None,
    w_a: Array,
    w_b: Array,
    w_out: Array,
    b_out: Array,
    kernels: Kernels,
    row_chunk: int | None,
    whole: Whole = whole_already,
) -> Float[Array, "b rows n c_z"]:
    """`outer_product_mean` for some rows i; `whole` gets b, and the mask, of all tokens from those of these."""
    batch, depth, here, _ = m.shape
    both = jnp.concatenate([w_a, w_b], axis=1)
    a, b = jnp.split(norm_project(m, ln_in, both, implementation=kernels.layernorm_linear), 2, axis=-1)
    if mask is not None:
        a, b = (jnp.where(mask[..., None], x, 0) for x in (a, b))
    b = whole(b, 2)
    length = b.shape[2]
    if mask is None:
        counts = jnp.full((batch, here, length), max(depth, 1), jnp.float32)
    else:
        rows, columns = (x.astype(jnp.float32) for x in (mask, whole(mask, 2)))
        counts = jnp.maximum(jnp.einsum("bsi,bsj->bij", rows, columns), 1)
    rows = min(row_chunk or max(1, _CHUNK_ELEMENTS // (batch * length * w_out.shape[0])), here)
    if rows == here:
        return _outer(w_out, b_out, b, a, counts)
    chunks = math.ceil(here / rows)
    a, counts = (_chunked(x, axis, chunks, rows) for x, axis in ((a, 2), (counts, 1)))
    body = jax.checkpoint(functools.partial(_outer, w_out, b_out, b), prevent_cse=False)
    out = jax.lax.map(lambda chunk: body(*chunk), (a, counts))
    return jnp.moveaxis(out, 0, 1).reshape(batch, chunks * rows, length, -1)[:, :here]


def _outer(w_out, b_out, b, a, counts):
    """Of rows i (in `a`, `[B, S, I, F]`) with all j."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    outer = jnp.einsum("bsif,bsjg->bijfg", a, b, preferred_element_type=wide)
    mean = (outer / jnp.maximum(counts, 1)[..., None, None]).astype(a.dtype)
    return project(mean.reshape(*mean.shape[:3], -1), w_out, b_out)


def _chunked(x: Array, axis: int, chunks: int, rows: int) -> Array:
    """`[chunks, ..., rows, ...]`, the axis padded with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, chunks * rows - x.shape[axis])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, rows, *x.shape[axis + 1 :]), axis, 0)


def pair_weighted_averaging(
    m: Float[Array, "b s n c_m"],
    z: Float[Array, "b n n c_z"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    ln_m: Affine | None,
    ln_z: Affine | None,
    w_bias: Float[Array, "c_z h"],
    w_v: Float[Array, "c_m hd"],
    w_gate: Float[Array, "c_m hd"],
    w_out: Float[Array, "hd c_m"],
    implementation: Implementation = None,
) -> Float[Array, "b s n c_m"]:
    """Every row averaged over tokens with weights that only the pairs decide (AlphaFold3, algorithm 10).

    o_si = sigmoid(x_si w_gate) * sum_j softmax_j(LN(z)_ij w_bias) (x_sj w_v), head by head, with x = LN(m); then w_out.

    Args:
      m: alignment.
      z: pair representation.
      mask: valid keys j; where there are none the average is 0.
      ln_m: scale and offset for m.
      ln_z: scale and offset for z.
      w_bias: pair channels to heads.
      w_v: values, head-major.
      w_gate: gate, as the values.
      w_out: back to m's channels.
      implementation: of layernorm_linear.

    Returns:
      The update of m, not added to it.

    Raises:
      ValueError: unknown implementation; shapes that do not fit.
      TypeError: a mask that is not boolean.
    """
    if m.ndim != 4:
        raise ValueError(f"m: expected shape [B, S, N, Cm], got {m.shape}")
    batch, _, length, channels = m.shape
    if z.ndim != 4 or z.shape[:3] != (batch, length, length):
        raise ValueError(f"z: expected shape [B, N, N, Cz] = {(batch, length, length, 'any')}, got {z.shape}")
    check_mask(mask, "[B, N]", (batch, length))
    check_matrices(w_bias=(w_bias, z.shape[-1]), w_v=(w_v, channels))
    heads, width = w_bias.shape[1], w_v.shape[1]
    if heads == 0 or width % heads:
        raise ValueError(f"w_v: expected a width divisible by the {heads} heads of w_bias, got shape {w_v.shape}")
    check_matrices(width, w_gate=(w_gate, channels))
    check_matrices(channels, w_out=(w_out, width))
    weights = {"ln_m": ln_m, "ln_z": ln_z, "w_bias": w_bias, "w_v": w_v, "w_gate": w_gate, "w_out": w_out}
    return average_rows(m, z, mask, **weights, kernels=kernels_of(implementation))


def average_rows(
    m: Float[Array, "b s rows c_m"],
    z: Float[Array, "b rows n c_z"],
    mask: Bool[Array, "b n"] | None,
    *,
    ln_m: Affine | None,
    ln_z: Affine | None,
    w_bias: Array,
    w_v: Array,
    w_gate: Array,
    w_out: Array,
    kernels: Kernels,
    whole: Whole = whole_already,
) -> Float[Array, "b s rows c_m"]:
    """`pair_weighted_averaging` for some tokens i; `whole` gets the values of all tokens from those of these."""
    both = jnp.concatenate([w_v, w_gate], axis=1)
    v, gate = jnp.split(norm_project(m, ln_m, both, implementation=kernels.layernorm_linear), 2, axis=-1)
    logits = norm_project(z, ln_z, w_bias, implementation=kernels.layernorm_linear)
    weights = masked_softmax(jnp.moveaxis(logits, -1, 1), None if mask is None else mask[:, None, None, :])
    out = jnp.einsum("bhij,bsjhd->bsihd", weights.astype(v.dtype), split_heads(whole(v, 2), w_bias.shape[1]))
    return project(jax.nn.sigmoid(gate) * out.reshape(gate.shape), w_out)
