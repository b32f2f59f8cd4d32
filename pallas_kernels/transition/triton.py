"""The transition as Pallas kernels on the Triton backend (NVIDIA, AMD).

Rows of up to 128 channels (64 in float32), the pair representation's, are fused whole: a program holds its tile of
standardised rows x^ and walks over the hidden layer in tiles that never leave the core. The backward pass does the same
twice, making value and gate again: `_rows_kernel` sums the gradient of the rows over the hidden layer, `_sums_kernel`
holds a tile of the hidden layer and sums x^T d_hidden and hidden^T d_out over a share of the rows. Scale and offset are
folded into the weights (see `layernorm_linear.xla`).

Longer rows, of which there are few, do not fit: they are taken some at a time by the kernels of `layernorm_linear` and
plain products, and the hidden layer of a chunk is all that exists.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import output_like, zeros_alike
from pallas_kernels.flash_attention.triton_tiles import dot, flat, load, store, upright
from pallas_kernels.grouped_matmul.triton import Tiles
from pallas_kernels.layernorm_linear import triton as layernorm_linear
from pallas_kernels.layernorm_linear.triton import (
    check,
    fit,
    fold,
    rows_of,
    share_steps,
    shares_of,
    span,
    standardised,
    store_through_norm,
)
from pallas_kernels.layernorm_linear.xla import cut, folded, over_rows, put, weight_gradients
from pallas_kernels.transition.xla import swiglu_gradient

WIDEST = {2: 128, 4: 64}  # channels of the fused kernels, by bytes of an element: wider ones leave no registers
_CHUNK = 2048  # rows of the others
_PROGRAMS = 132  # that share a sum: one for each core of an H100, which holds one; the same on every GPU


def forward(
    x: Float[Array, "m c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    w_in: Float[Array, "c f2"],
    w_out: Float[Array, "f c"],
    *,
    eps: float,
    row_chunk: int | None,
    interpret: bool = False,
) -> Float[Array, "m c"]:
    """(silu(gate) * value) w_out with [value, gate] = LN(x) w_in."""
    check(interpret, x)
    weights, constant = folded(scale, offset, w_in, None, x)
    weights, back = weights.astype(x.dtype), w_out.astype(x.dtype)
    settings = {"eps": eps, "interpret": interpret}
    if x.shape[1] <= WIDEST[x.dtype.itemsize]:
        return _forward(x, weights, constant, back, **settings)

    def chunk(at, size, fresh, out):
        del fresh
        hidden = layernorm_linear.product(cut(x, at, size, x.dtype), weights, constant, **settings)
        value, gate = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
        return put(out, jnp.matmul((jax.nn.silu(gate) * value).astype(x.dtype), back), at)

    return over_rows(x.shape[0], row_chunk or _CHUNK, chunk, zeros_alike(x.shape, x.dtype, x))


def backward(
    x: Float[Array, "m c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    w_in: Float[Array, "c f2"],
    w_out: Float[Array, "f c"],
    d_out: Float[Array, "m c"],
    *,
    eps: float,
    row_chunk: int | None,
    interpret: bool = False,
) -> tuple[Float[Array, "m c"], Float[Array, " c"], Float[Array, " c"], Float[Array, "c f2"], Float[Array, "f c"]]:
    """Gradients of the five arrays, those of the weights in float32."""
    check(interpret, x)
    weights, constant = folded(scale, offset, w_in, None, x)
    args = x, weights.astype(x.dtype), constant, w_out.astype(x.dtype), d_out
    if x.shape[1] <= WIDEST[x.dtype.itemsize]:
        d_x, *moments = _rows_gradient(*args, eps=eps, interpret=interpret)
        sums, total, d_back = _weights_sums(*args, *moments, interpret=interpret)
    else:
        d_x, sums, total, d_back = _by_chunks(*args, eps=eps, row_chunk=row_chunk, interpret=interpret)
    return d_x, *weight_gradients(scale, offset, w_in, sums, total), d_back


def _by_chunks(x, weights, constant, back, d_out, *, eps, row_chunk, interpret):
    """Gradient of the rows, x^T d_hidden, the sum of d_hidden's rows, hidden^T d_out; the last three in float32."""

    def chunk(at, size, fresh, carry):
        d_x, sums, total, d_back = carry
        own, d_own = cut(x, at, size, x.dtype), cut(d_out, at, size, x.dtype)
        hidden = layernorm_linear.product(own, weights, constant, eps=eps, interpret=interpret)
        value, gate = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
        d_product = jnp.matmul(d_own, back.T, preferred_element_type=jnp.float32)
        product, d_hidden = (part.astype(x.dtype) for part in swiglu_gradient(value, gate, d_product))
        d_rows, mean, rstd = layernorm_linear.rows_gradient(own, weights, d_hidden, eps=eps, interpret=interpret)
        d_hidden = jnp.where(fresh[:, None], d_hidden, 0)
        parts = layernorm_linear.weights_sums(own, mean, rstd, d_hidden, interpret=interpret)
        d_own = jnp.where(fresh[:, None], d_own, 0)
        d_back += jnp.matmul(product.T, d_own, preferred_element_type=jnp.float32)
        return put(d_x, d_rows, at), sums + parts[0], total + parts[1], d_back

    shapes = weights.shape, weights.shape[1:], back.shape
    start = (x, *(zeros_alike(shape, jnp.float32, x) for shape in shapes))
    return over_rows(x.shape[0], row_chunk or _CHUNK, chunk, start)


