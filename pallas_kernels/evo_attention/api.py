"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.evo_attention import reference, triton, triton_backward, xla
from pallas_kernels.evo_attention.reference import Options

_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton_backward.backward)


def evo_attention(
    q: Float[Array, "b s n h d"],
    k: Float[Array, "b s n h d"],
    v: Float[Array, "b s n h d"],
    mask: Bool[Array, "#b #s 1 1 #n"] | Float[Array, "#b #s 1 1 #n"] | None = None,
    pair_bias: Float[Array, "b 1 h n n"] | None = None,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    block_q: int | None = None,
    block_k: int | None = None,
    row_chunk: int | None = None,
    return_lse: bool = False,
) -> Float[Array, "b s n h d"] | tuple[Float[Array, "b s n h d"], Float[Array, "b s h n"]]:
    """softmax(scale * q k^T + pair_bias + mask) v for every row s and head, without stored logits in either direction.

    S rows share one pair bias: S is 1 for single attention, N for triangle attention, the number of sequences or of
    diffusion samples elsewhere. Softmax, log-sum-exp and all sums, that of the bias's gradient over the rows included,
    are float32. That sum is made in a fixed order, and only where the bias takes a gradient (MegaFold, 2025,
    arXiv:2506.20686; its kernels add atomically). Products of float32 arrays are as exact as
    `jax.default_matmul_precision` says (on a GPU TF32, unless it says otherwise). Usable under `jit`, `vmap`,
    `jax.checkpoint` and `shard_map`; arrays that lie over a mesh need a `shard_map`, as XLA cannot divide a kernel.

    Args:
        q: queries `[B,S,N,H,D]`, bfloat16, float16 or float32.
        k: keys, shaped as q.
        v: values, shaped as q.
        mask: of keys, broadcastable to `[B,S,1,1,N]`. Boolean: True is a valid key, the others have no part at all; a
            row without valid keys gives zeros and takes no gradient. Floating: finite numbers added to the logits, with
            gradient.
        pair_bias: `[B,1,H,N,N]` (head, query, key), of any floating dtype; its gradient has that dtype.
        scale: of the products; None is D ** -0.5.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.
        block_q: queries of a tile of the Triton kernels, a power of two and at least 16; None: what suits N and D.
        block_k: keys of one.
        row_chunk: rows that "xla" takes at once; None: as many as stay within a few MiB.
        return_lse: also return the log-sum-exp of the logits of every row, differentiable.

    Returns:
        `[B,S,N,H,D]` in q's dtype; with `return_lse` also `[B,S,H,N]` float32 (-inf where no key is valid).

    Raises:
        ValueError: shapes that do not fit, N or D of 0, blocks that are no powers of two, a row_chunk below 1.
        TypeError: q, k, v not floating or of different dtypes, an integer mask, a bias that is not floating.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names("evo_attention", _FORWARD, implementation)
    _check(q, k, v, mask, pair_bias, block_q, block_k, row_chunk)
    options = Options(float(q.shape[-1] ** -0.5 if scale is None else scale), block_q, block_k, row_chunk)
    batch, rows, length, heads, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if q.size == 0:
        lse = jnp.full((batch, rows, heads, length), -jnp.inf, wide)
        return (jnp.zeros_like(q), lse) if return_lse else jnp.zeros_like(q)
    shift = jnp.zeros((1, 1, 1, 1, 1), wide)
    if mask is not None:
        mask = jnp.where(mask, 0.0, -jnp.inf) if mask.dtype == bool else mask.astype(wide)
        # Softmax does not see it, and large numbers would swallow what the log-sum-exp says of the weights.
        shift = jax.lax.stop_gradient(jnp.max(mask, axis=-1, keepdims=True))
        shift = jnp.where(shift == -jnp.inf, 0.0, shift)
        mask = jnp.broadcast_to(mask - shift, (batch, rows, 1, 1, length))[:, :, 0, 0].astype(wide)
    bias = None if pair_bias is None else pair_bias[:, 0]
    if implementation == "reference":
        out, lse = reference.forward(q, k, v, mask, bias, options=options)
    else:
        given = iter(vary_alike(*(x for x in (q, k, v, mask, bias) if x is not None)))
        arrays = [None if x is None else next(given) for x in (q, k, v, mask, bias)]
        names = implementation if isinstance(implementation, str | None) else tuple(implementation)
        out, lse = _attention((names, options), *arrays)
    return (out, lse + shift[:, :, 0]) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, mask, bias):
    names, options = static
    return dispatch("evo_attention", _FORWARD, names, q, k, v, mask, bias, options=options)


def _fwd(static, *primals):
    q, k, v, mask, bias = jax.tree.map(lambda x: x.value, primals, is_leaf=_is_primal)
    out, lse = _attention(static, q, k, v, mask, bias)
    # Structure is static, so None says that no gradient is wanted, and saves its sum over the rows.
    wanted = tuple(None if x is None or not x.perturbed else () for x in primals[3:])
    return (out, lse), (q, k, v, mask, bias, out, lse, wanted)


def _bwd(static, saved, cotangents):
    names, options = static
    q, k, v, mask, bias, out, lse, (mask_wanted, bias_wanted) = saved
    d_out, d_lse = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(out)
    delta = jnp.sum(out.astype(lse.dtype) * d_out.astype(lse.dtype), axis=-1).swapaxes(2, 3)
    if not isinstance(d_lse, SymbolicZero):
        delta = jnp.where(lse == -jnp.inf, 0.0, delta - d_lse)
    return dispatch(
        "evo_attention",
        _BACKWARD,
        names,
        *(q, k, v, mask, bias, lse, delta, d_out),
        options=options,
        mask_gradient=mask_wanted is not None,
        bias_gradient=bias_wanted is not None,
    )


_attention.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _check(q, k, v, mask, pair_bias, block_q, block_k, row_chunk):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 5:
            raise ValueError(f"{name}: expected 5 axes [batch, rows, length, heads, head_dim], got shape {x.shape}")
        if x.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q, {q.shape}, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype, floating, got {x.dtype} beside q of {q.dtype}")
    batch, rows, length, heads, dim = q.shape
    if length == 0 or dim == 0:
        raise ValueError(f"q: expected a length and a head_dim of at least 1, got shape {q.shape}")
    if mask is not None:
        full = (batch, rows, 1, 1, length)
        if mask.ndim != 5 or any(size not in (1, whole) for size, whole in zip(mask.shape, full)):
            raise ValueError(f"mask: expected a shape that broadcasts to [B, S, 1, 1, N] = {full}, got {mask.shape}")
        if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.floating):
            raise TypeError(f"mask: expected booleans (True is valid) or floats to add, got {mask.dtype}")
    if pair_bias is not None:
        full = (batch, 1, heads, length, length)
        if pair_bias.shape != full:
            raise ValueError(f"pair_bias: expected shape [B, 1, H, N, N] = {full}, got {pair_bias.shape}")
        if not jnp.issubdtype(pair_bias.dtype, jnp.floating):
            raise TypeError(f"pair_bias: expected a floating dtype, got {pair_bias.dtype}")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block is not None and (block < 16 or block & (block - 1)):
            raise ValueError(f"{name}: expected a power of two, at least 16, or None, got {block}")
    if row_chunk is not None and row_chunk < 1:
        raise ValueError(f"row_chunk: expected at least 1, or None, got {row_chunk}")
