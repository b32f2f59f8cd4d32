"""Attention with a pair bias: over the edges of triangles, and over tokens."""

from typing import Any

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
    norm_project,
    project,
    split_heads,
    whole_already,
)
from pallas_kernels.evo_attention import evo_attention

_NODES = ("starting", "ending")


def triangle_attention(
    z: Float[Array, "b n n c"],
    mask: Bool[Array, "b n n"] | None = None,
    *,
    ln_in: Affine | None,
    w_q: Float[Array, "c hd"],
    w_k: Float[Array, "c hd"],
    w_v: Float[Array, "c hd"],
    w_bias: Float[Array, "c h"],
    w_gate: Float[Array, "c hd"],
    w_out: Float[Array, "hd c"],
    b_q: Float[Array, " hd"] | None = None,
    node: str = "starting",
    implementation: Implementation = None,
) -> Float[Array, "b n n c"]:
    """Attention along the rows (or columns) of the pair representation (AlphaFold3, algorithms 14 and 15).

    Row i is one sequence: query j sees key k with the bias of pair (j, k), x_jk w_bias, where x = LN(z). The ending
    node is the starting node on the transposed z and mask, transposed back.

    Args:
      z: pair representation.
      mask: valid pairs; in row i, key j counts where `mask[b, i, j]` (ending: of the transposed mask).
      ln_in: scale and offset of x.
      w_q: queries, head-major.
      w_k: keys.
      w_v: values.
      w_bias: its width is the number of heads.
      w_gate: sigmoid gate of the attention's output.
      w_out: back to the pair's channels.
      b_q: bias of the queries.
      node: "starting" or "ending".
      implementation: of evo_attention and layernorm_linear.

    Returns:
      The update of z, not added to it.

    Raises:
      ValueError: unknown node or implementation; shapes that do not fit.
      TypeError: a mask that is not boolean.
    """
    if node not in _NODES:
        raise ValueError(f"node: expected one of {_NODES}, got {node!r}")
    if z.ndim != 4 or z.shape[1] != z.shape[2]:
        raise ValueError(f"z: expected shape [B, N, N, C], got {z.shape}")
    check_mask(mask, "[B, N, N]", z.shape[:3])
    _check_weights(z.shape[-1], z.shape[-1], w_q, w_k, w_v, w_bias, w_gate, w_out)
    if node == "ending":
        z, mask = jnp.swapaxes(z, 1, 2), None if mask is None else jnp.swapaxes(mask, 1, 2)
    weights = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_bias": w_bias, "w_gate": w_gate, "w_out": w_out, "b_q": b_q}
    out = attend_rows(z, mask, ln_in=ln_in, **weights, kernels=kernels_of(implementation))
    return jnp.swapaxes(out, 1, 2) if node == "ending" else out


def attend_rows(
    z: Float[Array, "b rows n c"],
    mask: Bool[Array, "b rows n"] | None,
    *,
    ln_in: Affine | None,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    w_bias: Array,
    w_gate: Array,
    w_out: Array,
    b_q: Array | None,
    kernels: Kernels,
    whole: Whole = whole_already,
) -> Float[Array, "b rows n c"]:
    """`triangle_attention` of the starting node for some rows; `whole` gets the bias of all from that of these."""
    heads, width = w_bias.shape[1], w_q.shape[1]
    packed = jnp.concatenate([w_q, w_k, w_v, w_gate, w_bias], axis=1)
    parts = norm_project(z, ln_in, packed, _padded(b_q, packed), implementation=kernels.layernorm_linear)
    *qkv, gate, bias = jnp.split(parts, [width, 2 * width, 3 * width, 4 * width], axis=-1)
    q, k, v = (split_heads(x, heads) for x in qkv)
    out: Any = evo_attention(
        *(q, k, v),
        None if mask is None else mask[:, :, None, None, :],
        whole(jnp.moveaxis(bias, -1, 1)[:, None], 3),
        implementation=kernels.evo_attention,
    )
    return project(jax.nn.sigmoid(gate) * out.reshape(gate.shape), w_out)