def _call(kernel, name, out_shape, programs, tiles, interpret, **settings):
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, **settings),
        out_shape=out_shape,
        grid=(programs,),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=name,
    )


def _tiles(table, x, back):
    """rows: of x in a step; columns: all channels; depth: hidden units in a step."""
    tiles = table[x.dtype.itemsize]
    (hidden, channels), rows = back.shape, fit(x.shape[0], tiles.rows)
    return dataclasses.replace(tiles, rows=rows, columns=fit(channels, tiles.columns), depth=fit(hidden, tiles.depth))


def _forward(x, weights, constant, back, *, eps, interpret):
    tiles = _tiles(_FORWARD_TILES, x, back)
    programs = pl.cdiv(x.shape[0], tiles.rows)
    out = output_like(x.shape, x.dtype, x)
    return _call(_forward_kernel, "transition", out, programs, tiles, interpret, eps=eps)(x, weights, constant, back)


def _forward_kernel(
    x_ref: Any, w_ref: Any, constant_ref: Any, back_ref: Any, out_ref: Any, *, eps: float, tiles: Tiles
) -> None:
    row, safe, real = rows_of(pl.program_id(0), tiles.rows, x_ref.shape[0])
    column, wanted = span(0, tiles.columns, x_ref.shape[1])
    normal = standardised(x_ref, safe, tiles.columns, eps)[0](0).astype(x_ref.dtype)

    def step(i, total):
        unit, inside = span(i, tiles.depth, back_ref.shape[0])
        w, constants = _hidden_weights(w_ref, constant_ref, column, wanted, unit, inside)
        value, gate = (dot(normal, part, 0) + constant[None, :] for part, constant in zip(w, constants))
        back = load(back_ref, (unit[:, None], column[None, :]), upright(inside), flat(wanted))
        return total + dot((gate * jax.nn.sigmoid(gate) * value).astype(back.dtype), back, 0)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = fold(pl.cdiv(back_ref.shape[0], tiles.depth), step, total)
    store(out_ref, (row[:, None], column[None, :]), total, upright(real), flat(wanted))


def _hidden_weights(w_ref, constant_ref, column, wanted, unit, inside):
    """Weights [channels, units] and constants [units] of the value and of the gate of some hidden units."""
    places = unit, w_ref.shape[1] // 2 + unit
    w = [load(w_ref, (column[:, None], place[None, :]), upright(wanted), flat(inside)) for place in places]
    return w, [load(constant_ref, (place,), inside) for place in places]


def _rows_gradient(x, weights, constant, back, d_out, *, eps, interpret):
    """The gradient of x, and the mean and reciprocal deviation of its rows."""
    tiles = _tiles(_ROWS_TILES, x, back)
    moment = output_like(x.shape[:1], jnp.float32, x)
    out = (output_like(x.shape, x.dtype, x), moment, moment)
    programs = pl.cdiv(x.shape[0], tiles.rows)
    call = _call(_rows_kernel, "transition_rows_gradient", out, programs, tiles, interpret, eps=eps)
    return call(x, weights, constant, back, d_out)


def _rows_kernel(
    x_ref: Any,
    w_ref: Any,
    constant_ref: Any,
    back_ref: Any,
    d_ref: Any,
    dx_ref: Any,
    mean_ref: Any,
    rstd_ref: Any,
    *,
    eps: float,
    tiles: Tiles,
) -> None:
    row, safe, real = rows_of(pl.program_id(0), tiles.rows, x_ref.shape[0])
    column, wanted = span(0, tiles.columns, x_ref.shape[1])
    part, mean, rstd = standardised(x_ref, safe, tiles.columns, eps)
    normal = part(0).astype(x_ref.dtype)
    d_out = load(d_ref, (safe[:, None], column[None, :]), flat(wanted))

    def step(i, total):
        unit, inside = span(i, tiles.depth, back_ref.shape[0])
        w, constants = _hidden_weights(w_ref, constant_ref, column, wanted, unit, inside)
        value, gate = (dot(normal, part, 0) + constant[None, :] for part, constant in zip(w, constants))
        back = load(back_ref, (unit[:, None], column[None, :]), upright(inside), flat(wanted))
        _, d_value, d_gate = _swiglu(value, gate, dot(d_out, back, 1), back.dtype)
        return total + dot(d_value, w[0], 1) + dot(d_gate, w[1], 1)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = fold(pl.cdiv(back_ref.shape[0], tiles.depth), step, total)
    store_through_norm(dx_ref, row, real, tiles.columns, part, rstd, lambda _: total)
    store(mean_ref, (row,), mean, real)
    store(rstd_ref, (row,), rstd, real)


