"""The door: signature, argument checks, implementation choice, the refusal of gradients."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.paged_attention import reference, triton, xla

_OP = "paged_attention"
_FORWARD = implementations(reference.forward, xla.forward, triton.forward)


def paged_attention(
    q: Float[Array, "b h d"],
    k_pages: Float[Array, "*l hkv p page d"],
    v_pages: Float[Array, "*l hkv p page d"],
    page_table: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    *,
    scale: float | None = None,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b h d"]:
    """softmax(scale * q K^T) V: one query a row, over the row's first `lengths[b]` tokens.

    Token t of row b lies in page `page_table[b, t // page]` at t % page (PagedAttention, Kwon et al., 2023,
    arXiv:2309.06180). Query head h reads key/value head h // (H / Hkv). Products, softmax and accumulation are float32
    but for two things: on a GPU the products take operands of the wider dtype of q and pages, and float32 ones may be
    rounded to TF32. A row of length 0 gives zeros.

    Nothing else of the pages has an effect: what lies past a row's length, in its last page too, may be NaN, and
    entries of the table past a row's pages may be anything. With `layer` the pages of one layer are read in place.

    There is no gradient: it is for decoding.

    Args:
        q: `[B,H,D]`.
        k_pages: `[Hkv,P,page,D]`, Hkv a divisor of H; of any floating dtype. `[L,Hkv,P,page,D]` with `layer`.
        v_pages: shaped as k_pages, and of its dtype.
        page_table: `[B,N]` integers in 0..P-1 where a row has tokens.
        lengths: `[B]` integers; below 1 nothing is seen, more than N * page count as that.
        scale: of the logits; None is D ** -0.5.
        layer: which of the L layers, an int or a traced integer.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.

    Returns:
        `[B,H,D]` in q's dtype.

    Raises:
        ValueError: shapes that do not fit, a layer outside 0..L-1 (a traced one is clamped), a layer axis without
            `layer` or the reverse.
        TypeError: q or pages not floating, v_pages of another dtype than k_pages, the rest not integer.
        NotImplementedError: a derivative is wanted; the implementation asked for cannot run here.
    """
    check_names(_OP, _FORWARD, implementation)
    _check(q, k_pages, v_pages, page_table, lengths, layer)
    if 0 in (q.size, k_pages.size, page_table.size):
        return jnp.zeros_like(q)
    if layer is None:
        k_pages, v_pages, layer = k_pages[None], v_pages[None], 0
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, k_pages.shape[0] - 1)
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, page_table.shape[1] * k_pages.shape[3])
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if not isinstance(implementation, str | None):
        implementation = tuple(implementation)
    args = vary_alike(q, k_pages, v_pages, page_table.astype(jnp.int32), lengths, layer)
    return _attention((implementation, scale), *args)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(static, *args):
    implementation, scale = static
    return dispatch(_OP, _FORWARD, implementation, *args, scale=scale)


@_attention.defjvp
def _no_gradient(*_):
    raise NotImplementedError(f"{_OP} has no derivative: it is for decoding")


def _check(q, k_pages, v_pages, page_table, lengths, layer):
    if q.ndim != 3:
        raise ValueError(f"q: expected 3 axes [rows, heads, head_dim], got shape {q.shape}")
    rows, heads, dim = q.shape
    axes = ("Hkv", "P", "page", str(dim)) if layer is None else ("L", "Hkv", "P", "page", str(dim))
    if k_pages.ndim != len(axes) or k_pages.shape[-1] != dim:
        given = "without" if layer is None else "with"
        raise ValueError(f"k_pages: expected [{', '.join(axes)}] {given} a layer, got shape {k_pages.shape}")
    kv_heads = k_pages.shape[-4]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k_pages: expected a number of heads that divides q's {heads}, got {kv_heads}")
    if v_pages.shape != k_pages.shape:
        raise ValueError(f"v_pages: expected shape {k_pages.shape}, got {v_pages.shape}")
    if page_table.ndim != 2 or page_table.shape[0] != rows:
        raise ValueError(f"page_table: expected [{rows}, N], got shape {page_table.shape}")
    if lengths.shape != (rows,):
        raise ValueError(f"lengths: expected shape {(rows,)}, got {lengths.shape}")
    for name, x in (("q", q), ("k_pages", k_pages)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if v_pages.dtype != k_pages.dtype:
        raise TypeError(f"v_pages: expected the dtype of k_pages, {k_pages.dtype}, got {v_pages.dtype}")
    for name, x in (("page_table", page_table), ("lengths", lengths)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name}: expected integers, got {x.dtype}")
    if isinstance(layer, int) and not 0 <= layer < k_pages.shape[0]:
        raise ValueError(f"layer: expected one of 0..{k_pages.shape[0] - 1}, got {layer}")
    if layer is not None and (jnp.ndim(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer)):
        raise TypeError(f"layer: expected an integer, got {layer!r}")