def attention_pair_bias(
    s: Float[Array, "b *t n c"],
    z: Float[Array, "b n n c_z"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    ln_s: Affine | None,
    ln_z: Affine | None,
    w_q: Float[Array, "c hd"],
    w_k: Float[Array, "c hd"],
    w_v: Float[Array, "c hd"],
    w_bias: Float[Array, "c_z h"],
    w_gate: Float[Array, "c hd"],
    w_out: Float[Array, "hd c"],
    b_q: Float[Array, " hd"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b *t n c"]:
    """Attention over tokens with a bias from the pairs (AlphaFold3, algorithm 24, without its conditioning).

    Args:
      s: tokens `[B, N, C]`, or `[B, T, N, C]`: T samples that share the bias, whose gradient is summed over them.
      z: pair representation.
      mask: valid keys.
      ln_s: scale and offset for s.
      ln_z: scale and offset for z.
      w_q: queries, head-major.
      w_k: keys.
      w_v: values.
      w_bias: pair channels to heads.
      w_gate: sigmoid gate of the attention's output.
      w_out: back to the token's channels.
      b_q: bias of the queries.
      implementation: of evo_attention and layernorm_linear.

    Returns:
      The update of s, not added to it.

    Raises:
      ValueError: unknown implementation; shapes that do not fit.
      TypeError: a mask that is not boolean.
    """
    if s.ndim not in (3, 4):
        raise ValueError(f"s: expected shape [B, N, C] or [B, T, N, C], got {s.shape}")
    batch, length, channels = s.shape[0], s.shape[-2], s.shape[-1]
    if z.ndim != 4 or z.shape[:3] != (batch, length, length):
        raise ValueError(f"z: expected shape [B, N, N, Cz] = {(batch, length, length, 'any')}, got {z.shape}")
    check_mask(mask, "[B, N]", (batch, length))
    _check_weights(channels, z.shape[-1], w_q, w_k, w_v, w_bias, w_gate, w_out)
    weights = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_bias": w_bias, "w_gate": w_gate, "w_out": w_out, "b_q": b_q}
    return attend_tokens(s, z, mask, ln_s=ln_s, ln_z=ln_z, **weights, kernels=kernels_of(implementation))


def attend_tokens(
    s: Float[Array, "b *t n c"],
    z: Float[Array, "b rows n c_z"],
    mask: Bool[Array, "b n"] | None,
    *,
    ln_s: Affine | None,
    ln_z: Affine | None,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    w_bias: Array,
    w_gate: Array,
    w_out: Array,
    b_q: Array | None,
    kernels: Kernels,
    whole: Whole = whole_already,
) -> Float[Array, "b *t n c"]:
    """`attention_pair_bias` for all tokens of some samples; `whole` gets the bias of all rows from that of these."""
    q, k, v, gate = token_projections(s, ln_s, w_q, w_k, w_v, w_gate, b_q, w_bias.shape[1], kernels)
    bias = norm_project(z, ln_z, w_bias, implementation=kernels.layernorm_linear)
    out: Any = evo_attention(
        *(q, k, v),
        None if mask is None else mask[:, None, None, None, :],
        whole(jnp.moveaxis(bias, -1, 1)[:, None], 3),
        implementation=kernels.evo_attention,
    )
    return project(jax.nn.sigmoid(gate) * out.reshape(gate.shape), w_out)


def token_projections(
    s: Float[Array, "b *t n c"],
    ln_s: Affine | None,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    w_gate: Array,
    b_q: Array | None,
    heads: int,
    kernels: Kernels,
) -> tuple[Array, Array, Array, Array]:
    """Queries, keys and values `[B, T, N, H, D]`, T being 1 where s has no samples, and the gate before its sigmoid."""
    width = w_q.shape[1]
    packed = jnp.concatenate([w_q, w_k, w_v, w_gate], axis=1)
    parts = norm_project(s, ln_s, packed, _padded(b_q, packed), implementation=kernels.layernorm_linear)
    *qkv, gate = jnp.split(parts, [width, 2 * width, 3 * width], axis=-1)
    q, k, v = (split_heads(x.reshape(s.shape[0], -1, s.shape[-2], width), heads) for x in qkv)
    return q, k, v, gate


def _padded(b_q: Array | None, packed: Array) -> Array | None:
    """The queries' bias for the packed projection, in which they are first."""
    return None if b_q is None else jnp.pad(b_q, (0, packed.shape[1] - b_q.shape[0]))


def _check_weights(channels: int, pair_channels: int, w_q, w_k, w_v, w_bias, w_gate, w_out) -> None:
    check_matrices(w_bias=(w_bias, pair_channels), w_q=(w_q, channels))
    heads, width = w_bias.shape[1], w_q.shape[1]
    if heads == 0 or width == 0 or width % heads:
        raise ValueError(f"w_q: expected a width divisible by the {heads} heads of w_bias, got shape {w_q.shape}")
    check_matrices(width, w_k=(w_k, channels), w_v=(w_v, channels), w_gate=(w_gate, channels))
    check_matrices(channels, w_out=(w_out, width))