def _swiglu(value, gate, d, dtype):
    """The product, and the gradients of value and gate, rounded."""
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    return tuple(part.astype(dtype) for part in (silu * value, d * silu, d * value * (share + silu * (1 - share))))


def _weights_sums(x, weights, constant, back, d_out, mean, rstd, *, interpret):
    """x^T d_hidden, the sum of d_hidden's rows, and hidden^T d_out, in float32."""
    tiles = _tiles(_SUMS_TILES, x, back)
    units = pl.cdiv(back.shape[0], tiles.depth)
    shares = shares_of(x.shape[0], tiles.rows, pl.cdiv(_PROGRAMS, units))
    shapes = weights.shape, weights.shape[1:], back.shape
    out = tuple(output_like((shares, *shape), jnp.float32, x) for shape in shapes)
    call = _call(_sums_kernel, "transition_weights_sums", out, shares * units, tiles, interpret)
    return tuple(jnp.sum(part, axis=0) for part in call(x, weights, constant, back, d_out, mean, rstd))


def _sums_kernel(
    x_ref: Any,
    w_ref: Any,
    constant_ref: Any,
    back_ref: Any,
    d_ref: Any,
    mean_ref: Any,
    rstd_ref: Any,
    sums_ref: Any,
    total_ref: Any,
    back_sums_ref: Any,
    *,
    tiles: Tiles,
) -> None:
    rows, (shares, half, _) = x_ref.shape[0], back_sums_ref.shape
    units = pl.cdiv(half, tiles.depth)
    share = pl.program_id(0) // units
    unit, inside = span(pl.program_id(0) % units, tiles.depth, half)
    column, wanted = span(0, tiles.columns, x_ref.shape[1])
    w, constants = _hidden_weights(w_ref, constant_ref, column, wanted, unit, inside)
    back = load(back_ref, (unit[:, None], column[None, :]), upright(inside), flat(wanted))

    def step(i, carry):
        # Transposed, [units, rows]: what is summed is then at hand as the left factor.
        _, safe, real = rows_of(i, tiles.rows, rows)
        x = load(x_ref, (safe[:, None], column[None, :]), flat(wanted)).astype(jnp.float32)
        normal = ((x - load(mean_ref, (safe,))[:, None]) * load(rstd_ref, (safe,))[:, None]).astype(back.dtype)
        d_out = load(d_ref, (safe[:, None], column[None, :]), upright(real), flat(wanted))
        value, gate = (dot(part.T, normal, 1) + constant[:, None] for part, constant in zip(w, constants))
        product, *d_hidden = _swiglu(value, gate, dot(back, d_out, 1), back.dtype)
        sums = dot(d_hidden[0], normal, 0), dot(d_hidden[1], normal, 0), dot(product, d_out, 0)
        # A product with ones takes fewer registers than a sum across threads.
        totals = (dot(d, jnp.ones((tiles.rows, 16), d.dtype), 0) for d in d_hidden)
        return tuple(old + new for old, new in zip(carry, (*sums, *totals)))

    start = [jnp.zeros((tiles.depth, tiles.columns), jnp.float32)] * 3 + [jnp.zeros((tiles.depth, 16), jnp.float32)] * 2
    carry = lax.fori_loop(*share_steps(share, shares, rows, tiles.rows), step, tuple(start))
    masks = upright(inside), flat(wanted)
    for place, sums, total in zip((unit, half + unit), carry[:2], carry[3:]):
        store(sums_ref, (share, column[None, :], place[:, None]), sums, *masks)
        store(total_ref, (share, place), jnp.max(total, axis=1), inside)  # all columns are the same
    store(back_sums_ref, (share, unit[:, None], column[None, :]), carry[2], *masks)


# By bytes of an element; what the compiler makes of them is in docs/kernels.md.
_FORWARD_TILES = {2: Tiles(128, 128, 32, warps=8, stages=3), 4: Tiles(64, 64, 32, warps=8, stages=2)}
_ROWS_TILES = {2: Tiles(128, 128, 32, warps=8, stages=2), 4: Tiles(64, 64, 32, warps=8, stages=2)}
_SUMS_TILES = {2: Tiles(32, 128, 64, warps=8, stages=3), 4: Tiles(32, 64, 64, warps=8, stages=2)}
